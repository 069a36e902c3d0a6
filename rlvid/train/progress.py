"""The progress of a run: worker 0 reports to a small Ray actor; the driver reads it and shows one line."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


@ray.remote(num_cpus=0, max_restarts=-1)  # restarts if its node is lost
class ProgressActor:
    """Holds the progress of a run: its latest step, notes for the console, and reward calls that are running."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._notes: list[str] = []
        self._kinds = set[str]()
        self._reward_calls: dict[int, tuple[str, str, float, float]] = {}
        self._overdue: dict[int, str] = {}
        self._end_requested, self._starts = False, 0

    def start(self, step: int) -> None:
        """Notes that the workers start, or restart, after ``step``."""
        self._starts += 1
        self._reward_calls, self._overdue = {}, {}
        if self._starts > 1:
            self.note(f"the workers were restarted and continue after step {step}")

    def put(self, latest: dict[str, Any]) -> None:
        """Replaces the numbers of the latest step."""
        self._latest = latest

    def note(self, line: str, kind: str | None = None) -> None:
        """Keeps a line for the console, unless it repeats the last one or one of its kind is there already."""
        if self._notes[-1:] != [line] and kind not in self._kinds:
            self._notes.append(line)
        if kind is not None:
            self._kinds.add(kind)

    def reward_started(self, rank: int, where: str, reward: str, timeout: float) -> None:
        """Notes that a worker has called a reward."""
        self._reward_calls[rank] = (where, reward, timeout, time.monotonic())

    def reward_ended(self, rank: int) -> None:
        """Notes that the reward of a worker has returned."""
        self._reward_calls.pop(rank, None)

    def request_end(self) -> bool:
        """Asks the workers to end after the current step, with a checkpoint; returns whether a step was finished."""
        self._end_requested = True
        return bool(self._latest)

    def end_requested(self) -> bool:
        """Returns whether the workers should end."""
        return self._end_requested

    def get(self, seen: int = 0) -> tuple[dict[str, Any], list[str]]:
        """Returns the numbers of the latest step, empty before the first one, and the notes from ``seen`` on."""
        for rank, (where, reward, timeout, since) in self._reward_calls.items():
            if rank not in self._overdue and time.monotonic() - since >= timeout:
                self._overdue[rank] = f"{where}: the reward {reward} gave no answer for {timeout:g} s (reward.timeout)"
                self.note(self._overdue[rank])
        return self._latest, self._notes[seen:]

    def overdue(self) -> dict[int, str]:
        """Returns messages about reward calls that exceeded reward.timeout, by worker.

        A worker that was killed during a call is among them once the limit has passed: see ``rlvid.train.fit``.
        """
        return self._overdue


def end_requested(actor: Any) -> bool:
    """Returns whether an interrupted driver asks for a checkpoint and the end; actor: a ``ProgressActor``."""
    try:
        return bool(ray.get(actor.end_requested.remote(), timeout=1))
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):  # its node is lost, or slow
        return False


class ProgressLine:
    """Shows a run's progress while the block runs: a live line on a terminal, elsewhere a line every ten seconds.

    Args:
        actor: the ``ProgressActor``.
        steps: of the run.
        console: where the line is shown.
        describe: the numbers of the latest step -> words; default: those of training.
    """

    def __init__(
        self, actor: Any, steps: int, console: Console, describe: Callable[[dict[str, Any]], str] | None = None
    ) -> None:
        self._actor, self._steps, self._console, self._seen = actor, steps, console, 0
        self._describe = describe or _describe
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "ProgressLine":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        if self._console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(24),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as bar:
                task = bar.add_task("starting workers", total=self._steps)
                while not self._stop.wait(0.5):
                    if latest := self._ask():
                        bar.update(task, completed=latest["step"], description=self._describe(latest))
            return
        shown, due, ended = 0, 0.0, False
        while not ended:
            ended = self._stop.wait(0.5)  # then once more: the last step may be newer than the last reading
            latest = self._ask()
            if not latest or latest["step"] == shown:
                continue
            if latest["elapsed"] >= due or ended or latest["step"] == self._steps:
                shown, due = latest["step"], latest["elapsed"] + 10
                words = f"{self._describe(latest)}  {_eta(latest['eta'])} to go"
                self._console.print(f"step {shown}/{self._steps}  {words}", highlight=False)

    def _ask(self) -> dict[str, Any]:
        try:
            latest, notes = ray.get(self._actor.get.remote(self._seen), timeout=2)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            return {}
        self._seen += len(notes)
        for note in notes:
            self._console.print(note, markup=False, highlight=False, soft_wrap=True)
        return dict(latest)


def _describe(latest: dict[str, Any]) -> str:
    held_out = f"  held-out {latest['held_out']:.4f}" if "held_out" in latest else ""
    return f"reward {latest['reward']:.4f}{held_out}  {latest['seconds']:.2f} s/step"


def _eta(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
