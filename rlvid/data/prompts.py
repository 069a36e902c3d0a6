"""Prompts: checked, and read from text, JSON lines, CSV or Parquet, or drawn from a built-in set."""

from importlib import resources
from pathlib import Path
from typing import Any

from rlvid.data.tables import TABLES, read_rows, read_text
from rlvid.toy.captions import PROMPT_SETS, prompt_set

MAX_CHARACTERS = 1000
ANIMAL_SETS = ("animals", "new_animals", "non_animals")
"""Shipped prompts for models of the real world: animals to train on, other animals, and no animals at all."""


def check_prompt(text: Any, where: str) -> str:
    """The prompt without surrounding white space.

    Args:
        text: what was found where a prompt should be.
        where: named in the error, such as ``prompts.txt:3``.

    Raises:
        ValueError: not a text, blank, or longer than 1,000 characters.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: the prompt is {'missing' if text is None else repr(text)[:40]}; it must be a text")
    prompt = text.strip()
    if not prompt:
        raise ValueError(f"{where}: the prompt is empty; write one or remove the row")
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"{where}: the prompt has {len(prompt):,} characters; allowed: up to {MAX_CHARACTERS:,}")
    return prompt


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file, in its order, repetitions kept.

    Args:
        path: ``.txt`` (a prompt a line, blank lines are skipped), or ``.jsonl``, ``.csv`` or ``.parquet`` with a key or
            column ``prompt``.

    Raises:
        ValueError: the file is missing, of another format, not UTF-8 or damaged, has no prompts, or one that
            ``check_prompt`` refuses; the message names file and line.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        lines = enumerate(read_text(path).split("\n"), start=1)
        prompts = [check_prompt(line, f"{path}:{number}") for number, line in lines if line.strip()]
    elif path.suffix.lower() in TABLES:
        prompts = [check_prompt(row["prompt"], where) for where, row in read_rows(path, ("prompt",))]
    else:
        raise ValueError(f"{path}: prompts are read from .txt, {', '.join(TABLES)}; not from {path.suffix or 'this'!r}")
    if not prompts:
        raise ValueError(f"{path}: there are no prompts in this file")
    return prompts


def resolve_prompts(spec: str, count: int | None = None, seed: int = 0) -> list[str]:
    """Prompts by the name of a built-in set or from a file.

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
    elif Path(spec).is_file():
        prompts = read_prompts(spec)
    else:
        sets = ", ".join((*PROMPT_SETS, *ANIMAL_SETS))
        raise ValueError(f"prompts {spec!r} are neither a built-in set ({sets}) nor a file")
    if count is not None and not 0 < count <= len(prompts):
        raise ValueError(f"{spec}: has {len(prompts)} prompts; asked for {count}")
    return prompts[:count]
