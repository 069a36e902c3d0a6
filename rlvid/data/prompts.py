"""Prompts: checked, and read from text, JSON lines, CSV, TSV or Parquet, or drawn from a built-in set."""

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from rlvid.data.tables import TABLES, Row, numbered_lines, read_rows, read_text, table_files
from rlvid.text import clean, is_blank, is_utf8
from rlvid.world.captions import PROMPT_SETS, prompt_set

MAX_CHARACTERS = 10_000
"""Characters that are kept of a prompt. No text encoder reads so many, so such a prompt counts as cut."""
ANIMAL_SETS = ("animals", "new_animals", "non_animals")
"""Shipped prompts for models of the real world: animals to train on, other animals, and no animals at all."""


def check_prompt(text: Any, where: str) -> str:
    """Returns the prompt on one line, without surrounding white space; at most its first 10,000 characters.

    All text that a user gives to a model comes through here, from arguments and from files.

    Args:
        text: what was found where a prompt should be.
        where: named in the error, such as ``prompts.txt:3``.

    Raises:
        ValueError: not a text, without a visible character, or with one that ``rlvid.text.clean`` refuses.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: the prompt is {'missing' if text is None else repr(text)[:40]}; it must be a text")
    try:
        prompt = clean(text)
    except ValueError as error:
        raise ValueError(f"{where}: the prompt {error}") from None
    if is_blank(prompt):
        raise ValueError(f"{where}: the prompt is empty; write one or remove the row")
    return prompt[:MAX_CHARACTERS].rstrip()


def is_prompt_file(path: str | Path) -> bool:
    """Returns whether a text names a file of prompts by its suffix, be it there or not."""
    return Path(path).suffix.lower() in (".txt", *TABLES)


def has_prompts(path: str | Path) -> bool:
    """Returns whether there is a file of prompts, or a folder of parts, at a path."""
    return is_utf8(str(path)) and (os.path.isfile(path) or bool(table_files(Path(path))))


def read_prompts(path: str | Path) -> list[str]:
    """Returns prompts of a file, in its order, repetitions kept; see ``iter_prompts``."""
    return list(iter_prompts(path))


def iter_prompts(path: str | Path) -> Iterator[str]:
    """Yields prompts of a file, in its order, repetitions kept.

    Args:
        path: ``.txt`` (a prompt a line, blank lines are skipped), or a table of ``rlvid.data.tables`` with a column
            ``prompt``.

    Raises:
        ValueError: the file is missing, of another format, not UTF-8 or damaged, has no prompts, or one that
            ``check_prompt`` refuses; the message names file and line.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        found = (
            check_prompt(line, f"{path}:{number}") for number, line in numbered_lines(read_text(path)) if line.strip()
        )
    elif is_prompt_file(path):
        found = (_prompt(row) for row in read_rows(path, ("prompt",)))
    else:
        raise ValueError(f"{path}: prompts are read from .txt, {', '.join(TABLES)}; not from {path.suffix or 'this'!r}")
    prompt = None
    for prompt in found:
        yield prompt
    if prompt is None:
        raise ValueError(f"{path}: there are no prompts in this file")


def _prompt(row: Row) -> str:
    if row.fault is not None:
        raise ValueError(f"{row.where}: {row.fault}")
    return check_prompt(row.values["prompt"], row.where)


def resolve_prompts(spec: str, count: int | None = None, seed: int = 0) -> list[str]:
    """Returns prompts by the name of a built-in set or from a file.

    Args:
        spec: ``in_domain``, ``new_shapes``, ``scenes``, one of ``ANIMAL_SETS``, or the path of a file for
            ``read_prompts``.
        count: how many prompts; the first three sets need it, the others give their first ones, by default all.
        seed: of the draw from a built-in set; a file has an order of its own.

    Raises:
        ValueError: neither a set nor a file, fewer prompts than asked for, or an error of ``read_prompts``.
    """
    if spec in PROMPT_SETS:
        if count is None:
            raise ValueError(f"prompt set {spec!r} is drawn from: say how many prompts it should give")
        return prompt_set(spec, count, seed)
    if spec in ANIMAL_SETS:
        prompts = read_prompts(Path(str(resources.files("rlvid"))) / "data" / "prompt_sets" / f"{spec}.txt")
    elif has_prompts(spec):
        prompts = read_prompts(spec)
    else:
        sets = ", ".join((*PROMPT_SETS, *ANIMAL_SETS))
        raise ValueError(f"prompts {spec!r} are neither a built-in set ({sets}) nor a file")
    if count is not None and not 0 < count <= len(prompts):
        raise ValueError(f"{spec}: has {len(prompts)} prompts; asked for {count}")
    return prompts[:count]
