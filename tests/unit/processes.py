"""Programs that tests start: gone, and their pipes closed, whatever becomes of the test."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HANG = 900.0
"""Seconds after which a test takes what it waits for as hung. Long: a slow machine is no fault."""


@contextmanager
def started(command: Sequence[str | Path], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A running program, which is killed where the test has not awaited its end.

    Args:
        command: the program and its arguments.
        options: as of ``Popen``.
    """
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, text=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
