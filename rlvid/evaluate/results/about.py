"""The description of an evaluation, ``evaluation.yaml``, checked, and the keys of its videos."""

from collections.abc import Iterator
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from rlvid.evaluate.results.untrusted import MAX_FPS, MAX_ROWS, MIN_FPS, CheckedModel, check, read_text, sound
from rlvid.files import read_yaml


class Case(NamedTuple):
    """A case, of which each model makes a video from the same noise: set, D steps, the prompt's place, the copy."""

    set: str
    steps: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    copy: int

    def __str__(self) -> str:
        return f"set {self.set!r}, D = {self.steps}, prompt {self.index + 1}, copy {self.copy + 1}"


VideoKey = tuple[str, Case]
"""The name of a model, and a case: one video."""


def describe(key: VideoKey) -> str:
    """Returns a video in words, for messages."""
    return f"model {key[0]!r}, {key[1]}"


def _printable(value: str) -> str:
    if not value.strip() or any(ord(c) < 32 or c == "\x7f" for c in value):
        raise ValueError("expected a name without control characters")
    return value


def _path(value: str) -> str:
    if any(ord(c) < 32 for c in value) or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError("expected the path of a folder")
    return value


Name = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
_Text = Annotated[str, Field(max_length=4096), AfterValidator(_path)]
_Prompt = Annotated[str, Field(max_length=10_000)]
_Step = Annotated[int, Field(ge=0, le=10**9)]
Count = Annotated[int, Field(ge=0, le=MAX_ROWS)]
StepCount = Annotated[int, Field(ge=1, le=1000)]


class ModelRecord(CheckedModel):
    """A model of an evaluation: ``path`` is its run's folder, ``scale`` the scale of the learned change."""

    name: Name
    label: Name
    kind: Annotated[str, Field(pattern="^(base|run|checkpoint)$")]
    path: _Text | None = None
    step: _Step | None = None
    scale: Annotated[float, Field(ge=0, le=4, allow_inf_nan=False)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _default_label(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {"label": value.get("name")} | {name: given for name, given in value.items() if given is not None}


class About(CheckedModel):
    """The content of ``evaluation.yaml``: models, prompt sets, steps, metrics."""

    models: Annotated[list[ModelRecord], Field(min_length=1, max_length=1000)]
    sets: Annotated[dict[Name, list[_Prompt]], Field(min_length=1)]
    steps: Annotated[list[StepCount], Field(min_length=1, max_length=100)]
    copies: Annotated[int, Field(ge=1, le=1000)] = 1
    metrics: Annotated[list[Name], Field(min_length=1, max_length=1000)]
    fps: Annotated[float, Field(ge=MIN_FPS, le=MAX_FPS, allow_inf_nan=False)]
    rewards: dict[Name, _Text | None] | None = None
    created: Name | None = None
    seed: int | None = None
    clip: _Text | None = None
    frames: Count | None = None
    size: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    complete: bool = True

    @property
    def count(self) -> int:
        """Videos of all models."""
        return len(self.models) * len(self.steps) * self.copies * sum(map(len, self.sets.values()))

    def cases(self) -> Iterator[Case]:
        """Yields every case, in the order of sets, D, prompts and copies."""
        for name, prompts in self.sets.items():
            yield from map(Case._make, product([name], self.steps, range(len(prompts)), range(self.copies)))

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the models."""
        return frozenset(model.name for model in self.models)

    def has(self, key: VideoKey) -> bool:
        """Returns whether a video is one of the evaluation's."""
        model, (name, steps, index, copy) = key
        known = model in self.names and steps in self.steps and 0 <= copy < self.copies
        return known and 0 <= index < len(self.sets.get(name, ()))


def read_about(folder: Path) -> About:
    """Reads ``evaluation.yaml``.

    Raises:
        ValueError: it is missing or damaged, two models or two of ``steps`` are the same, or a set has no prompts or an
            empty one.
    """
    path = folder / "evaluation.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: no evaluation there (no evaluation.yaml); rlvid evaluate writes one")
    text = read_text(folder, path)
    with sound(path):
        content = read_yaml(text)
    about = check(path, About, content)
    if len(set(about.steps)) < len(about.steps):
        raise ValueError(f"{path}: steps = {about.steps} has a number twice; give each once and evaluate again")
    names = [model.name for model in about.models]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two models have one name; give each its own label")
    for name, prompts in about.sets.items():
        empty = next((number for number, prompt in enumerate(prompts, 1) if not prompt.strip()), None)
        if empty is not None or not prompts:
            what = "has no prompts" if not prompts else f"prompt {empty} is empty"
            raise ValueError(f"{folder}: set {name!r}: {what}; correct the prompts and evaluate again")
    return about


def key_of(row: dict[str, Any]) -> VideoKey:
    """Returns the key of a row of a table of videos."""
    return row["model"], Case(row["set"], row["steps"], row["index"], row["copy"])
