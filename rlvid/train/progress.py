"""Shows how far a run is: worker 0 reports to a small Ray actor, the driver asks it and shows one line."""

import threading
import time
from types import TracebackType
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


@ray.remote(num_cpus=0, max_restarts=-1)  # its node may be lost
class ProgressActor:
    """Holds the progress of a run: its latest step, notes for the console, and rewards that are waited for."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._notes: list[str] = []
        self._asked: dict[int, tuple[str, str, float, float]] = {}
        self._overdue: dict[int, str] = {}
        self._ending, self._starts = False, 0

    def start(self, step: int) -> None:
        """Notes that the workers begin, or begin again, after ``step``."""
        self._starts += 1
        self._asked, self._overdue = {}, {}
        if self._starts > 1:
            self.note(f"the workers were started again and go on after step {step}")

    def put(self, latest: dict[str, Any]) -> None:
        """Replaces the numbers of the latest step."""
        self._latest = latest

    def note(self, line: str) -> None:
        """Keeps a line for the console; the same one only once in a row."""
        if self._notes[-1:] != [line]:
            self._notes.append(line)

    def ask(self, rank: int, where: str, reward: str, timeout: float) -> None:
        """Notes that a worker waits for a reward from now on."""
        self._asked[rank] = (where, reward, timeout, time.monotonic())

    def answered(self, rank: int) -> None:
        """Notes that it has its answer."""
        self._asked.pop(rank, None)

    def end(self) -> bool:
        """Asks the workers to end after the step under way, with a checkpoint; whether they have made a step."""
        self._ending = True
        return bool(self._latest)

    def ending(self) -> bool:
        """Whether they were asked to end."""
        return self._ending

    def get(self, seen: int = 0) -> tuple[dict[str, Any], list[str]]:
        """The numbers of the latest step, empty before the first one, and the notes but for the first ``seen``."""
        for rank, (where, reward, timeout, since) in self._asked.items():
            if rank not in self._overdue and time.monotonic() - since >= timeout:
                self._overdue[rank] = f"{where}: the reward {reward} gave no answer for {timeout:g} s (reward.timeout)"
                self.note(self._overdue[rank])
        return self._latest, self._notes[seen:]

    def overdue(self) -> dict[int, str]:
        """Messages about rewards that exceeded reward.timeout, by worker."""
        return self._overdue


class ProgressLine:
    """Shows a run's progress while its block runs: a live line on a terminal, one line now and then elsewhere."""

    def __init__(self, actor: Any, steps: int, console: Console) -> None:
        self._actor, self._steps, self._console, self._seen = actor, steps, console, 0
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
                        bar.update(task, completed=latest["step"], description=_describe(latest))
            return
        shown, due, ended = 0, 0.0, False
        while not ended:
            ended = self._stop.wait(0.5)  # then once more: the last step may be younger than the last look
            latest = self._ask()
            if not latest or latest["step"] == shown:
                continue
            if latest["elapsed"] >= due or ended or latest["step"] == self._steps:
                shown, due = latest["step"], latest["elapsed"] + 10
                self._console.print(
                    f"step {shown}/{self._steps}  {_describe(latest)}  {_eta(latest['eta'])} to go", highlight=False
                )

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
