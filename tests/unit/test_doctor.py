"""The doctor finds a healthy machine and run in order, and names what is broken on purpose, with the way out."""

import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from archives import add_chunk, make_samples
from helpers import damaged_event, save_run

from rlvid import randomness
from rlvid.algorithms import rollout
from rlvid.cli import main
from rlvid.cluster.token import make_own_token
from rlvid.doctor import cluster, machine, places, selftest
from rlvid.doctor.examination import examination, show
from rlvid.doctor.finding import Finding, examine
from rlvid.doctor.run import check_run
from rlvid.train.metrics import TensorBoard


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def quick(storage: Path) -> list[Finding]:
    return list(examination(str(storage), None, None, quick=True))


def test_a_healthy_machine_has_no_error_and_nothing_is_left_behind(tmp_path: Path) -> None:
    found = quick(tmp_path)
    assert [each.name for each in found if each.status == "error"] == []
    names = [
        "python",
        "packages",
        "accelerator",
        "memory",
        "home",
        "token",
        "temporary folder",
        "storage",
        "gradient",
        "first-step ratio",
        "samples",
    ]
    assert set(names) <= {each.name for each in found}
    assert all(each.way_out for each in found if each.status != "ok")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ broken on purpose


def test_storage_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = only(machine.check_storage(f"{tmp_path}/file/runs"))
    assert found.status == "error"
    assert "/file/runs cannot be written ([errno 20] Not a directory)" in found.found
    assert "output.storage" in found.way_out


def test_a_home_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert only(places.check_home()).status == "ok"
    for home, words in (("/proc/nohome", "/proc/nohome cannot be written"), ("relative", "no absolute path")):
        monkeypatch.setenv("HOME", home)
        found = only(places.check_home())
        assert (found.status, words in found.found) == ("warning", True), found


def test_a_token_that_others_can_read_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert only(places.check_token()).found.startswith("none yet")
    make_own_token()
    file = tmp_path / ".ray" / "auth_token"
    assert only(places.check_token()).found == f"{file}, mode 0600"
    file.chmod(0o644)
    found = only(places.check_token())
    assert (found.status, found.way_out) == ("warning", f"chmod 600 {file}")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    assert only(places.check_token()).status == "error"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 40)
    assert only(places.check_token()).found == "in RAY_AUTH_TOKEN"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert only(places.check_token()).status == "warning"


def test_a_temporary_folder_that_ray_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/" + "long" * 30)
    assert "too long for a socket" in only(places.check_temporary()).found
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    assert only(places.check_temporary()).status == "error"
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert only(places.check_temporary()).found.startswith("/tmp, ")
    monkeypatch.setattr(places, "_FULL", 0.0)
    assert only(places.check_temporary()).status == "warning"


def test_storage_behind_a_uri_is_written_and_not_taken_for_a_folder_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = f"file://{tmp_path}/store"
    assert only(machine.check_storage(store)).found == f"{store} can be written"
    assert list((tmp_path / "store").iterdir()) == []
    found = only(machine.check_storage("nowhere://bucket/runs"))
    assert found.status == "error"
    assert "nowhere://bucket/runs cannot be written" in found.found
    seen: list[object] = []
    monkeypatch.setattr("rlvid.doctor.examination.examination", lambda *asked: seen.extend(asked) or iter(()))
    monkeypatch.setattr(sys, "argv", ["rlvid", "doctor", "--storage", "s3://b/x"])
    with pytest.raises(SystemExit):
        main()
    assert seen == ["s3://b/x", None, None, False, None]
    with machine.scratch(store) as (place, kept, root):
        kept.open_output_stream(f"{root}/driver").close()
        told = cluster.probe(place, "node")
        assert (told["seen"], told["trouble"]) == (True, "")
        assert (tmp_path / "store" / Path(root).name / "node").read_text() == "node"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_wrong_or_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "2.59.0" if name == "ray" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = next(machine.check_packages())
    assert found.status == "error"
    assert "ray 2.59.0 (needs <2.61,>=2.60)" in found.found
    assert "peft is missing (needs <0.22,>=0.21)" in found.found
    assert "constraints.txt" in found.way_out


def test_a_version_within_bounds_that_was_not_tested_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "14.99" if name == "rich" else real(name))
    found = [each for each in machine.check_packages() if each.status == "warning"]
    assert "rich 14.99 (tested " in found[0].found


def test_an_unsupported_python_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.9.1")
    found = only(machine.check_python())
    assert found.status == "error"
    assert "3.9.1 (allowed >=3.11,<3.13)" in found.found


def test_a_first_step_that_is_not_on_policy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rollout.log_probability
    calls: list[int] = []

    def drifting(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return real(*arguments) + 0.01 * len(calls)

    monkeypatch.setattr(rollout, "log_probability", drifting)
    found = only(selftest.check_first_ratio())
    assert found.status == "error"
    assert "|ratio - 1|" in found.found


def test_samples_that_share_noise_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "normal", lambda shape, *_: torch.ones((len(_[-1]), *shape)))
    found = only(selftest.check_samples())
    assert found.status == "error"
    assert "1 of 64 samples differ" in found.found


def test_a_check_that_breaks_is_an_error_and_not_a_traceback() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("a", "ok", "fine")
        raise KeyError("first line\nlast line")

    assert [each.found for each in examine("a", broken, "mend it")] == ["fine", r"KeyError: 'first line\nlast line'"]


# ------------------------------------------------------------------------------------------------------- cluster


def workers(spoil: Callable[[list[dict[str, Any]]], None] = lambda found: None) -> list[Finding]:
    """The comparison of two workers that computed what one does, spoilt or not."""
    one, _, state = selftest.reference_step("instructvideo")
    half = [{s: d for s, d in one["noise"].items() if s % 2 == rank} for rank in (0, 1)]
    found = [{**one, "noise": each, "state": {n: t.tolist() for n, t in state.items()}} for each in half]
    spoil(found)
    return list(cluster.compare_workers(found))


def test_workers_that_agree_with_one_process_are_fine() -> None:
    assert [each.status for each in workers()] == ["ok", "ok"]


def test_workers_that_do_not_average_their_gradients_are_an_error() -> None:
    def spoil(found: list[dict[str, Any]]) -> None:
        found[1]["norm"] *= 1.5

    gradient, samples = workers(spoil)
    assert (gradient.status, samples.status) == ("error", "ok")
    assert "norm differs by 5.0e-01" in gradient.found


def test_a_worker_whose_weights_are_its_own_is_an_error() -> None:
    _, start, _ = selftest.reference_step("instructvideo")

    def spoil(found: list[dict[str, Any]]) -> None:
        found[1]["state"] = {name: tensor.tolist() for name, tensor in start.items()}  # it never stepped

    assert workers(spoil)[0].status == "error"


def test_workers_with_the_same_noise_are_an_error() -> None:
    def spoil(found: list[dict[str, Any]]) -> None:
        found[1]["noise"] = dict.fromkeys(found[1]["noise"], "same")

    assert workers(spoil)[1].status == "error"


def answer(**changes: Any) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in cluster._ALIKE} | {"python": machine.platform.python_version()}
    return {"host": "b", "seen": True, "trouble": "", "versions": versions, "free": 2**34} | changes


def test_nodes_with_other_versions_or_storage_of_their_own_are_named(tmp_path: Path) -> None:
    alike, seen = {"n1": answer(host="a")}, {"n1"}
    assert only(cluster.versions_alike(alike)).status == "ok"
    assert only(cluster.storage_shared(alike, seen, str(tmp_path))).status == "ok"
    other = alike | {"n2": answer(versions=answer()["versions"] | {"torch": "1.0"})}
    found = only(cluster.versions_alike(other))
    assert found.status == "error"
    assert "b: torch 1.0, here " in found.found
    for changes, words in (({"seen": False}, "b has another folder"), ({"trouble": "Read-only"}, "b cannot write")):
        found = only(cluster.storage_shared(alike | {"n2": answer(**changes)}, {"n1", "n2"}, tmp_path))
        assert found.status == "error"
        assert words in found.found
    assert only(cluster.storage_shared(alike, set(), tmp_path)).status == "error", (
        "it wrote, and the driver sees nothing"
    )


def test_a_cluster_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rlvid.cluster import connect

    def unreachable(address: str | None) -> None:
        raise ValueError(f"no Ray cluster answers at {address!r}")

    monkeypatch.setattr(connect, "start_ray", unreachable)
    found = only(cluster.check_cluster("nowhere:6379", tmp_path))
    assert (found.name, found.status) == ("ray", "error")
    assert "nowhere:6379" in found.found


# ------------------------------------------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with checkpoint, archive and TensorBoard."""
    run, _ = save_run(tmp_path_factory.mktemp("examined"))
    for step in range(3):
        add_chunk(run, {(step, 0): make_samples(2 * step)})
    shutil.rmtree(run / "archive" / ".staging")
    board = TensorBoard(run / "tensorboard", 0)
    for step in range(3):
        board.scalars(step, {"reward/trained": 0.5, "policy/first_ratio_error": 1e-7})
    board.close()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def by_name(run: Path) -> dict[str, Finding]:
    return {each.name: each for each in check_run(run)}


def test_a_healthy_run_is_in_order(run: Path) -> None:
    found = by_name(run)
    assert {each.status for each in found.values()} == {"ok"}, found
    assert found["archive"].found == "6 samples of 3 steps in 3 parts"
    assert "2 scalars of 3 steps" in found["tensorboard"].found


def test_a_damaged_part_of_the_archive_is_named(run: Path) -> None:
    part = run / "archive" / "step-000001-to-000001-part-00.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    found = by_name(run)
    assert found["archive"].status == "error"
    assert "step-000001-to-000001-part-00.parquet" in found["archive"].found
    assert found["tensorboard"].status == "ok"


def test_a_part_that_is_missing_or_there_twice_is_a_warning(run: Path) -> None:
    (run / "archive" / "step-000001-to-000001-part-00.parquet").unlink()
    shutil.copy(
        run / "archive" / "step-000002-to-000002-part-00.parquet",
        run / "archive" / "step-000002-to-000002-part-01.parquet",
    )
    found = by_name(run)["archive"]
    assert found.status == "warning"
    assert found.found == "2 samples twice, 1 steps missing (the first: 1)"


def test_a_damaged_checkpoint_and_damaged_events_are_errors(run: Path) -> None:
    weights = run / "step-000003" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for file in (run / "tensorboard").iterdir():
        file.write_bytes(b"\0" * 100)
    found = by_name(run)
    assert "step-000003 (adapter/adapter_model.safetensors has " in found["checkpoints"].found
    assert "start the same `rlvid train` again" in found["checkpoints"].way_out
    assert "delete" not in found["checkpoints"].way_out
    assert found["tensorboard"].status == "error"
    assert all(each.way_out for each in found.values() if each.status == "error")


def test_a_bad_record_of_events_is_named_with_its_file_and_costs_no_other_finding(run: Path) -> None:
    good, bad = sorted((run / "tensorboard").iterdir())[0], run / "tensorboard" / "events.out.tfevents.9.bad"
    bad.write_bytes(good.read_bytes() + damaged_event())
    found = by_name(run)
    assert found["tensorboard"].status == "error"
    assert found["tensorboard"].found.startswith(f"{bad} is damaged (")
    assert found["checkpoints"].status == found["archive"].status == "ok"


def test_checkpoints_of_other_workers_are_the_run_s_and_those_of_another_run_are_not_to_be_deleted(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"train": config["train"] | {"workers": 2}}))
    assert by_name(run)["checkpoints"].status == "ok"
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 5}))
    found = by_name(run)["checkpoints"]
    assert found.found == "step-000003 is of another config (seed: 0 -> 5)"
    assert "delete" not in found.way_out


def test_a_ratio_off_one_in_a_run_is_a_warning(run: Path) -> None:
    board = TensorBoard(run / "tensorboard", 0)
    for step in range(3):
        board.scalars(step, {"reward/trained": 0.5, "policy/first_ratio_error": 0.1})
    board.close()
    assert by_name(run)["first-step ratio"].status == "warning"


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    assert only(check_run(tmp_path)).status == "error"
    (tmp_path / "config.yaml").write_text("train: {stepz: 1}")
    assert "unknown key train.stepz" in only(check_run(tmp_path)).found


@pytest.mark.parametrize(("harm", "code"), [(False, None), (True, 1)])
def test_the_exit_code_says_whether_there_is_an_error(
    run: Path, harm: bool, code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if harm:
        next((run / "archive").iterdir()).write_bytes(b"no parquet")
    monkeypatch.setattr(sys, "argv", ["rlvid", "doctor", "--run", str(run)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code or None) == code
    assert capsys.readouterr().out.count("way out:") == int(harm)


def test_what_was_found_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(iter([Finding("a", "error", "[bold] brackets", "way [out]"), Finding("b", "ok", "fine")])) == 1
    out = capsys.readouterr().out
    assert "[bold] brackets" in out
    assert "way [out]" in out
    assert "1 ok, 0 warnings, 1 errors" in out
