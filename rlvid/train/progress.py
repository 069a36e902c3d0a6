"""How far a run is: worker 0 tells a small Ray actor, the driver asks it and shows one line."""

import threading
from types import TracebackType
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


@ray.remote(num_cpus=0, max_restarts=-1)  # its node may be lost
class Board:
    """Holds the latest news of a run."""

    def __init__(self) -> None:
        self._news: dict[str, Any] = {}

    def put(self, news: dict[str, Any]) -> None:
        """Replaces the news."""
        self._news = news

    def get(self) -> dict[str, Any]:
        """The latest news, empty before the first step."""
        return self._news


class ProgressLine:
    """Shows a board's news while its block runs: a live line on a terminal, one line now and then elsewhere."""

    def __init__(self, board: Any, steps: int, console: Console) -> None:
        self._board, self._steps, self._console = board, steps, console
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
                    if news := self._ask():
                        bar.update(task, completed=news["step"], description=_describe(news))
            return
        shown, due, ended = 0, 0.0, False
        while not ended:
            ended = self._stop.wait(0.5)  # then once more: the last step may be younger than the last look
            news = self._ask()
            if news and news["step"] != shown and (news["elapsed"] >= due or ended or news["step"] == self._steps):
                shown, due = news["step"], news["elapsed"] + 10
                self._console.print(
                    f"step {shown}/{self._steps}  {_describe(news)}  {_eta(news['eta'])} to go", highlight=False
                )

    def _ask(self) -> dict[str, Any]:
        try:
            return ray.get(self._board.get.remote(), timeout=2)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            return {}


def _describe(news: dict[str, Any]) -> str:
    held_out = f"  held-out {news['held_out']:.4f}" if "held_out" in news else ""
    return f"reward {news['reward']:.4f}{held_out}  {news['seconds']:.2f} s/step"


def _eta(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
