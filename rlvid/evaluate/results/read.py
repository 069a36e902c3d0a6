"""Reads an evaluation's folder: the one reader, for tables, cards, reports and studies.

``evaluation.yaml``         models, prompt sets, steps and metrics: ``rlvid.evaluate.results.about``
``evaluation.parquet``      the scores of every video: ``read_scores``
``comparison.parquet``      differences to the base: ``read_differences``
``evaluation.json``         means and comparisons, as the tables have them: ``read_results``
``videos/part-*.parquet``   the videos: ``rlvid.evaluate.results.videos``

``read_evaluation`` reads all but the JSON of a finished evaluation. Each file may come from somebody else, so each is
checked (``rlvid.evaluate.results.untrusted``); an error is a ValueError of one line that names the file.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from rlvid.evaluate.results.about import (
    About,
    Case,
    Count,
    ModelRecord,
    Name,
    StepCount,
    VideoKey,
    describe,
    key_of,
    read_about,
)
from rlvid.evaluate.results.rows import METRICS, VIDEO, Row
from rlvid.evaluate.results.summary import BootstrapGain, Comparison, Summary, summarise
from rlvid.evaluate.results.untrusted import CheckedModel, check, damaged, read_json, read_table
from rlvid.evaluate.results.videos import StoredVideo, find_videos

Scores = dict[VideoKey, dict[str, float]]
"""Metric -> value of each video; NaN where it was not measured."""
_Score = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class _Summary(CheckedModel):
    model: Name
    set: Name
    steps: StepCount
    count: Count
    broken: Count
    mean: dict[Name, _Score]
    std: dict[Name, _Score]
    used: dict[Name, Count]


class _Comparison(CheckedModel):
    base: Name
    tuned: Name
    set: Name
    steps: StepCount
    metric: Name
    pairs: Count
    prompts: Count
    excluded: Count
    difference: _Score
    low: _Score
    high: _Score
    in_base_std: _Score


class _Results(CheckedModel):
    facts: dict[str, str]
    summaries: list[_Summary]
    comparisons: list[_Comparison]


def read_results(path: Path) -> tuple[list[Summary], list[Comparison], dict[str, str]]:
    """Reads ``evaluation.json``: NaN where it has null, or lacks a metric.

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


def read_scores(folder: Path, about: About) -> Scores:
    """Reads ``evaluation.parquet``: every metric of every video, those that ``evaluation.yaml`` lacks too.

    Raises:
        ValueError: the evaluation is not finished, or the file is missing or damaged, lacks a metric, or has a video
            twice or one of others.
    """
    if not about.complete:
        raise ValueError(
            f"{folder}: the evaluation is not finished, and tables there may be of an earlier one; run `rlvid "
            "evaluate` again: it makes only what is missing"
        )
    path = folder / "evaluation.parquet"
    found: Scores = {}
    for row in read_table(folder, path, (*VIDEO.names, *about.metrics), metrics=True, limit=about.count):
        key = key_of(row)
        if not about.has(key):
            raise damaged(path, f"a video of {key[0]!r}, set {key[1].set!r}, is not in evaluation.yaml")
        if key in found:
            raise damaged(path, f"a video of {key[0]!r}, set {key[1].set!r}, is there twice")
        found[key] = {name: value for name, value in row.items() if name not in VIDEO.names}
    return found


@dataclass(frozen=True)
class Difference(BootstrapGain):
    """A metric's mean gain over the base in ``pairs`` pairs of videos, and its 95 % interval (NaN where unknown).

    ``prompts`` is how many prompts the pairs are of.
    """

    pairs: int
    difference: float
    low: float
    high: float
    prompts: int


def read_differences(folder: Path, about: About) -> dict[tuple[str, str, int, str], Difference]:
    """Reads ``comparison.parquet``: (model, set, steps, metric) -> its difference to the base.

    Raises:
        ValueError: the file is missing or damaged.
    """
    columns = ("model", "set", "steps", "metric", "pairs", "difference", "low", "high")
    return {
        (row["model"], row["set"], row["steps"], row["metric"]): Difference(
            row["pairs"], row["difference"], row["low"], row["high"],
            min(row["pairs"], len(set(about.sets.get(row["set"], ())))),
        )
        for row in read_table(folder, folder / "comparison.parquet", columns)
    }  # fmt: skip


@dataclass(frozen=True)
class EvaluationData:
    """A finished evaluation, or several joined: ``models[0]`` is the base, ``about`` is the first one's."""

    folders: tuple[Path, ...]
    about: About
    models: tuple[ModelRecord, ...]
    scores: Scores
    differences: dict[tuple[str, str, int, str], Difference]
    videos: dict[VideoKey, StoredVideo]

    @property
    def base(self) -> ModelRecord:
        """What the others are compared with."""
        return self.models[0]

    @property
    def tuned(self) -> tuple[ModelRecord, ...]:
        """All but the base."""
        return self.models[1:]

    @property
    def cases(self) -> list[Case]:
        """Every case, in the order of sets, D, prompts and copies."""
        return list(self.about.cases())

    @cached_property
    def rows(self) -> list[Row]:
        """The scores of all videos; NaN for metrics that the evaluation lacks."""
        further = [metric for metric in self.about.metrics if metric not in METRICS]
        return [
            replace(
                Row.of(
                    {metric: scores[metric] for metric in self.about.metrics}
                    | {"model": name, **case._asdict(), "prompt": self.prompt(case)}
                ),
                extra={metric: scores[metric] for metric in further},
            )
            for (name, case), scores in self.scores.items()
        ]

    @cached_property
    def summaries(self) -> dict[tuple[str, str, int], Summary]:
        """(model, set, steps) -> the summary of its videos."""
        return {(each.model, each.set, each.steps): each for each in summarise(self.rows)}

    def prompt(self, case: Case) -> str:
        """Returns the prompt of a case."""
        return self.about.sets[case.set][case.index]

    def gain(self, model: str, case: Case, metric: str) -> float:
        """Returns a model's gain over the base in one case; NaN where either has no number."""
        return self.scores[model, case][metric] - self.scores[self.base.name, case][metric]

    @property
    def judge(self) -> str:
        """The metric that cases are ranked by: the held-out reward, or the trained one where there is none."""
        known = self.about.metrics
        return next((m for m in ("held_out", "reward", *known) if m in known and self.has(m)), "reward")

    def has(self, metric: str) -> bool:
        """Returns whether any video has a number for a metric."""
        return any(each.used[metric] for each in self.summaries.values())


def read_evaluation(folder: Path) -> EvaluationData:
    """Reads a finished evaluation.

    Raises:
        ValueError: it is none or unfinished, a file of it is missing or damaged, a prompt is empty, or scores or
            videos are missing.
    """
    about = read_about(folder)
    scores = read_scores(folder, about)
    lacking = f"{folder / 'evaluation.parquet'}: {about.count - len(scores)} videos have no scores"
    _check_complete(about, scores, lacking)
    differences = read_differences(folder, about) if len(about.models) > 1 else {}
    videos = find_videos(folder, about)
    lacking = f"{folder / 'videos'}: {about.count - len(videos)} of {about.count} videos are missing"
    _check_complete(about, videos, lacking)
    return EvaluationData((folder,), about, tuple(about.models), scores, differences, videos)


def _check_complete(about: About, found: Collection[VideoKey], lacking: str) -> None:
    """Raises ValueError, which begins with ``lacking``, where a video of ``evaluation.yaml`` was not found."""
    if len(found) < about.count:
        first = next((m.name, case) for m in about.models for case in about.cases() if (m.name, case) not in found)
        raise ValueError(
            f"{lacking}, the first of {describe(first)}; run `rlvid evaluate` again: it makes only what is missing"
        )
