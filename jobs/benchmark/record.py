"""The file of results, which a later call completes; the settings and versions in it; a time limit for a part."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rlvid.files import write_atomic
from rlvid.terminal import say

SETTINGS = ("preset", "device", "precision", "steps", "frames", "size", "segments", "sampling_steps")


@dataclass
class Record:
    """The file of results: parts by name with what they measured, and those that were left out with the reason."""

    path: Path
    setup: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Returns the content of a file; raises ValueError if there is none, or it is damaged."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, *(dict(found[key]) for key in ("setup", "parts", "left out")))
        except OSError as error:
            raise ValueError(f"--out {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--out {path}: is cut off or no file of this benchmark") from None

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Adds a part."""
        self.parts[name] = found
        self.left_out.pop(name, None)
        self.write()

    def leave_out(self, name: str, why: str) -> None:
        """Notes why a part is not there."""
        self.left_out[name] = why
        self.write()

    def write(self) -> None:
        """Writes the file whole; raises ValueError if that cannot be."""
        found = {"setup": self.setup, "parts": self.parts, "left out": self.left_out}
        try:
            write_atomic(self.path, json.dumps(found, indent=1).encode())
        except OSError as error:
            raise ValueError(f"--out {self.path}: cannot be written ({error.strerror}); choose another file") from None


def open_record(path: Path, setup: dict[str, Any]) -> Record:
    """Opens the record of a file: it keeps what was measured with the same setup, and puts a damaged file aside.

    Raises:
        ValueError: the file was measured with another setup, or cannot be written.
    """
    record = Record(path, setup)
    if path.exists():
        try:
            before = Record.read(path)
        except ValueError as error:
            aside = path.with_name(f"{path.name}.damaged")
            os.replace(path, aside)
            say(f"{error}; it now is {aside}, and everything is measured anew")
            return record
        if changed := [name for name in setup if before.setup.get(name) != setup[name]]:
            raise ValueError(
                f"--out {path}: was measured with {changed[0]} = {before.setup.get(changed[0])!r}, and now it is "
                f"{setup[changed[0]]!r}; choose another file"
            )
        record.parts = before.parts
    record.write()
    return record


def setup(options: argparse.Namespace) -> dict[str, Any]:
    """Returns settings, device and versions that a measurement belongs to."""
    found = {name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}
    if options.device.startswith("cuda"):
        card = torch.cuda.get_device_properties(options.device)
        found |= {"card": card.name, "memory": card.total_memory, "driver": driver()}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        found |= {"card": f"{processor()}, {torch.get_num_threads()} threads"}
    found |= {"torch": torch.__version__, "python": platform.python_version()}
    return found | {"commit": options.commit or commit()}


def driver() -> str:
    """Returns the NVIDIA driver's version."""
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else "unknown"


def commit() -> str:
    """Returns the commit that is measured, with a plus where files differ from it."""
    home = ["git", "-C", str(Path(__file__).parent)]
    if not (found := _output(*home, "rev-parse", "--short=12", "HEAD")):
        return "unknown"
    return found + ("+" if _output(*home, "status", "--porcelain", "--untracked-files=no") else "")


def processor() -> str:
    """Returns the CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{sys.platform} {platform.machine()}"


def _output(*command: str) -> str:
    """Returns the output of a command; an empty text where the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


class TooLong(Exception):
    """A part ran on beyond its time."""


class Clock:
    """Whether the time is ``over``: libraries may turn the exception that ends a part into one of their own."""

    over = False


@contextmanager
def at_most(seconds: float) -> Iterator[Clock]:
    """Raises ``TooLong`` in the block under it once the seconds are over; in the main thread alone."""
    clock = Clock()

    def end(number: int, frame: FrameType | None) -> None:
        clock.over = True
        raise TooLong

    handler = signal.signal(signal.SIGALRM, end)
    before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield clock
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)
