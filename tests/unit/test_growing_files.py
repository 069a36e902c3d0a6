"""Logs and events of a run in an object store: what pushes cost, and what a kill at any moment leaves."""

import logging
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlvid.storage import PART, Mirror, run_mirror, worker_mirror
from rlvid.train.audit import starts, tensorboard_faults
from rlvid.train.metrics import TensorBoard
from rlvid.train.reporter import Reporter, newest_part

LOG = "logs/worker-00.log"
STEPS, EVERY = 12, 3


@pytest.fixture(autouse=True)
def own_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a worker's goes into its log
    level = logging.getLogger("rlvid").level
    yield
    logging.getLogger("rlvid").setLevel(level)
    logging.captureWarnings(False)


class Start:
    """One start of a worker: its growing files, and the pushes of its checkpoints.

    Args:
        store: folder of the store.
        folder: of this machine.
        first_step: of the checkpoint that it resumes from.
    """

    def __init__(self, store: Path, folder: Path, first_step: int = 0) -> None:
        self.name, self.first_step = folder.name, first_step
        self.mirror = worker_mirror(f"file://{store}", "mine", Path("/nowhere"), folder)
        log_file = newest_part(LOG, self.mirror.sizes() or ())
        self.mirror.pull(log_file.__eq__)
        before = set(logging.getLogger().handlers)
        self.reporter = Reporter(0, None)
        self.reporter.log_to(self.mirror.folder / log_file)
        (self._handler,) = set(logging.getLogger().handlers) - before
        self.tensorboard = TensorBoard(self.mirror.folder / "tensorboard", first_step, self.mirror.sizes() or ())

    def step(self, step: int, line: str, scalars: int = 1) -> None:
        logging.getLogger("rlvid.train").info("%s %d %s", self.name, step, line)
        self.tensorboard.scalars(step, {"reward/trained": 0.5} | {f"seconds/{i}": 1.0 for i in range(scalars)})

    def push(self) -> None:
        self.tensorboard.flush()
        self.mirror.turn([self.tensorboard, self.reporter])
        self.mirror.push()

    def end(self) -> None:
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()
        self.tensorboard.close()
        self.mirror.push()


def test_what_pushes_send_grows_with_the_steps_and_not_with_their_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, upload = [0], Mirror._upload

    def counting(mirror: Mirror, name: str) -> None:
        sent[-1] += (mirror.folder / name).stat().st_size
        upload(mirror, name)

    monkeypatch.setattr(Mirror, "_upload", counting)
    start, steps, every = Start(tmp_path / "store", tmp_path / "one"), 4000, 50
    for step in range(steps):
        start.step(step, "x" * 1450, scalars=20)
        if (step + 1) % every == 0:
            start.push()
            sent.append(0)
    start.end()
    quarters = [sum(sent[i : i + 20]) for i in range(0, 80, 20)]
    assert max(quarters) < 1.3 * min(quarters[1:]), "a quarter of the steps costs what each other quarter costs"
    assert max(sent) < 3 * (PART + every * 2500), "of each of two files, what was not sent and a bounded rest"
    assert len(list((tmp_path / "store").rglob("worker-*"))) > 3
    assert re.findall(r"one (\d+) ", log_text(tmp_path / "store" / "mine")) == [str(step) for step in range(steps)]


def test_a_run_in_a_folder_keeps_one_log_and_one_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvid.storage.PART", 1)
    mirror, reporter = worker_mirror(None, "mine", tmp_path / "mine", tmp_path), Reporter(0, None)
    board = TensorBoard(mirror.folder / "tensorboard", 0)
    board.flush()
    mirror.turn([board, reporter])
    assert [path.name for path in (mirror.folder / "tensorboard").iterdir()] == [board.path.name]
    board.close()


def test_a_kill_at_any_upload_costs_no_event_and_no_line_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each upload of a run the store is copied: this is what a run finds that resumes after a kill there."""
    monkeypatch.setattr("rlvid.storage.PART", 300)
    store, kills, upload = tmp_path / "store", list[tuple[Path, int]](), Mirror._upload

    def copying(mirror: Mirror, name: str) -> None:
        upload(mirror, name)
        kills.append((Path(shutil.copytree(store, tmp_path / f"kill-{len(kills)}")), done))

    done = 0
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_upload", copying)
        for done in run(Start(store, tmp_path / "first")):
            kills.append((Path(shutil.copytree(store, tmp_path / f"kill-{len(kills)}")), done))
    ended = 0
    for killed, checkpoint in [*kills, (store, STEPS)]:
        log_before = log_text(killed / "mine")
        event_files = {path.name for path in (killed / "mine" / "tensorboard").glob("*")}
        for _ in run(Start(killed, tmp_path / "again" / killed.name / "second", checkpoint)):
            pass
        found = run_mirror(f"file://{killed}", "mine").folder
        assert tensorboard_faults(found / "tensorboard", STEPS) == [], f"{killed.name}, resumed at {checkpoint}"
        assert picture_steps(found / "tensorboard") == list(range(0, STEPS, 2))
        assert starts(found) == 1 + bool(event_files)
        assert log_text(found).startswith(log_before)
        lines = [(name, int(step)) for name, step in re.findall(r"train (\w+) (\d+) ", log_text(found))]
        first = [step for name, step in lines if name == "first"]
        assert lines == [("first", step) for step in first] + [("second", step) for step in range(checkpoint, STEPS)]
        assert first == list(range(len(first)))
        assert len(first) >= checkpoint
        shutil.rmtree(found)
        ended += len(event_files) > 1
    assert ended > 5, "no kill came after a file had ended"


def run(start: Start) -> Iterator[int]:
    """Takes a start's steps; yields the steps of each checkpoint when it counts."""
    for step in range(start.first_step, STEPS):
        start.step(step, "of the log")
        if step % 2 == 0:
            start.tensorboard.video(step, "videos/a ball", torch.rand(2, 3, 4, 4), 8)
        if (step + 1) % EVERY == 0:
            start.push()
            yield step + 1
    start.end()


def log_text(run: Path) -> str:
    """A worker's log as ``cat worker-00.log*`` prints it."""
    return "".join(path.read_text() for path in sorted((run / "logs").glob("worker-00.log*")))


def picture_steps(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return [event.step for event in events.Images("videos/a ball")]
