"""Full and slow disks, cut-off files, and what another split of the work may go on from; no Ray."""

import json
import pickle
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import save_run
from ray.exceptions import ActorUnavailableError
from ray.train import ControllerError

from rlvid.algorithms.base import Samples
from rlvid.config import load_config
from rlvid.data import archive
from rlvid.data.archive import ArchiveWriter, read_archive
from rlvid.train import worker as worker_module
from rlvid.train.audit import archive_faults, starts, tensorboard_faults
from rlvid.train.checkpoint import find_checkpoints, is_whole, told_if_unwritable
from rlvid.train.fit import fit_again
from rlvid.train.metrics import TensorBoard
from rlvid.train.record import RECORD, check_resume, latest_checkpoint, mend_record
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


def one_sample(serial: int) -> Samples:
    return Samples(
        [serial], ["a dog"], torch.rand(1, 2, 3, 16, 16), torch.tensor([[0, 3]]), torch.rand(1, 2), torch.rand(1)
    )


def open_archive(folder: Path) -> ArchiveWriter:
    return ArchiveWriter(folder, "run", "instructvideo", "c0ffee", 7, 8.0)


# ------------------------------------------------------------------------------------------ storage


def test_slow_storage_holds_no_step_up_until_pixels_would_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = archive._write_part

    def slowly(path: Path, rows: list[dict[str, Any]]) -> None:
        time.sleep(0.2)
        write(path, rows)

    monkeypatch.setattr(archive, "_write_part", slowly)
    with open_archive(tmp_path) as writer:
        began = time.perf_counter()
        for step in range(5):
            writer.write(step, 0, one_sample(step))
        assert time.perf_counter() - began < 0.2  # five parts take a second
        writer.flush()
        assert len(list(tmp_path.glob("step-*.parquet"))) == 5
        assert "slower than training" not in caplog.text
        monkeypatch.setattr(archive, "_WAITING_BYTES", 1)
        began = time.perf_counter()
        for step in range(5, 8):
            writer.write(step, 0, one_sample(step))
        assert time.perf_counter() - began > 0.35  # the third was taken when the first two had been written
        assert caplog.text.count("slower than training") == 1
    assert read_archive(tmp_path, ["step"])["step"].to_pylist() == list(range(8))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's thread, on its way out
def test_tensorboard_says_what_it_could_not_write(tmp_path: Path, no_room: None) -> None:
    board = TensorBoard(tmp_path / "tensorboard", 0)
    board.scalars(0, {f"a/rather/long/name/{index}": 0.5 for index in range(100)})
    with pytest.raises(OSError, match=r"TensorBoard events in .*tensorboard could not be written \(File too large\)"):
        board.flush()
    board._writer._async_writer._worker.join()  # its last words belong to this test


@pytest.mark.usefixtures("no_room")
def test_a_checkpoint_that_does_not_fit_is_named_whichever_library_writes_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensor, ways = torch.zeros(1000), {"a.pt": torch.save, "a.txt": lambda _, path: path.write_text("a" * 2000)}
    ways["a.safetensors"] = lambda each, path: save_file({"weight": each}, path)
    for name, save in ways.items():
        with (
            pytest.raises(OSError, match=r"checkpoint after step 7 could not be written .*make room in .*are whole"),
            told_if_unwritable(7, tmp_path),
        ):
            save(tensor, tmp_path / name)
    with pytest.raises(RuntimeError, match="a shape"), told_if_unwritable(7, tmp_path):
        raise RuntimeError("a shape")


def test_a_cut_off_checkpoint_is_none(tmp_path: Path) -> None:
    run, config = save_run(tmp_path, step=2)
    save_run(tmp_path, step=4)
    assert [found.step for found in find_checkpoints(run)] == [2, 4]
    assert latest_checkpoint(run) == (config, 4)
    adapter = run / "step-000004" / "adapter" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1])
    assert not is_whole(run / "step-000004")
    assert [found.step for found in find_checkpoints(run)] == [2]
    assert not is_whole(run / "step-000004", resumable=False)
    adapter.write_bytes(whole)
    engine = next(p for p in (run / "step-000004" / "engine").rglob("*") if p.is_file())
    engine.unlink()
    assert [found.step for found in find_checkpoints(run)] == [2]
    assert [found.step for found in find_checkpoints(run, resumable=False)] == [2, 4], "evaluation needs weights alone"
    state = run / "step-000004" / "state.json"
    state.write_text(state.read_text()[:50])
    assert latest_checkpoint(run) == (config, 2)


def test_a_record_that_is_cut_off_is_made_anew_and_others_are_left_alone(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path, step=2)
    save_run(tmp_path, step=4)
    assert not mend_record(run)
    assert not (run / RECORD).exists()
    for left in ("", '{"ray_version": "2.6'):
        (run / RECORD).write_text(left)
        assert mend_record(run)
        record = json.loads((run / RECORD).read_text())
        assert [each["checkpoint_dir_name"] for each in record["checkpoint_results"]] == ["step-000002", "step-000004"]
        assert record["latest_checkpoint_result"]["metrics"] == {"step": 4}
        assert not mend_record(run)


# -------------------------------------------------------------------------------------------- audit


def test_the_audit_finds_what_is_missing_and_what_is_there_twice(tmp_path: Path) -> None:
    config = load_config("toy", ["train.batch_size=2", "train.workers=1"])
    with open_archive(tmp_path / "archive") as writer:
        for step, rank, serial in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 2)):
            writer.write(step, rank, one_sample(serial))
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
        time.sleep(1.1)  # readers order the files by the second of their start
    assert tensorboard_faults(tmp_path / "tensorboard", 4) == ["TensorBoard: step 5 not of this run (1 in all)"]
    assert tensorboard_faults(tmp_path / "tensorboard", 6) == ["TensorBoard: step 4 missing (1 in all)"]
    assert starts(tmp_path) == 2


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
    assert carries_over(then, here, begun=False) == "all"
    if carried is None:
        with pytest.raises(ValueError, match=r"set train.workers=2 train.zero_stage=\d, or train.resume=weights"):
            carries_over(then, here)
        return
    assert carries_over(then, here) == carried
    said = notice(then, here, 8)
    assert (said is not None) == (carried == "weights" or then.train.workers != here.train.workers)
    assert carried == "all" or str(said).startswith("WARNING: goes on after step 8 from the weights alone")


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
    assert [worker.told_to_leave() for _ in range(5)] == [False, True, False, True, False]
    worker._watched = False
    assert not worker.told_to_leave()  # and Ray Train is not asked, for that is a barrier


def test_a_node_lost_while_workers_start_is_outlived_as_often_as_lost_workers_are() -> None:
    lost = ControllerError(ActorUnavailableError("Socket closed", b"0" * 16))
    lost = pickle.loads(pickle.dumps(lost))  # as it comes from Ray Train's controller
    ends: list[Any] = [lost, lost, "result"]

    def fit() -> Any:
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    assert fit_again(fit, 2) == "result"
    ends = [ActorUnavailableError("the controller is gone", b"0" * 16), "result"]
    assert fit_again(fit, 1) == "result"
    ends = [lost, lost, "result"]
    with pytest.raises(ControllerError, match="Socket closed"):
        fit_again(fit, 1)
    ends = [ControllerError(ValueError("a fault of the program")), "result"]
    with pytest.raises(ControllerError, match="a fault of the program"):
        fit_again(fit, 2)
    assert ends == ["result"]
