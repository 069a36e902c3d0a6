"""What an evaluation's folder says: models, prompts, the score of every video, and differences with intervals."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlvid.evaluate.results.read import About, read_about, score_rows
from rlvid.evaluate.results.untrusted import read_table
from rlvid.evaluate.tables.names import COLUMNS
from rlvid.stats import beyond_chance


class Case(NamedTuple):
    """What all models made a video of, from the same noise: a prompt's place in its set, the copy, and D."""

    set: str
    steps: int
    index: int
    copy: int


@dataclass(frozen=True)
class Model:
    """A model that was evaluated; ``path`` is its run's folder, where it has one."""

    name: str
    label: str
    kind: str
    path: str | None
    step: int | None
    scale: float


@dataclass(frozen=True)
class Difference:
    """A metric's mean gain over the base in ``pairs`` pairs of videos, and its 95 % interval (NaN where unknown).

    ``prompts`` is how many prompts the pairs are of.
    """

    pairs: int
    difference: float
    low: float
    high: float
    prompts: int

    @property
    def way(self) -> int:
        """1 where a gain is above chance, -1 where a loss is, else 0; see ``rlvid.stats.beyond_chance``."""
        return beyond_chance(self.low, self.high, self.prompts)


@dataclass(frozen=True)
class Part:
    """A Parquet file of videos: which models count in it, and how they are called here."""

    folder: Path
    path: Path
    names: dict[str, str]


@dataclass(frozen=True)
class Evidence:
    """One evaluation, or several joined: ``models[0]`` is the base, ``scores[model, case]`` maps metric to value."""

    folders: tuple[Path, ...]
    facts: dict[str, Any]
    models: tuple[Model, ...]
    sets: dict[str, list[str]]
    steps: tuple[int, ...]
    copies: int
    fps: float
    metrics: tuple[str, ...]
    scores: dict[tuple[str, Case], dict[str, float]]
    differences: dict[tuple[str, str, int, str], Difference]
    parts: tuple[Part, ...]

    @property
    def base(self) -> Model:
        """What the others are compared with."""
        return self.models[0]

    @property
    def tuned(self) -> tuple[Model, ...]:
        """All but the base."""
        return self.models[1:]

    @property
    def cases(self) -> list[Case]:
        """Every case, in the order of sets, D, prompts and copies."""
        return [
            Case(name, steps, index, copy)
            for name, prompts in self.sets.items() for steps in self.steps
            for index in range(len(prompts)) for copy in range(self.copies)
        ]  # fmt: skip

    def prompt(self, case: Case) -> str:
        """What was asked for."""
        return self.sets[case.set][case.index]

    def gain(self, model: str, case: Case, metric: str) -> float:
        """Of a model over the base in one case; NaN where either has no number."""
        return self.scores[model, case][metric] - self.scores[self.base.name, case][metric]

    @property
    def judge(self) -> str:
        """The metric that cases are ranked by: the held-out reward, or the trained one where there is none."""
        return next((m for m in ("held_out", "reward", *self.metrics) if m in self.metrics and self._has(m)), "reward")

    def shown(self) -> list[str]:
        """Metrics with a number for any video, those that tables know first."""
        known = [column.metric for column in COLUMNS if column.metric in self.metrics]
        return [m for m in [*known, *(m for m in self.metrics if m not in known)] if self._has(m)]

    def _has(self, metric: str) -> bool:
        return any(math.isfinite(values[metric]) for values in self.scores.values())


def read_evidence(folder: Path) -> Evidence:
    """Reads one evaluation.

    Raises:
        ValueError: it is none or unfinished, a file of it is missing or damaged, a prompt is empty, or scores are
            missing.
    """
    about, facts = read_about(folder)
    if not about.complete:
        raise ValueError(
            f"{folder}: the evaluation is not finished, and tables there may be of an earlier one; run `rlvid "
            "evaluate` again: it makes only what is missing"
        )
    models = tuple(
        Model(m.name, m.label or m.name, m.kind, m.path, m.step, 1.0 if m.scale is None else m.scale)
        for m in about.models
    )
    evidence = Evidence(
        (folder,), facts, models, about.sets, tuple(about.steps), about.copies, about.fps, tuple(about.metrics),
        _scores(folder, about), _differences(folder, about.sets) if len(models) > 1 else {},
        tuple(_parts(folder, models)),
    )  # fmt: skip
    missing = [(m.name, case) for m in models for case in evidence.cases if (m.name, case) not in evidence.scores]
    if missing:
        raise ValueError(
            f"{folder / 'evaluation.parquet'}: {len(missing)} videos have no scores, the first of "
            f"{describe(*missing[0])}; run `rlvid evaluate` again: it makes only what is missing"
        )
    return evidence


def describe(model: str, case: Case) -> str:
    """A video in words, for messages."""
    return f"model {model!r}, set {case.set!r}, D = {case.steps}, prompt {case.index + 1}, copy {case.copy + 1}"


def join(found: Iterable[Evidence]) -> Evidence:
    """Evaluations of the same prompts, noise and base as one; a name that comes again gets its folder's beside it.

    Raises:
        ValueError: none are given, or two differ in what must be the same, or score the base otherwise.
    """
    found = list(found)
    if not found:
        raise ValueError("no evaluation is given, and a report needs one; run `rlvid evaluate RUN` first")
    whole = found[0]
    for other in found[1:]:
        for key in ("frames", "size", "fps", "seed", "sets", "steps", "copies", "clip", "metrics"):
            one, two = whole.facts.get(key), other.facts.get(key)
            if one != two:
                shown = "" if key == "sets" else f" ({one} and {two})"
                raise ValueError(
                    f"{whole.folders[0]} and {other.folders[0]} differ in {key}{shown}: models of different shapes, or "
                    "prompts, are not compared; evaluate them together: rlvid evaluate RUN RUN"
                )
        if whole.base.name != other.base.name:
            raise ValueError(
                f"{whole.folders[0]} and {other.folders[0]} have other bases, {whole.base.name} and {other.base.name}; "
                "evaluate their models together: rlvid evaluate RUN RUN"
            )
        _check_base(whole, other)
        whole = _joined(whole, other)
    return whole


def _check_base(one: Evidence, two: Evidence) -> None:
    """Raises ValueError where the same videos of the base have other scores: by another reward, or they are others."""
    for metric in one.metrics:
        pairs = np.array([[each.scores[each.base.name, case][metric] for each in (one, two)] for case in one.cases])
        pairs = pairs[np.isfinite(pairs).all(1)]
        if len(pairs) and np.abs(pairs[:, 0] - pairs[:, 1]).mean() > 0.1 * pairs[:, 0].std() + 1e-6:
            raise ValueError(
                f"{one.folders[0]} and {two.folders[0]} give the base's videos other scores ({metric}): by another "
                "reward, or with other guidance; evaluate their models together: rlvid evaluate RUN RUN"
            )


def _joined(one: Evidence, two: Evidence) -> Evidence:
    taken, names = {m.name for m in one.models}, {}
    for model in two.tuned:
        name = model.name if model.name not in taken else f"{model.name} ({two.folders[0].name})"
        while name in taken:
            name += "'"
        taken.add(name)
        names[model.name] = name
    added = [
        replace(m, name=names[m.name], label=m.label if names[m.name] == m.name else names[m.name]) for m in two.tuned
    ]
    return replace(
        one,
        folders=one.folders + two.folders,
        models=(*one.models, *added),
        scores=one.scores | {(names[m], case): v for (m, case), v in two.scores.items() if m in names},
        differences=one.differences | {(names[m], *rest): d for (m, *rest), d in two.differences.items() if m in names},
        parts=one.parts + tuple(Part(part.folder, part.path, names) for part in two.parts),
    )


def _scores(folder: Path, about: About) -> dict[tuple[str, Case], dict[str, float]]:
    rows = score_rows(folder, about)
    return {(key[0], Case(*key[1:])): {m: row[m] for m in about.metrics} for key, row in rows.items()}


def _differences(folder: Path, sets: dict[str, list[str]]) -> dict[tuple[str, str, int, str], Difference]:
    columns = ("model", "set", "steps", "metric", "pairs", "difference", "low", "high")
    rows = read_table(folder, folder / "comparison.parquet", columns)
    return {
        (row["model"], row["set"], row["steps"], row["metric"]): Difference(
            row["pairs"], row["difference"], row["low"], row["high"],
            min(row["pairs"], len(set(sets.get(row["set"], ())))),
        )
        for row in rows
    }  # fmt: skip


def _parts(folder: Path, models: tuple[Model, ...]) -> Iterable[Part]:
    names = {model.name: model.name for model in models}
    for path in sorted((folder / "videos").glob("*.parquet")):
        yield Part(folder, path, names)
