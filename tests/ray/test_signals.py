"""A run that a signal ends, or its own reward: what is kept, what is said, who is left behind."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import HANG, started
from rich.console import Console
from runs import config, settings

from rlvid.runs.checkpoints import find_checkpoints
from rlvid.train.audit import archive_faults
from rlvid.train.launch import train

REWARD = """
import os, signal, time
calls = 0
def score(frames, prompts):
    global calls
    calls += 1
    print("call", calls)
    if calls == 3:
        END
    return frames.mean((2, 3, 4))
"""


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


def test_a_signal_ends_training_after_a_checkpoint_and_leaves_nobody_behind(folder: Path) -> None:
    mark = f"RLVID_TEST_{os.getpid()}"
    long = ("train.steps=100000", "output.checkpoint_every=50000", "train.workers=2")
    given = settings(folder, "interrupted-run", *long)
    command = ["env", "--default-signal=INT", sys.executable, "-m", "rlvid", "train", "toy", *given]
    run = folder / "runs" / "interrupted-run"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {mark: "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(command, env=environment, start_new_session=True, **pipes) as process:
        deadline = time.monotonic() + HANG
        while len(list(run.glob("archive/step-*.parquet"))) < 4 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=HANG)
    assert process.returncode == 130, out + error
    (line,) = error.splitlines()
    (found,) = find_checkpoints(run)
    assert f"interrupted (Ctrl-C): run interrupted-run stands after step {found.step}, in {run}; continue: " in line
    assert f"python -m rlvid train toy name=interrupted-run model.path={folder}/tiny" in line
    assert archive_faults(run / "archive", config(folder, "interrupted-run", *long), found.step) == []
    deadline = time.monotonic() + 60
    while left := processes_with(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("end", "settled", "words", "logged"),
    [
        ("time.sleep(99)", "reward.timeout=3", "worker 0, step 1: the reward mine.py:score gave no answer", "mine.py"),
        ("os.kill(os.getpid(), 9)", "seed=1", r"worker 0, after step 1: its process died", "its process died"),
        ("return frames[0]", "seed=1", r"worker 0, step 1: the reward mine.py:score gave scores of shape", "Traceback"),
    ],
)  # fmt: skip
def test_what_ended_a_worker_is_named_with_its_step_and_its_log(
    folder: Path, ray_cluster: Any, tmp_path: Path, end: str, settled: str, words: str, logged: str
) -> None:
    (tmp_path / "mine.py").write_text(REWARD.replace("END", end))
    own = ("reward.name=custom", f"reward.path={tmp_path}/mine.py:score", "reward.held_out=null")
    own = (*own, "train.workers=1", "train.micro_batch=2")
    run = config(folder, f"ended-{tmp_path.name}", *own, settled, "train.max_failures=0")
    said = Console(file=io.StringIO(), width=500)
    with pytest.raises(
        RuntimeError, match=rf"^training stopped: {words}.* \(full log: .*worker-00.log; start the same"
    ):
        train(run, said)
    at_once = words in said.file.getvalue()
    assert at_once == ("died" not in words)  # a process that is killed says nothing itself
    log = (folder / "runs" / run.name / "logs" / "worker-00.log").read_text()
    assert logged in log
    assert "call 2" in log
