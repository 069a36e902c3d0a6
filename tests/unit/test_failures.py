"""Full and slow disks, cut-off files, and what another split of the work may go on from; no Ray."""

import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from archives import add_chunk, make_samples
from helpers import save_run
from pyarrow import fs

from rlvid.config import load_config
from rlvid.evaluate.models import find_models
from rlvid.runs.checkpoints import find_checkpoints, flaw, latest_checkpoint, read_settings, wrong_bytes
from rlvid.runs.find import find_run
from rlvid.storage import Mirror, run_mirror
from rlvid.train import worker as worker_module
from rlvid.train.audit import archive_faults, starts, tensorboard_faults
from rlvid.train.checkpoint import checkpoint_write_errors
from rlvid.train.metrics import TensorBoard
from rlvid.train.preflight import prepare
from rlvid.train.record import RECORD, check_resume, recorded, recorded_step, repair_record
from rlvid.train.resume import carries_over, notice
from rlvid.train.worker import Worker


@pytest.fixture
def no_room() -> Iterator[None]:
    """A real write error: no file may grow beyond 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's thread, on its way out
def test_tensorboard_says_what_it_could_not_write(tmp_path: Path, no_room: None) -> None:
    board = TensorBoard(tmp_path / "tensorboard", 0)
    board.scalars(0, {f"a/rather/long/name/{index}": 0.5 for index in range(100)})
    with pytest.raises(OSError, match=r"TensorBoard events in .*tensorboard could not be written \(File too large\)"):
        board.flush()
    with suppress(OSError):
        board.close()  # or its thread would try again after two minutes, in another test


@pytest.mark.usefixtures("no_room")
def test_a_checkpoint_that_does_not_fit_is_named_whichever_library_writes_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensor, ways = torch.zeros(1000), {"a.pt": torch.save, "a.txt": lambda _, path: path.write_text("a" * 2000)}
    ways["a.safetensors"] = lambda each, path: save_file({"weight": each}, path)
    for name, save in ways.items():
        with (
            pytest.raises(OSError, match=r"checkpoint after step 7 could not be written .*make room in .*are whole"),
            checkpoint_write_errors(7, tmp_path),
        ):
            save(tensor, tmp_path / name)
    with pytest.raises(RuntimeError, match="a shape"), checkpoint_write_errors(7, tmp_path):
        raise RuntimeError("a shape")


ADAPTER = "adapter/adapter_model.safetensors"


def other_bytes(path: Path) -> None:
    """Changes a byte in the middle of a file, which keeps its length and its time."""
    was, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def engine_file(checkpoint: Path) -> Path:
    return next(p for p in (checkpoint / "engine").rglob("*") if p.is_file())


HARM: dict[str, Callable[[Path], None]] = {
    "without a part of the engine": lambda folder: engine_file(folder).unlink(),
    "without its state": lambda folder: (folder / "state.json").unlink(),
    "without its weights": lambda folder: shutil.rmtree(folder / "adapter"),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "cut off": lambda folder: os.truncate(folder / ADAPTER, 100),
    "longer": lambda folder: os.truncate(folder / ADAPTER, (folder / ADAPTER).stat().st_size + 1),
    "state cut off": lambda folder: os.truncate(folder / "state.json", 50),
    "state of another step": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 4', '"step": 7')
    ),
    "state no mapping": lambda folder: (folder / "state.json").write_text("[1]"),
    "state too deep": lambda folder: (folder / "state.json").write_text("[" * 100_000),
    "state a folder": lambda folder: [(folder / "state.json").unlink(), (folder / "state.json").mkdir()],
}
BYTES: dict[str, Callable[[Path], None]] = {
    "wrong bytes in the engine": lambda folder: other_bytes(engine_file(folder)),
    "wrong bytes in the weights": lambda folder: other_bytes(folder / ADAPTER),
    "wrong bytes in a description": lambda folder: other_bytes(folder / "adapter/adapter_config.json"),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with whole checkpoints of steps 2 and 4, both of which Ray Train counted."""
    home = tmp_path_factory.mktemp("whole")
    run, _ = save_run(home, step=2)
    save_run(home, step=4)
    repair_record(Mirror(str(home), "run"))
    return run


@pytest.fixture
def run(two_checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_checkpoints, tmp_path / "run"))


def steps_of(run: Path) -> tuple[list[str], int | None]:
    """What Ray Train's record counts, and the step of the latest."""
    record = json.loads((run / RECORD).read_text())
    latest = record["latest_checkpoint_result"]
    assert recorded_step(fs.LocalFileSystem(), str(run / RECORD)) == (latest["metrics"]["step"] if latest else 0)
    return recorded(run) or [], latest and latest["metrics"]["step"]


@pytest.mark.parametrize("harm", HARM)
def test_a_checkpoint_that_is_not_whole_is_put_aside_and_the_one_before_counts(run: Path, harm: str) -> None:
    newest = run / "step-000004"
    HARM[harm](newest)
    assert flaw(newest) is not None
    assert [found.step for found in find_checkpoints(run)] == [2]
    (line,) = repair_record(Mirror(str(run.parent), "run"))
    assert re.search(r"step-000004 is damaged \(.+\).* renamed to step-000004\.damaged.* after step 2", line)
    assert "\n" not in line
    assert (run / "step-000004.damaged").is_dir()
    assert not newest.exists()
    assert steps_of(run) == (["step-000002"], 2)
    assert repair_record(Mirror(str(run.parent), "run")) == []


@pytest.mark.parametrize("harm", BYTES)
def test_wrong_bytes_of_the_right_length_are_found_by_whoever_is_about_to_read_them(run: Path, harm: str) -> None:
    newest = run / "step-000004"
    BYTES[harm](newest)
    assert flaw(newest) is None
    assert "other bytes than were written" in str(flaw(newest, read=True))
    assert len([why for rank in range(3) if (why := wrong_bytes(newest, rank, 3))]) == 1, "workers share the reading"
    if "engine" not in harm:
        assert flaw(newest, resumable=False, read=True)
    # as the driver does when workers say so
    repair_record(Mirror(str(run.parent), "run"), {"step-000004": "wrong bytes"})
    assert (run / "step-000004.damaged").is_dir()
    assert steps_of(run) == (["step-000002"], 2)


def test_the_record_agrees_with_the_checkpoints_that_are_there(run: Path) -> None:
    both = (["step-000002", "step-000004"], 4)
    for left in ("", '{"ray_version": "2.6', "[]", '{"checkpoint_results": 5}', None):
        (run / RECORD).write_text(left or "")
        if left is None:
            (run / RECORD).unlink()
        assert repair_record(Mirror(str(run.parent), "run")) == []
        assert steps_of(run) == both
    shutil.rmtree(run / "step-000004")  # by hand
    (line,) = repair_record(Mirror(str(run.parent), "run"))
    assert re.search(r"step-000004 is missing.* after step 2", line)
    assert steps_of(run) == (["step-000002"], 2)
    shutil.rmtree(run / "step-000002")
    (line,) = repair_record(Mirror(str(run.parent), "run"))
    assert "at step 0" in line
    assert steps_of(run) == ([], None)


def test_a_checkpoint_whose_writing_was_interrupted_is_deleted_and_never_one_that_counted(run: Path) -> None:
    shutil.copytree(run / "step-000004", run / "step-000006")
    (run / "step-000006" / "state.json").unlink()
    (line,) = repair_record(Mirror(str(run.parent), "run"))
    assert re.search(r"step-000006 was not finished.*deleted.* after step 4", line)
    assert not list(run.glob("step-000006*"))
    for again in ("", "-2"):  # another one of that step is damaged
        shutil.copytree(run / "step-000002", run / "step-000004", dirs_exist_ok=True)
        repair_record(Mirror(str(run.parent), "run"), {"step-000004": "wrong bytes"})
        assert (run / f"step-000004.damaged{again}").is_dir()


def test_in_a_store_a_damaged_checkpoint_is_found_by_sizes_and_renamed_there(
    two_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "cache"))
    store = Path(shutil.copytree(two_checkpoints, tmp_path / "store" / "run"))
    uri = f"file://{store.parent}"
    assert repair_record(run_mirror(uri, "run")) == []
    os.truncate(engine_file(store / "step-000004"), 10)  # which no driver fetches
    (line,) = repair_record(run_mirror(uri, "run"))
    assert re.search(r"step-000004 is damaged \(engine/\S+ has 10 bytes", line)
    assert sorted(p.name for p in store.glob("step-*") if any(p.rglob("*.*"))) == ["step-000002", "step-000004.damaged"]
    assert steps_of(store) == (["step-000002"], 2)
    again = run_mirror(uri, "run")
    again.push()
    assert [found.step for found in find_checkpoints(again.folder, resumable=False)] == [2]
    assert latest_checkpoint(again.folder, resumable=False) is not None


def test_evaluation_uses_the_newest_whole_checkpoint_and_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    other_bytes(run / "step-000004" / ADAPTER)
    assert find_run(run)[1].step == 2
    assert [model.step for model in find_models([str(run)])][1:] == [2]
    assert re.search(r"step-000004 is not whole \(adapter/.* other bytes.*step 2 is used", caplog.text)
    for wanted in (f"{run}@4", f"{run}@all"):
        with pytest.raises(ValueError, match=r"step-000004 is damaged \(adapter/"):
            find_models([wanted])
    os.truncate(run / "step-000002" / ADAPTER, 10)
    with pytest.raises(ValueError, match=r"step-000004 is not whole"):
        find_run(run)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x00\xff\xfe binary", "is damaged"),
        (b"name: [1, 2", "is damaged"),
        (b"", "holds nothing"),
        (b"- a\n- b\n", "no mapping"),
        (b"[" * 100_000, "is damaged"),
        (b"name: 5\n", r"config\.yaml: name"),
        (b"train: none\n", r"config\.yaml: train"),
        (b"1: 2\n", r"config\.yaml: "),
        (b"{[1]: 2}\n", "is damaged"),
        (b"seed: 2001-99-99\n", "is damaged"),
    ],
)
def test_damaged_settings_of_a_run_are_named_in_one_line(run: Path, content: bytes, says: str) -> None:
    (run / "config.yaml").write_bytes(content)
    now = load_config("toy", [f"output.storage={run.parent}", "name=run"])
    for read in (lambda: find_run(run), lambda: prepare(now)):
        with pytest.raises(ValueError, match=says) as error:
            read()
        assert "config.yaml" in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600


def test_a_run_of_another_version_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {train: lora}\noutput: {video_prompts: 6}\n")
    with pytest.raises(ValueError, match=r"model\.train is now model\.finetune; .* train it again$") as error:
        read_settings(tmp_path)
    assert "\n" not in str(error.value)


def test_a_first_start_that_was_killed_blocks_no_name(tmp_path: Path) -> None:
    now = load_config("toy", [f"output.storage={tmp_path}", "name=mine"])
    for left in (".lock", ".config.yaml.0a1b2c3d", "config.yaml.tmp", ".tmp/.lock"):
        (tmp_path / "mine" / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / left).touch()
    assert prepare(now) == tmp_path / "mine"
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not a run of rlvid"):
        prepare(now)
    (tmp_path / "mine" / "thesis.txt").unlink()
    (tmp_path / "mine" / "config.yaml").mkdir()
    with pytest.raises(ValueError, match="is not a run of rlvid"):
        prepare(now)


# -------------------------------------------------------------------------------------------- audit


def test_the_audit_finds_what_is_missing_and_what_is_there_twice(tmp_path: Path) -> None:
    config = load_config("toy", ["train.batch_size=2", "train.workers=1"])
    serials = {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 2}
    add_chunk(tmp_path, {key: make_samples(serial, count=1) for key, serial in serials.items()})
    assert archive_faults(tmp_path / "archive", config, 1) == [
        "archive: (step, sample) (1, 2) not of this run (1 in all)",
        "archive: (step, sample) (1, 2) more than once (1 in all)",
    ]
    assert archive_faults(tmp_path / "archive", config, 2) == [
        "archive: (step, sample) (1, 3) missing (1 in all)",
        "archive: (step, sample) (1, 2) more than once (1 in all)",
    ]
    for first, steps in ((0, (0, 1, 2)), (2, (2, 3, 5))):
        board = TensorBoard(tmp_path / "tensorboard", first)
        for step in steps:
            board.scalars(step, {"reward/trained": 0.5})
        board.close()
    assert tensorboard_faults(tmp_path / "tensorboard", 4) == ["TensorBoard: step 5 not of this run (1 in all)"]
    assert tensorboard_faults(tmp_path / "tensorboard", 6) == ["TensorBoard: step 4 missing (1 in all)"]
    assert starts(tmp_path) == 2


def test_a_clock_that_goes_back_between_two_starts_costs_tensorboard_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for folder, elsewhere in ((tmp_path / "folder", ()), (tmp_path / "store", ["tensorboard/"])):
        for first, seconds in ((0, 0), (3, -3600), (6, -7200)):
            monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds)
            there = [f"{each}{path.name}" for each in elsewhere for path in folder.glob("*")]
            board = TensorBoard(folder, first, there)
            for step in range(first, first + 4):
                board.scalars(step, {"reward/trained": float(first)})
            board.close()
        assert tensorboard_faults(folder, 10) == []


# ------------------------------------------------------------------------------- splits of the work


@pytest.mark.parametrize(
    ("before", "now", "carried"),
    [
        ("workers=2 zero_stage=2", "workers=2 zero_stage=2", "all"),
        ("workers=2 zero_stage=0", "workers=1 zero_stage=0", "all"),
        ("workers=1 zero_stage=0", "workers=4 zero_stage=0 micro_batch=1", "all"),
        ("workers=2 zero_stage=2", "workers=2 zero_stage=2 micro_batch=1", "all"),
        ("workers=2 zero_stage=2", "workers=1 zero_stage=2", None),
        ("workers=2 zero_stage=0", "workers=2 zero_stage=1", None),
        ("workers=2 zero_stage=2", "workers=1 zero_stage=2 resume=weights", "weights"),
        ("workers=2 zero_stage=3", "workers=1 zero_stage=0 resume=weights", "weights"),
        ("workers=2 zero_stage=2", "workers=2 zero_stage=2 resume=weights", "all"),
    ],
)
def test_what_carries_over(before: str, now: str, carried: str | None) -> None:
    then, here = (load_config("toy", [f"train.{each}" for each in text.split()]) for text in (before, now))
    assert carries_over(then, here, has_checkpoint=False) == "all"
    if carried is None:
        with pytest.raises(ValueError, match=r"set train.workers=2 train.zero_stage=\d, or train.resume=weights"):
            carries_over(then, here)
        return
    assert carries_over(then, here) == carried
    said = notice(then, here, 8)
    assert (said is not None) == (carried == "weights" or then.train.workers != here.train.workers)
    assert carried == "all" or re.match("WARNING: .*step 8 .*train.resume=weights", str(said))


def test_another_run_is_refused_whatever_is_chosen(tmp_path: Path) -> None:
    before = load_config("toy", ["train.workers=2", "train.zero_stage=2"])
    now = load_config("toy", ["train.workers=1", "train.zero_stage=0", "train.resume=weights", "seed=5"])
    with pytest.raises(ValueError, match=r"another config \(.*seed: 0 -> 5"):
        carries_over(before, now)
    with pytest.raises(ValueError, match=r"run 'toy' exists in .* with another config .*choose another name"):
        check_resume(tmp_path, before, now)


# --------------------------------------------------------------------------------------- preemption


def test_a_node_that_is_announced_to_leave_brings_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's part alone; what Ray Train would tell is given."""
    worker = Worker.__new__(Worker)
    worker._watched, worker._leaving = True, set()
    told = iter([None, ["a"], ["a"], ["a", "b"], ["a", "b"]])

    def info() -> Any:
        nodes = next(told)
        return None if nodes is None else SimpleNamespace(preempted_node_ids=nodes)

    monkeypatch.setattr(worker_module.ray.train, "get_preemption_info", info)
    assert [worker.preempted() for _ in range(5)] == [False, True, False, True, False]
    worker._watched = False
    assert not worker.preempted()  # and Ray Train is not asked, for that is a barrier
