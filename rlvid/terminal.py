"""What commands print: lines as they are, progress, errors."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from rlvid.text import printable

console = Console(width=None if sys.stdout.isatty() else 120)


def say(text: str) -> None:
    r"""One line, as it is: neither wrapped nor coloured; control characters are shown as ``\x1b``."""
    console.print(printable(text, lines=True), soft_wrap=True, markup=False, highlight=False)


def short(path: Path) -> str:
    """A path as one would type it here: relative where it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def numbers(text: str, option: str) -> list[int]:
    """The whole numbers of ``20,50``, from 1 to 500 and each once; raises ValueError that names the option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(1 <= n <= 500 for n in found):
        raise ValueError(f"{option} {text!r}: expected whole numbers from 1 to 500, separated by commas, such as 20,50")
    return list(dict.fromkeys(found))


def fractions(text: str, option: str) -> list[float]:
    """The numbers of ``0.25,0.5,1``, above 0 and at most 4, ascending; raises ValueError that names the option."""
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
    """A callback that shows how far something is and when it will be done, at most every ten seconds."""
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


def complain(error: Exception, code: int) -> int:
    """Prints an error as one line and gives its exit code back."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[-1] if "Traceback" in str(error) else " ".join(lines)  # an error from a Ray task ends with its cause
    Console(stderr=True, soft_wrap=True).print(f"error: {printable(text)}", markup=False, highlight=False)
    return code
