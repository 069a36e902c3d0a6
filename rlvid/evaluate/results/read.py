"""What an evaluation's folder says, checked: ``evaluation.yaml``, ``evaluation.json`` and the scores of all videos."""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from rlvid.evaluate.results.rows import METRICS
from rlvid.evaluate.results.summary import Comparison, Summary
from rlvid.evaluate.results.untrusted import (
    FASTEST,
    KEY,
    MOST_ROWS,
    SLOWEST,
    Checked,
    check,
    damaged,
    read_json,
    read_table,
    read_text,
    sound,
)  # fmt: skip
from rlvid.files import read_yaml


def _printable(value: str) -> str:
    if not value.strip() or any(ord(c) < 32 or c == "\x7f" for c in value):
        raise ValueError("expected a name without control characters")
    return value


def _path(value: str) -> str:
    if any(ord(c) < 32 for c in value) or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError("expected the path of a folder")
    return value


_Name = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
_Text = Annotated[str, Field(max_length=4096), AfterValidator(_path)]
_Prompt = Annotated[str, Field(max_length=10_000)]
_Step = Annotated[int, Field(ge=0, le=10**9)]
_Count = Annotated[int, Field(ge=0, le=MOST_ROWS)]
_D = Annotated[int, Field(ge=1, le=1000)]
_Score = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class AboutModel(Checked):
    """A model of an evaluation; ``path`` is its run's folder, or the base model."""

    name: _Name
    label: _Name | None = None
    kind: Annotated[str, Field(pattern="^(base|run|checkpoint)$")]
    path: _Text | None = None
    step: _Step | None = None
    scale: Annotated[float, Field(ge=0, le=4, allow_inf_nan=False)] | None = None


class About(Checked):
    """``evaluation.yaml``: what an evaluation consists of."""

    models: Annotated[list[AboutModel], Field(min_length=1, max_length=1000)]
    sets: Annotated[dict[_Name, list[_Prompt]], Field(min_length=1)]
    steps: Annotated[list[_D], Field(min_length=1, max_length=100)]
    copies: Annotated[int, Field(ge=1, le=1000)] = 1
    metrics: Annotated[list[_Name], Field(min_length=1, max_length=1000)]
    fps: Annotated[float, Field(ge=SLOWEST, le=FASTEST, allow_inf_nan=False)]
    rewards: dict[_Name, _Text | None] | None = None
    created: _Name | None = None
    seed: int | None = None
    clip: _Text | None = None
    frames: _Count | None = None
    size: _Count | None = None
    complete: bool = True

    @property
    def count(self) -> int:
        """Videos of all models."""
        return len(self.models) * len(self.steps) * self.copies * sum(map(len, self.sets.values()))


class _Summary(Checked):
    model: _Name
    set: _Name
    steps: _D
    count: _Count
    broken: _Count
    mean: dict[_Name, _Score]
    std: dict[_Name, _Score]
    used: dict[_Name, _Count]


class _Comparison(Checked):
    base: _Name
    tuned: _Name
    set: _Name
    steps: _D
    metric: _Name
    pairs: _Count
    prompts: _Count
    excluded: _Count
    difference: _Score
    low: _Score
    high: _Score
    in_base_std: _Score


class _Results(Checked):
    facts: dict[str, str]
    summaries: list[_Summary]
    comparisons: list[_Comparison]


def read_about(folder: Path) -> tuple[About, dict[str, Any]]:
    """``evaluation.yaml`` of a folder, checked, and all of its keys.

    Raises:
        ValueError: it is missing or damaged, two models have one name, or a set has no prompts or an empty one.
    """
    path = folder / "evaluation.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: no evaluation there (no evaluation.yaml); rlvid evaluate writes one")
    text = read_text(folder, path)
    with sound(path):
        content = read_yaml(text)
    about = check(path, About, content)
    names = [model.name for model in about.models]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two models have one name; give each its own label")
    for name, prompts in about.sets.items():
        empty = next((place for place, prompt in enumerate(prompts) if not prompt.strip()), None)
        if empty is not None or not prompts:
            what = "has no prompts" if not prompts else f"prompt {empty + 1} is empty"
            raise ValueError(f"{folder}: set {name!r}: {what}; mend the prompts and evaluate again")
    return about, content


def read_results(path: Path) -> tuple[list[Summary], list[Comparison], dict[str, str]]:
    """Reads ``evaluation.json``: NaN where it has null, or where a metric is newer than the file.

    Raises:
        ValueError: the file is damaged.
    """
    content = check(path, _Results, read_json(path.parent, path))
    names = dict.fromkeys([*METRICS, *(m for each in content.summaries for m in (*each.mean, *each.std, *each.used))])
    absent = dict.fromkeys(names, math.nan)
    summaries = [
        Summary(
            each.model, each.set, each.steps, each.count, each.broken, absent | each.mean, absent | each.std,
            dict.fromkeys(names, 0) | {name: used for name, used in each.used.items() if name in each.mean},
        )
        for each in content.summaries
    ]  # fmt: skip
    return summaries, [Comparison(**each.model_dump()) for each in content.comparisons], content.facts


def score_rows(folder: Path, about: About) -> dict[tuple[str, str, int, int, int], dict[str, Any]]:
    """The rows of ``evaluation.parquet`` by ``KEY``: one for each video that ``evaluation.yaml`` names.

    Raises:
        ValueError: the file is missing or damaged, lacks a video, or has one twice or one of others.
    """
    path = folder / "evaluation.parquet"
    rows = read_table(folder, path, (*KEY, "prompt", *about.metrics), limit=about.count)
    names, found = {model.name for model in about.models}, {}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        prompts = about.sets.get(row["set"], [])
        known = row["model"] in names and row["steps"] in about.steps and 0 <= row["copy"] < about.copies
        if not known or not 0 <= row["index"] < len(prompts):
            raise damaged(path, f"a video of {row['model']!r}, set {row['set']!r}, is not in evaluation.yaml")
        if found.setdefault(key, row) is not row:
            raise damaged(path, f"a video of {row['model']!r}, set {row['set']!r}, is there twice")
    return found
