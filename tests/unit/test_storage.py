"""Runs on an object store: what travels, what counts, and what a node says of its storage."""

from pathlib import Path

import pytest
from pyarrow import fs

from rlvid.cluster.nodes import visit, workers_that_fit
from rlvid.config import load_config, parse_config
from rlvid.storage import Mirror, home, run_mirror, run_uri, split_uri, worker_mirror
from rlvid.train.preflight import check, prepare


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind the URI, and a cache of its own."""
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "cache"))
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text("utf-8") for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    mirror = run_mirror(str(tmp_path), "mine")
    assert mirror.folder == tmp_path / "mine"
    write(mirror.folder / "config.yaml", "a")
    mirror.pull()
    mirror.push()
    mirror.delete(lambda path: True)
    assert tree(tmp_path) == {"mine/config.yaml": "a"}
    assert not mirror.sizes()


def test_what_one_machine_pushes_another_pulls(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uri = f"file://{store}/runs"
    first = run_mirror(uri, "mine")
    files = {"config.yaml": "a", "step-000002/state.json": "{}", "step-000002/engine/x": "big", "archive/step-1": "x"}
    for name, text in (files | {".lock": "", "half.tmp": ""}).items():
        write(first.folder / name, text)
    first.push()
    assert tree(store / "runs" / "mine") == files
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "elsewhere"))
    second = run_mirror(uri, "mine")
    assert tree(second.folder) == {"config.yaml": "a", "step-000002/state.json": "{}"}
    assert (second.folder / "archive").is_dir(), "that the run has begun must be known"
    (store / "runs" / "mine" / "archive" / "step-1").unlink()
    assert (run_mirror(uri, "mine").folder / "archive").is_dir(), "a run without an archive has begun too"
    (store / "runs" / "mine" / "step-000002" / "state.json").unlink()
    assert not (run_mirror(uri, "mine").folder / "archive").is_dir()


def test_what_is_forgotten_is_gone_from_the_store_alone(store: Path) -> None:
    mirror = run_mirror(f"file://{store}", "mine")
    write(mirror.folder / "versus.md", "of an earlier evaluation")
    mirror.push(["versus.md"])
    assert tree(store) == {"mine/versus.md": "of an earlier evaluation"}
    for _ in range(2):
        mirror.delete(lambda name: name == "versus.md")
        assert tree(store) == {}
    assert (mirror.folder / "versus.md").is_file()


def test_the_store_counts_and_only_changes_travel(store: Path) -> None:
    uri = f"file://{store}"
    mirror = run_mirror(uri, "mine")
    write(mirror.folder / "config.yaml", "mine")
    write(mirror.folder / "reward.png", "old")
    mirror.push()
    write(store / "mine" / "config.yaml", "theirs")  # another machine's
    (store / "mine" / "reward.png").unlink()
    mirror.push()
    assert tree(store / "mine") == {"config.yaml": "theirs"}
    write(mirror.folder / "left-behind", "x")
    assert tree(run_mirror(uri, "mine").folder) == {"config.yaml": "theirs"}


def test_a_workers_log_goes_on_on_another_machine(store: Path, tmp_path: Path) -> None:
    worker = worker_mirror(f"file://{store}", "mine", Path("/nowhere"), tmp_path / "one")
    write(worker.folder / "logs" / "worker-00.log", "one\n")
    worker.push()
    again = worker_mirror(f"file://{store}", "mine", Path("/nowhere"), tmp_path / "two")
    again.pull(lambda name: name == "logs/worker-00.log")
    with open(again.folder / "logs" / "worker-00.log", "a", encoding="utf-8") as log:
        log.write("two\n")
    again.push()
    assert tree(store / "mine") == {"logs/worker-00.log": "one\ntwo\n"}


def test_it_is_pyarrows_file_system_and_not_our_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without a disk: a store whose files are in memory."""
    memory, _ = fs.FileSystem.from_uri("mock://x")
    monkeypatch.setattr("rlvid.storage.locate", lambda storage, under: (memory, f"bucket/{under}"))
    mirror = Mirror("s3://bucket", "mine", tmp_path / "one")
    write(tmp_path / "one" / "a" / "b.txt", "text")
    memory.create_dir("bucket/mine/a")
    mirror.push()
    other = Mirror("s3://bucket", "mine", tmp_path / "two")
    other.pull()
    assert tree(tmp_path / "two") == {"a/b.txt": "text"}


@pytest.mark.parametrize("storage", ["s3://", "ftp://host/runs", "http://host/runs"])
def test_stores_that_nobody_reads_are_refused(storage: str) -> None:
    with pytest.raises(ValueError, match=r"output.storage = .*: must be a folder, such as .*s3://BUCKET"):
        load_config("toy", [f"output.storage={storage}"])


def test_a_uri_has_a_home_of_its_own(store: Path) -> None:
    assert home("s3://bucket/runs") != home("s3://bucket/other")
    assert home("s3://bucket/runs/") == home("s3://bucket/runs")
    for storage in ("s3://bucket/runs", "s3://bucket/runs?scheme=http&endpoint_override=localhost:9000"):
        assert split_uri(run_uri(storage, "mine")) == (storage, "mine")
    assert split_uri("s3://bucket/runs/mine/") == ("s3://bucket/runs", "mine")


def test_a_node_says_what_is_wrong_with_the_storage(tmp_path: Path) -> None:
    write(tmp_path / "mine" / ".seen-1", "rlvid")
    assert visit(str(tmp_path), "mine", ".seen-1")[1] is None
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [".seen-1"]
    assert visit(str(tmp_path), "other", ".seen-1", patience=0)[1] == "does not see what the driver writes there"
    assert visit(f"file://{tmp_path}", "mine", ".seen-1")[1] is None


def test_a_guard_needs_a_folder(store: Path) -> None:
    config = parse_config({"guard": {"every": 50}, "output": {"storage": f"file://{store}"}})
    with pytest.raises(ValueError, match=r"guard\.every = 50: the guard reads checkpoints from a folder"):
        check(config)


def test_a_worker_lies_on_one_node() -> None:
    nodes = [({"CPU": 3.0}, 2.0), ({"CPU": 8.0, "GPU": 1.0}, 1.0), ({}, 1.0)]
    assert workers_that_fit(nodes, {"CPU": 2.0}) == 6
    assert workers_that_fit(nodes, {"CPU": 2.0, "GPU": 1.0}) == 1
    assert workers_that_fit(nodes, {"CPU": 9.0}) == 0
    assert workers_that_fit([({"CPU": 0.3}, 1.0)], {"CPU": 0.1}) == 3


def test_the_folder_of_a_job_is_no_storage(tmp_path: Path) -> None:
    storage = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs"
    with pytest.raises(ValueError, match="lies in the job's own folder, which the cluster deletes"):
        prepare(load_config("toy", [f"output.storage={storage}"]))
    assert not storage.exists()
