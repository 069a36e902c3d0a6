"""The output and the exit codes of commands: lines, progress, errors."""

import contextlib
import io
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from rlvid import interrupt
from rlvid.faults import one_line
from rlvid.text import printable

console = Console(width=None if sys.stdout.isatty() else 120)


def say(text: str) -> None:
    r"""Prints one line, neither wrapped nor coloured; control characters are shown as ``\x1b``."""
    console.print(printable(text, lines=True), soft_wrap=True, markup=False, highlight=False)


def short(path: Path) -> str:
    """Returns a path as one would type it here: relative where it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def numbers(text: str, option: str) -> list[int]:
    """Returns the whole numbers of ``20,50``, from 1 to 500 and each once; raises ValueError that names the option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(1 <= n <= 500 for n in found):
        raise ValueError(f"{option} {text!r}: expected whole numbers from 1 to 500, separated by commas, such as 20,50")
    return list(dict.fromkeys(found))


def fractions(text: str, option: str) -> list[float]:
    """Parses ``0.25,0.5,1``: numbers above 0 and at most 4, ascending; raises ValueError that names the option."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < n <= 4 for n in found):
        raise ValueError(
            f"{option} {text!r}: expected numbers above 0 and at most 4, separated by commas, such as 0.25,0.5,1; the "
            "base model (0) is always there"
        )
    return sorted(set(found))


def counter(unit: str) -> Callable[..., None]:
    """Returns a callback that shows how far something is and when it will be done, at most every ten seconds."""
    start = time.perf_counter()
    began, shown, last = [start], [start], [0]

    def show(*news: str | int) -> None:
        *what, done, total = news
        now = time.perf_counter()
        if int(done) < last[0]:  # another count begins
            began[0] = shown[0]
        last[0] = int(done)
        if now - shown[0] > 10:
            shown[0] = now
            left = (now - began[0]) / max(1, int(done)) * (int(total) - int(done))
            say(f"{' '.join(map(str, what))} {done}/{total} {unit}, {left:.0f} s to go".strip())

    return show


def shell(path: Path | str) -> str:
    """Returns a path or an argument as a shell reads it, for a command to copy: in quotes where it needs them."""
    return shlex.quote(short(path) if isinstance(path, Path) else path)


def sql(path: str) -> str:
    """Returns a path as SQL reads it: in quotes."""
    return "'" + path.replace("'", "''") + "'"


def complain(error: BaseException, code: int) -> int:
    """Prints an error as one line and gives its exit code back."""
    _to_stderr(f"error: {one_line(error)}")
    return code


def run_command(run: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code; an error or an interruption becomes one line on stderr.

    The code is what the command returns, or 0; 2 after a mistake of the user's and where a file cannot be read or
    written; 1 after other failures; 128 + signal after an interruption, see ``rlvid.interrupt``. Faults of the program
    itself pass.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter costs the letter
    interrupt.listen()
    code = 0
    try:
        try:
            code = run() or 0
        except BaseException as error:
            if interrupt.received() is None and not isinstance(error, KeyboardInterrupt):
                raise
            _to_stderr(interrupt.line())
            code = interrupt.exit_code()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BrokenPipeError:
        code = 1  # whoever read has gone
    except (ValueError, OSError) as error:
        code = complain(error, 2)
    except (RuntimeError, MemoryError) as error:
        code = complain(error, 1)
    except Exception as error:
        # Ray's own errors, by name, since importing Ray here would slow --help down; some are bare Exceptions. All
        # others are faults of the program, and pass with their traceback.
        if not (type(error).__module__.startswith("ray.") or type(error) is Exception):
            raise
        code = complain(error, 1)
    finally:
        interrupt.ended()
    flushed = _flush()
    return code or flushed


def _flush() -> int:
    """Writes out what stdout still holds; the exit code if that fails, once nothing is left for Python to fail on."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, BrokenPipeError) else complain(error, 2)
    return 0


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)
