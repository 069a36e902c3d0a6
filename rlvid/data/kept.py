"""Folders of rows that a run makes and keeps in its storage, for all runs that ask for the same."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from rlvid.config import RunConfig
from rlvid.data.clips import read_meta
from rlvid.data.encode import EncodeReport
from rlvid.files import held
from rlvid.storage import Mirror
from rlvid.terminal import short


def kept_folder(mirror: Mirror, write: Callable[[Path], None], rows: str, console: Console) -> None:
    """Writes a folder of rows and sends it to the storage, unless it is there; prints how many ``rows`` it holds."""
    out = mirror.folder
    with one_at_a_time(out):
        there = mirror.sizes()
        if read_meta(out) is None if there is None else "meta.json" not in there:
            if read_meta(out) is None:
                write(out)
            push_folder(mirror)
            meta = read_meta(out) or {}
            console.print(f"{meta['clips']} {rows} in {short(out)}", highlight=False)


def push_folder(mirror: Mirror) -> None:
    """Sends a folder of clips; ``meta.json``, which says that it is complete, goes last."""
    names = sorted(path.name for path in mirror.folder.iterdir() if path.name != "meta.json")
    mirror.push([*names, "meta.json"])


def one_at_a_time(out: Path) -> AbstractContextManager[None]:
    """Makes runs that start together write a folder of clips once."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return held(out.parent / f".{out.name}.lock", "", patience=math.inf)


def encoded_once(
    config: RunConfig,
    name: str,
    make: Callable[[Path], EncodeReport],
    console: Console,
    what: str = "clips encoded",
) -> str:
    """Encodes into a folder of the run's storage, unless it holds the same; returns the folder, or its URI.

    Args:
        config: the run's.
        name: of the folder, under ``clips``.
        make: encodes into a folder that may hold the result already.
        console: prints how many there are, and where.
        what: noun and verb of that line.

    Raises:
        ValueError: it cannot be written.
    """
    mirror = Mirror(config.output.storage, f"clips/{name}")
    out = mirror.folder
    with one_at_a_time(out):
        if stored := "meta.json" in (mirror.sizes() or ()):
            mirror.pull(lambda name: not name.startswith("part-"))  # they are read where they lie
        report = make(out)
        if report.encoded or not stored:
            push_folder(mirror)
    if report.encoded:
        console.print(f"{report.clips} {what} in {short(out)}, {report.seconds:.0f} s", highlight=False)
        for skipped in report.skipped:
            console.print(f"skipped {skipped}", highlight=False, markup=False)
    return mirror.place
