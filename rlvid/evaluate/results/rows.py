"""Scores of videos: one row per video."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import pyarrow as pa

from rlvid.metric_names import REWARD_PREFIX
from rlvid.stats import finite_mean

ALL = "all_prompts"
"""The set of all videos, where there are several sets."""
VIDEO = pa.schema({
    "model": pa.string(), "set": pa.string(), "steps": pa.int32(), "index": pa.int32(), "copy": pa.int32(),
    "prompt": pa.string(),
})  # fmt: skip
"""The columns that say which video a row is of."""


@dataclass(frozen=True)
class Row:
    """One video and its scores; NaN where a metric does not apply or the video is not finite.

    ``reward`` is the mean over all frames of the image reward that was trained on, ``held_out`` that of the one that
    was not; ``consistency`` is of consecutive frames, the paper's, and two other definitions stand beside it (see
    ``rlvid.evaluate.metrics``); ``diversity`` compares the videos that a prompt has in one batch, where there are
    several. ``oracle_*`` are ``rlvid.world.grade.grade``'s. ``copy`` tells the videos of a prompt apart. ``extra``
    holds further rewards under the names of their metrics, ``reward_NAME``, and metrics of other versions.
    """

    model: str
    set: str
    steps: int
    index: int
    prompt: str
    reward: float
    held_out: float
    clipsim: float
    consistency: float
    consistency_all_pairs: float
    consistency_vbench: float
    motion: float
    flickering: float
    diversity: float
    oracle_subject: float
    oracle_colour: float
    oracle_background: float
    oracle_motion: float
    oracle_sharpness: float
    oracle_fidelity: float
    oracle_score: float
    copy: int = 0
    extra: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(columns: Mapping[str, Any]) -> "Row":
        """Makes a row from the columns of a table; a missing metric is NaN, other columns are ignored."""
        video = {name: columns[name] for name in VIDEO.names}
        scores = {metric: columns.get(metric, math.nan) for metric in METRICS}
        extra = {name: value for name, value in columns.items() if name.startswith(REWARD_PREFIX)}
        return Row(**video, **scores, extra=extra)

    def score(self, metric: str) -> float:
        """Returns the score of a metric or a further reward; NaN where it was not measured."""
        further = metric in self.extra or metric.startswith(REWARD_PREFIX)
        return self.extra.get(metric, float("nan")) if further else getattr(self, metric)


METRICS = tuple(each.name for each in fields(Row) if each.type is float)
"""Every metric of a ``Row`` but further rewards, by the name of its field."""


def metrics_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """``METRICS``, then the further rewards that any of the rows has."""
    return (*METRICS, *dict.fromkeys(name for row in rows for name in row.extra))


def per_prompt(rows: Iterable[Row], metrics: Iterable[str]) -> dict[str, list[float]]:
    """Returns, for each metric, the mean over the finite videos of each prompt (NaN without one), in their order.

    Args:
        rows: of one model and prompt set; the videos of a prompt follow each other.
        metrics: names of metrics, and of further rewards.
    """
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.index)]
    return {metric: [finite_mean(row.score(metric) for row in group) for group in groups] for metric in metrics}


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Joins the rows of all prompt sets into one set, in which every prompt has its own index; a single set stays."""
    sets = list(dict.fromkeys(row.set for row in rows))
    if len(sets) < 2:
        return list(rows)
    longest = 1 + max(row.index for row in rows)
    return [replace(row, set=ALL, index=sets.index(row.set) * longest + row.index) for row in rows]


def rows_table(rows: Iterable[Row]) -> pa.Table:
    """Returns all videos, one a row, without their frames: float32 scores, NaN where there is none."""
    rows = list(rows)
    columns = {each.name: pa.array([getattr(row, each.name) for row in rows], each.type) for each in VIDEO}
    scores = {m: pa.array([row.score(m) for row in rows], pa.float32()) for m in metrics_of(rows)}
    return pa.table(columns | scores)
