"""What fills up, breaks or changes between two starts of a run, and what becomes of the run.

Jobs that are stopped are in test_cluster.py, nodes that die in test_chaos.py, drivers in test_sweep.py.
"""

import io
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chaos import last_step
from processes import HANG
from rich.console import Console
from runs import QUIET, adapter, config, difference, plain_torch

from rlvid.data.sources import training_set
from rlvid.runs.guard_log import GuardEvaluation
from rlvid.runs.over_optimisation import HELD_OUT, Loss, Verdict
from rlvid.runs.recommendation import recommend
from rlvid.runs.scalars import read_events
from rlvid.train import guard_folder
from rlvid.train.audit import faults
from rlvid.train.guard_folder import stop_flag
from rlvid.train.launch import train
from rlvid.train.record import RECORD

LONG = ("train.steps=8", "output.checkpoint_every=2", "train.zero_stage=2", "train.workers=1")
GUARD = ("guard.every=4", "guard.count=4", "guard.steps=2")


@pytest.fixture(scope="module")
def watched(folder: Path, ray_cluster: Any) -> tuple[Path, str]:
    """The folder of a run that goes through without an interruption, with a guard; and what it printed."""
    run, said = config(folder, "watched", *LONG, *GUARD, "output.keep_checkpoints=1"), io.StringIO()
    done = train(run, Console(file=said, width=400))
    assert faults(done.folder, run, 8) == []
    return done.folder, said.getvalue()


def looked(run: Path) -> list[dict[str, Any]]:
    """The guard's evaluations."""
    return [json.loads(line) for line in (run / "guard.jsonl").read_text().splitlines()]


def test_name_of_another_run_is_refused(folder: Path, watched: tuple[Path, str]) -> None:
    with pytest.raises(ValueError, match=r"run 'watched' exists .* another config \(optimizer.lr: 1e-05 -> 0.1\)"):
        train(config(folder, "watched", *LONG, *GUARD, "output.keep_checkpoints=1", "optimizer.lr=0.1"), QUIET)


@pytest.mark.slow
def test_a_run_whose_storage_fails_and_whose_newest_checkpoint_is_damaged_ends_with_the_same_adapter(
    folder: Path, watched: tuple[Path, str]
) -> None:
    """A folder is in the way of a part of the archive: the write fails, as it does on a full disk.

    The adapter is the one of the run with a guard: neither the guard nor the interruption changes a bit of it. Workers
    find the wrong bytes; what the driver finds by itself is in the unit tests.
    """
    run = folder / "runs" / "unwritable"
    obstacle = run / "archive" / "step-000006-to-000007-part-00.parquet"

    def obstruct() -> None:
        deadline = time.monotonic() + HANG
        while last_step(run) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        obstacle.mkdir()

    vandal = threading.Thread(target=obstruct)
    vandal.start()
    with pytest.raises(RuntimeError, match=r"training stopped: .*archive part .* could not be written .*earlier parts"):
        train(config(folder, "unwritable", *LONG, "train.max_failures=0"), QUIET)
    vandal.join()
    obstacle.rmdir()
    (file,) = (run / "step-000006" / "engine").rglob("*optim_states.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = Console(file=io.StringIO(), width=500)
    done = train(config(folder, "unwritable", *LONG), said)
    assert re.search(
        r"step-000006 is damaged \(engine/.* other bytes.*the run continues after step 4", said.file.getvalue()
    )
    assert (done.first_step, done.last_step) == (4, 8)
    assert (run / "step-000006.damaged").is_dir()
    assert difference(adapter(run, 8), adapter(watched[0], 8)) == 0
    assert faults(run, config(folder, "unwritable", *LONG), 8) == []
    assert [path.name for path in (run / ".tmp").iterdir()] == [".lock"]


def test_the_guard_looks_once_at_each_checkpoint_and_keeps_the_best(watched: tuple[Path, str]) -> None:
    run, said = watched
    before = looked(run)
    assert [line["step"] for line in before] == [0, 4, 8], "step 4 was deleted by keep_checkpoints and evaluated before"
    assert not (run / "step-000004").exists()
    assert "guard: recommended of steps 0, 4, 8: " in said
    best = json.loads((run / "best" / "best.json").read_text())["step"]
    evaluations = [GuardEvaluation.of(line) for line in before]
    assert best == recommend(evaluations).step
    assert evaluations[0].mean("distance") == pytest.approx(0, abs=1e-6)
    assert (run / "best" / "adapter").is_dir() == (best > 0)
    assert not list((run / "guard").glob("step-*"))
    assert (run / "guard.png").stat().st_size > 10_000


def test_two_workers_go_on_where_one_stood_with_a_record_that_was_cut_off_until_the_guard_ends_the_run(
    folder: Path, watched: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number of workers under ZeRO 2 takes an explicit choice; both must end at the same step."""
    run, before, start = watched[0], looked(watched[0]), adapter(watched[0], 8)
    (run / RECORD).write_text((run / RECORD).read_text()[:100])
    two = (*LONG, *GUARD, "train.workers=2", "train.steps=2000", "guard.stop=true", "output.keep_checkpoints=1000")
    with pytest.raises(ValueError, match=r"state does not fit 2 under stage 2; set train.workers=1 .*resume=weights"):
        train(config(folder, "watched", *two), QUIET)
    loss = Loss(HELD_OUT, 0, 0, 0.5, 0.4, 0.01)  # the next look brings a warning
    warning = Verdict(0, {HELD_OUT: loss}, (loss,))
    monkeypatch.setattr(guard_folder, "judge", lambda found: warning if len(found) > len(before) else Verdict(0))
    said, asked = Console(file=io.StringIO(), width=500), config(folder, "watched", *two, "train.resume=weights")
    stopped = train(asked, said)
    assert re.search(r"WARNING: .*step 8 .*train\.resume=weights", said.file.getvalue())
    assert stopped.first_step == 8
    assert 8 < stopped.last_step < 2000
    assert "guard: over-optimised at step 0" in said.file.getvalue()
    assert "training ends (guard.stop)" in said.file.getvalue()
    assert "over-optimised" in (run / "logs" / "guard.log").read_text()
    assert stop_flag(run).is_file(), "the same command again would go on"
    after = looked(run)
    assert [line["step"] for line in after[:4]] == [0, 4, 8, 12]
    assert after[:3] == before, "a look was made twice"
    held_out = read_events(run / "tensorboard" / "guard", "guard/held_out".__eq__)["guard/held_out"]
    assert [step for step, _ in held_out] == [line["step"] for line in after]

    plain = config(folder, "plain", *LONG, "train.steps=10", "train.micro_batch=4")
    reference, _ = plain_torch(plain, training_set(plain, QUIET), run / "step-000008", first_step=8)
    assert difference(reference, start) > 2e-6
    assert difference(adapter(run, 10), reference) <= 1e-6
    assert faults(run, asked, stopped.last_step) == []
