"""Handles Ctrl-C, SIGTERM and SIGHUP in every command: one line, exit code 128 + signal; a second one ends at once.

A signal raises KeyboardInterrupt in the main thread, so that blocks clean up. ``received`` remembers the signal,
because libraries lose it, or raise their own errors when their processes end. ``kept`` notes the files that a block
leaves on disk, and ``line`` returns them with the command to continue.

``listen`` installs the handlers; ``rlvid.terminal.run_command`` calls it for every command.
"""

import _thread
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
SECONDS_TO_END = 30.0
"""After that long an interrupted command ends at once, even if a library swallowed the interruption.

``postpone_end`` adds to it.
"""

spared = set[int]()
"""Children that ``end_at_once`` leaves alone, because they end with this process and have to clean up."""

_received: int | None = None
_kept: str | None = None
_at = 0.0
_postponed = 0.0
_ended = False
_found: dict[int, Any] = {}


def listen() -> None:
    """Installs the handlers, in the main thread; again after a library has put its own there.

    A signal that is ignored stays so: a job under nohup outlives its terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in NAMES:
        there = signal.getsignal(number)
        if there not in (signal.SIG_IGN, _handle):
            _found.setdefault(number, there)
            signal.signal(number, _handle)


def ended() -> None:
    """Notes that the command has ended: a signal now stops the libraries' work at exit."""
    global _ended
    _ended = True


def unlisten() -> None:
    """Restores the handlers that ``listen`` found, and forgets the received signal."""
    global _ended
    clear_received()
    _ended = False
    for number, handler in _found.items():
        signal.signal(number, handler)
    _found.clear()


def received() -> int | None:
    """Returns the signal that interrupts this command, if one came."""
    return _received


def clear_received() -> None:
    """Forgets a signal that was handled: the command continues."""
    global _received, _kept, _postponed
    _received = _kept = None
    _postponed = 0.0


def postpone_end(seconds: float) -> None:
    """Gives an interrupted command so many seconds beyond ``SECONDS_TO_END``."""
    global _postponed
    _postponed = seconds


@contextmanager
def kept(what: Callable[[], str] | str) -> Iterator[None]:
    """Notes the files that an interruption of the block leaves; the innermost block's note is printed."""
    global _kept
    try:
        yield
    except BaseException:
        if _received is not None and _kept is None:
            _kept = what if isinstance(what, str) else what()
        raise


@contextmanager
def starting_ray() -> Iterator[None]:
    """Starts Ray in the block: its processes ignore a closed terminal, and its own handler of SIGTERM is removed.

    Ray's handler raises SystemExit, at which its C++ parts abort the process.
    """
    here = threading.current_thread() is threading.main_thread()
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN) if here else None
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM and _found:
            _note(signal.SIGTERM)
            raise KeyboardInterrupt from None
        raise
    finally:
        if here:
            signal.signal(signal.SIGHUP, signal.SIG_DFL if hangup is None else hangup)
            if _found:
                listen()


def line() -> str:
    """Returns the last line of an interrupted command: the signal, the files that are kept, the command to continue."""
    name = NAMES.get(signal.Signals(_received or signal.SIGINT), "signal")
    if _kept is None:
        return f"interrupted ({name}): nothing was written; start again: {command()}"
    return f"interrupted ({name}): {_kept}; continue: {command()}"


def exit_code() -> int:
    """128 + the signal, as shells count."""
    return 128 + (_received or signal.SIGINT)


def command() -> str:
    """Returns the command as it was typed, quoted for a shell."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return "submit the same job again"
    words = sys.orig_argv[1:]
    return shlex.join(["rlvid", *words[1:]] if words and Path(words[0]).name == "rlvid" else ["python", *words])


def _handle(number: int, frame: FrameType | None) -> None:
    if _received is not None or _ended:
        end_at_once(number)
    _note(number)
    raise KeyboardInterrupt


def _note(number: int) -> None:
    global _received, _at
    _received, _at = number, time.monotonic()
    # Not threading.Thread: this may run while the main thread holds the locks of that module.
    _thread.start_new_thread(_end_after, (number, _at))


def _end_after(number: int, at: float) -> None:
    while (left := at + SECONDS_TO_END + _postponed - time.monotonic()) > 0:
        time.sleep(min(left, SECONDS_TO_END))
    if _received is not None and _at == at:
        end_at_once(number)


def end_at_once(number: int) -> None:
    """Ends this process and its children without any more work."""
    with contextlib.suppress(OSError):
        if _received is not None:
            os.write(2, f"ended at once; continue: {command()}\n".encode(errors="replace"))
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in {*map(int, path.read_text(encoding="ascii").split())} - spared:
                os.kill(pid, signal.SIGKILL)
    os._exit(128 + number)
