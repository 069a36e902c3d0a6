"""A run that a signal ends, or its own reward: what is kept, what is said, who is left behind."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chaos import last_step
from processes import HANG, started
from rich.console import Console
from runs import config, settings

from rlvid.runs.checkpoints import find_checkpoints
from rlvid.train.audit import archive_faults
from rlvid.train.launch import train

REWARD = """
import os, time
from pathlib import Path
calls, before = 0, Path(__file__).with_suffix(".before")
def score(frames, prompts):
    global calls
    calls += 1
    print("call", calls)
    if calls == 3 and before.exists():
        SECOND
    if calls == 3:
        before.touch()
        FIRST
    return frames.mean((2, 3, 4))
"""
"""Ends its process, or the training step, at the third call: FIRST in the first start of the workers, then SECOND."""


def processes_with(mark: str) -> list[int]:
    """Processes that have a variable of this name in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{mark}=1".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # another's, or gone
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)])
def test_a_signal_to_all_ends_training_after_a_checkpoint_and_leaves_nobody_behind(
    number: signal.Signals, name: str, code: int, folder: Path
) -> None:
    mark = f"RLVID_TEST_{os.getpid()}"
    long = ("train.steps=100000", "output.checkpoint_every=50000", "train.workers=1", "train.grace_period=300")
    given = settings(folder, f"interrupted-{code}", *long)
    command = ["env", "--default-signal=INT", sys.executable, "-m", "rlvid", "train", "toy", *given]
    run = folder / "runs" / f"interrupted-{code}"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {mark: "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(command, env=environment, start_new_session=True, **pipes) as process:
        deadline = time.monotonic() + HANG
        while last_step(run) < 4 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, number)
        out, error = process.communicate(timeout=HANG)
    assert process.returncode == code, out + error
    (line,) = error.splitlines()
    (found,) = find_checkpoints(run)
    assert line.startswith(f"interrupted ({name}): run interrupted-{code} ")
    assert f" step {found.step}, in {run}; continue: " in line
    assert f"python -m rlvid train toy name=interrupted-{code} model.path={folder}/tiny" in line
    assert archive_faults(run / "archive", config(folder, f"interrupted-{code}", *long), found.step) == []
    deadline = time.monotonic() + 60
    while left := processes_with(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def end(folder: Path, name: str, first: str, second: str, *settled: str) -> tuple[str, str, str]:
    """Trains with a reward that ends each start of the worker; the error, what was printed before, and the log."""
    mine = folder / f"{name}.py"
    mine.write_text(REWARD.replace("FIRST", first).replace("SECOND", second))
    own = ("reward.name=custom", f"reward.path={mine}:score", "reward.held_out=null", "train.workers=1")
    run, said = config(folder, name, *own, "train.micro_batch=2", *settled), Console(file=io.StringIO(), width=500)
    with pytest.raises(RuntimeError) as error:
        train(run, said)
    log = (folder / "runs" / name / "logs" / "worker-00.log").read_text()
    return str(error.value), said.file.getvalue(), log


ENDED = r"^training stopped: worker 0, {}.* \(full log: .*worker-00.log; start the same"


@pytest.mark.slow
def test_a_reward_that_hangs_and_one_that_gives_no_scores_are_named_with_the_step_and_the_log(
    folder: Path, ray_cluster: Any
) -> None:
    settled = ("reward.timeout=3", "train.max_failures=1")
    error, said, log = end(folder, "hanging", "time.sleep(99)", "return frames[0]", *settled)
    assert "worker 0, step 1: the reward hanging.py:score gave no answer" in said
    assert "worker 0, step 1: the reward hanging.py:score gave scores of shape" in said
    assert re.match(ENDED.format("step 1: the reward hanging.py:score gave scores of shape"), error)
    assert "hanging.py" in log
    assert "Traceback" in log
    assert log.count("call 2") == 2, "a start took another number of calls, or a line is there twice"


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_with_its_step_and_its_log(folder: Path, ray_cluster: Any) -> None:
    error, said, log = end(folder, "killed", "os.kill(os.getpid(), 9)", "pass", "train.max_failures=0")
    assert re.match(ENDED.format("after step 1: its process died"), error)
    assert "died" not in said, "a process that is killed says nothing itself"
    assert "its process died" in log
    assert "call 2" in log
