"""What a worker says of itself: to the driver, by the run's progress actor, and in its own log, with the traceback."""

import faulthandler
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlvid.algorithms.base import Observer
from rlvid.faults import describe

log = logging.getLogger("rlvid.train")


class WorkerError(RuntimeError):
    """What ended a worker, in one line.

    Args:
        text: the line.
        secondary: whether the worker only lost the others, so that the cause is theirs.
    """

    def __init__(self, text: str, secondary: bool = False) -> None:
        super().__init__(text)
        self.text, self.secondary = text, secondary

    def __reduce__(self) -> Any:
        return WorkerError, (self.text, self.secondary)


class Reporter(Observer):
    """A worker's voice: each line names the worker and its step.

    Args:
        rank: the worker's.
        progress: the run's ``rlvid.train.progress.ProgressActor``.
        timeout: seconds that a reward may take for one call; 0 or None: as long as it likes.
    """

    def __init__(self, rank: int, progress: Any, timeout: float | None = None) -> None:
        self.rank, self.progress, self.timeout = rank, progress, timeout
        self.step: int | None = None
        self.latest: str | None = None
        self._file: Any = None
        self._told = set[str]()

    @property
    def where(self) -> str:
        """Which worker, and its step."""
        return f"worker {self.rank}, " + ("before its first step" if self.step is None else f"step {self.step}")

    def tell(self, line: str) -> None:
        """Says on the driver's console what went wrong with a reward; the first line of each kind alone."""
        self.latest = line
        log.warning("step %s: %s", self.step, line)
        kind = re.sub(r"\d+", "", line)
        if kind not in self._told:
            self._told.add(kind)
            self.progress.note.remote(f"{self.where}: {line}")

    @contextmanager
    def asking(self, reward: str) -> Iterator[None]:
        """While a reward works: after ``timeout`` seconds the process ends, with its stacks in its log.

        The limit is kept by a thread of C code, which needs neither Python nor the device: the reward may hold both.
        The driver, which is told when the call begins, says what it was.
        """
        if not self.timeout:
            yield
            return
        self.progress.ask.remote(self.rank, self.where, reward, self.timeout)
        file: Any = self._file or sys.__stderr__
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.progress.answered.remote(self.rank)

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """Turns an error of the block into one line for the driver; the traceback goes into the worker's log."""
        try:
            yield
        except Exception as error:  # any: it is raised again, and only this process can log its traceback
            log.exception("%s: this ends the worker", self.where)
            text = f"{self.where}: {describe(error)}"
            secondary = _lost_others(error)
            if not secondary:
                self.progress.note.remote(text)
            raise WorkerError(text, secondary) from error

    def log_to(self, path: Path) -> None:
        """Sends logging, warnings and what is printed into the worker's log."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logging.getLogger().addHandler(handler)
        logging.getLogger("rlvid").setLevel(logging.INFO)
        logging.captureWarnings(True)
        self._file = handler.stream
        sys.stdout = _Printed()


class _Printed:
    """Stands in for stdout: each line that is printed becomes one of the log."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            logging.getLogger("rlvid.printed").info(line)
        return len(text)

    def flush(self) -> None:
        """Lines are written when they end."""

    def isatty(self) -> bool:
        return False


def _lost_others(error: BaseException) -> bool:
    """Whether an error came from a collective, where one worker's end shows in all others."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and any("/torch/distributed/" in frame.filename for frame in frames)
