"""Reports of a worker: lines to the driver through the run's progress actor, and its own log with tracebacks."""

import faulthandler
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlvid.algorithms.base import Observer
from rlvid.faults import describe

log = logging.getLogger("rlvid.train")


def newest_part(log_file: str, there: Iterable[str]) -> str:
    """Returns the part of a log that was written last, of the files that are there; the log itself if none is."""
    parts = (name for name in there if re.fullmatch(re.escape(log_file) + r"\.\d+", name))
    return max(parts, key=lambda name: (len(name), name), default=log_file)


@contextmanager
def ended_after(seconds: float, file: Any) -> Iterator[None]:
    """Ends the process if the block takes longer than ``seconds``, and writes the stacks to ``file``.

    A thread of C code keeps the time. It needs neither Python nor the device, which the block may hold.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=file)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class WorkerError(RuntimeError):
    """The error that ended a worker, in one line.

    Args:
        text: the line.
        secondary: whether the worker only lost its connection to the others, so that another worker is the cause.
    """

    def __init__(self, text: str, secondary: bool = False) -> None:
        super().__init__(text)
        self.text, self.secondary = text, secondary

    def __reduce__(self) -> Any:
        return WorkerError, (self.text, self.secondary)


class Reporter(Observer):
    """Reports errors and warnings of a worker; each line names the worker and its step.

    Args:
        rank: the worker's.
        progress: the run's ``rlvid.train.progress.ProgressActor``.
        timeout: limit for one call of a reward, in seconds; 0 or None: no limit.

    Attributes:
        path: the file of the worker's log that is written now, after ``log_to``.
    """

    path: Path

    def __init__(self, rank: int, progress: Any, timeout: float | None = None) -> None:
        self.rank, self.progress, self.timeout = rank, progress, timeout
        self.step: int | None = None
        self.latest: str | None = None
        self._handler: logging.FileHandler | None = None
        self._told = set[str]()

    @property
    def where(self) -> str:
        """The worker and its step."""
        return f"worker {self.rank}, " + ("before its first step" if self.step is None else f"step {self.step}")

    def report(self, line: str, kind: str | None = None) -> None:
        """Reports samples without a reward on the driver's console, once for each kind of line.

        A ``kind`` that is given counts over all workers and their restarts; else each worker has its own lines.
        """
        self.latest = line
        log.warning("step %s: %s", self.step, line)
        of_worker = kind or re.sub(r"\d+", "", line)
        if of_worker not in self._told:
            self._told.add(of_worker)
            self._note(line, kind)

    def warn(self, line: str, kind: str | None = None) -> None:
        """Reports what slows training down on the driver's console, and in the log; of a ``kind`` once in a run."""
        log.warning("%s: %s", self.where, line)
        self._note(line, kind)

    def _note(self, line: str, kind: str | None = None) -> None:
        self.progress.note.remote(f"{self.where}: {line}", kind)

    @contextmanager
    def calling(self, reward: str) -> Iterator[None]:
        """Ends the process if the block, a call of a reward, exceeds ``timeout``; its stacks are in its log.

        The progress actor knows when the call began, so the driver prints the reason.
        """
        if not self.timeout:
            yield
            return
        self.progress.reward_started.remote(self.rank, self.where, reward, self.timeout)
        try:
            with ended_after(self.timeout, self._handler.stream if self._handler else sys.__stderr__):
                yield
        finally:
            self.progress.reward_ended.remote(self.rank)

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Turns an error of the block into one line for the driver, and logs the traceback in the worker's log."""
        try:
            yield
        except WorkerError:  # of a block in this one
            raise
        except Exception as error:  # any error is raised again, and only this process can log its traceback
            log.exception("%s: this ends the worker", self.where)
            text = f"{self.where}: {describe(error)}"
            secondary = _lost_others(error)
            if not secondary:
                self.progress.note.remote(text)
            raise WorkerError(text, secondary) from error

    def log_to(self, path: Path) -> None:
        """Sends logging, warnings and printed lines into the worker's log."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logging.getLogger().addHandler(handler)
        logging.getLogger("rlvid").setLevel(logging.INFO)
        logging.captureWarnings(True)
        self._handler, self.path = handler, path
        sys.stdout = _StdoutLog()

    def turn(self) -> None:
        """Goes on in another file, ``worker-00.log.0001`` after ``worker-00.log``, and so on."""
        if self._handler is not None:
            log_file, _, number = self.path.name.rpartition(".")
            name = f"{log_file}.{int(number) + 1:04d}" if number.isdigit() else f"{self.path.name}.0001"
            path = self.path.with_name(name)
            ended = self._handler.setStream(open(path, "a", encoding=self._handler.encoding))  # noqa: SIM115
            self.path = path
            if ended is not None:
                ended.close()


class _StdoutLog:
    """Replaces stdout: each printed line becomes a line of the log."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            logging.getLogger("rlvid.printed").info(line)
        return len(text)

    def flush(self) -> None:
        """Does nothing: a line is logged when it ends."""

    def isatty(self) -> bool:
        return False


def _lost_others(error: BaseException) -> bool:
    """Returns whether an error came from a collective, which fails on all workers when one of them ends."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and any("/torch/distributed/" in frame.filename for frame in frames)
