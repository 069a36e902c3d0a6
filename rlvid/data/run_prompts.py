"""The prompts of a run: checked, and kept in its storage as a folder that the feed reads."""

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from rich.console import Console

from rlvid.config import RunConfig
from rlvid.data.clips import digest, read_meta
from rlvid.data.kept import kept_folder
from rlvid.data.listing import write_prompts
from rlvid.data.prompts import has_prompts, iter_prompts, resolve_prompts
from rlvid.data.tables import TABLES, table_files
from rlvid.storage import Mirror
from rlvid.world.captions import PROMPT_SETS

_CHECKED = 1000
"""Prompts that are read before a start; the rest is checked when they are copied, before the workers start."""


def check_prompts(config: RunConfig) -> None:
    """Checks that there are prompts, and the first of them, unless this machine has a copy of the file as it is.

    Raises:
        ValueError: data.prompts is neither a built-in set with so many prompts nor a file that can be read.
    """
    prompts = _prompts(config)
    if read_meta(_mirror(config).folder) is not None:
        return
    for _ in islice(prompts, _CHECKED):
        pass


def prompts_of_samples(config: RunConfig) -> list[str]:
    """Returns the ``data.count`` prompts of ``data.source=samples``; a file is used round and round.

    Raises:
        ValueError: see ``check_prompts``.
    """
    count = config.data.count
    first = list(islice(_prompts(config), count))
    return list(islice(cycle(first), count))


def kept_prompts(config: RunConfig, console: Console) -> str:
    """Returns the folder of the prompts of ``data.source=prompts``: a copy, since a file may change while it is read.

    A file that is the same as before by its path, size and time is not read again.

    Raises:
        ValueError: one of the prompts cannot be used.
    """
    mirror = _mirror(config)
    kept_folder(mirror, lambda out: write_prompts(_prompts(config), out), "prompts", console)
    return mirror.place


def _mirror(config: RunConfig) -> Mirror:
    """Returns the place of the copy: by the path, the size and the time of each file, or by the settings of a set."""
    spec, count = config.data.prompts or "in_domain", config.data.count
    if spec in PROMPT_SETS:
        known: list[object] = [spec, count, config.seed]
    else:
        path = Path(spec).expanduser().absolute()
        states = [(file, file.stat()) for file in table_files(path) or [path]]
        known = [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]
    return Mirror(config.output.storage, f"clips/prompts-{digest(known)[:12]}")


def _prompts(config: RunConfig) -> Iterator[str]:
    """Yields the prompts of a file, or ``data.count`` of a built-in set."""
    spec = config.data.prompts or "in_domain"
    if spec in PROMPT_SETS:
        return iter(resolve_prompts(spec, config.data.count, config.seed))
    if not has_prompts(Path(spec).expanduser()):
        raise ValueError(
            f"data.prompts = {spec!r} is neither a file of prompts nor a built-in set; allowed: a .txt, "
            f"{', '.join(TABLES)} file, a folder of such parts, or one of {', '.join(PROMPT_SETS)}"
        )
    return iter_prompts(Path(spec).expanduser())
