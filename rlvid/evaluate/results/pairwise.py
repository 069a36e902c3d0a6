"""Compares every pair of rows of a table, over all prompts: which is higher, and is the difference beyond chance?

There are two sources of chance, each with its own bound. ``low`` and ``high`` are a bootstrap over prompts, paired by
prompt and noise, for the seeds that were trained. ``half_width`` is that of Welch's interval over seeds, for these
prompts: with v the variance of the seeds' means and n their number, the difference ± t sqrt(v1 / n1 + v2 / n2).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rlvid.evaluate.results.rows import Row, metrics_of
from rlvid.evaluate.results.summary import BootstrapGain
from rlvid.metric_names import main_metrics
from rlvid.stats import bootstrap_interval, welch

MAX_PAIRWISE_ROWS = 10
"""Largest number of rows; more rows have too many pairs to read."""


@dataclass(frozen=True)
class Pairwise(BootstrapGain):
    """The difference of ``first`` and ``second``; NaN where there is no bound: one prompt, or one seed.

    ``videos`` counts the noises, of ``prompts`` prompts, from which all models of both rows have a finite score.
    """

    first: str
    second: str
    steps: int
    metric: str
    videos: int
    prompts: int
    difference: float
    low: float
    high: float
    half_width: float

    @property
    def significant(self) -> bool:
        """Whether the difference is beyond every bound that there is, over enough prompts."""
        by_seeds = not math.isfinite(self.half_width) or abs(self.difference) > self.half_width
        return self.way != 0 and by_seeds


def pairwise(rows: Sequence[Row], groups: Mapping[str, Sequence[str]], base: str) -> list[Pairwise]:
    """Compares every pair of rows, for each number of steps and metric; the higher one is ``first``.

    Args:
        rows: of one prompt set, see ``rlvid.evaluate.results.rows.pooled``.
        groups: names of models by the row that they are together.
        base: name of the base model, a row of its own.
    """
    metrics, videos = main_metrics(metrics_of(rows)), dict[int, dict[tuple[int, int], dict[str, Row]]]()
    for row in rows:
        videos.setdefault(row.steps, {}).setdefault((row.index, row.copy), {})[row.model] = row
    members, found = {base: [base], **groups}, []
    for steps, by_video in videos.items():
        for metric in metrics:
            for pair in combinations(members, 2):
                sides = [
                    np.array([[by[name].score(metric) for name in members[row]] for by in by_video.values()])
                    for row in pair
                ]
                whole = np.isfinite(np.concatenate(sides, 1)).all(1)
                prompts = np.array([index for index, _ in by_video])[whole]
                if whole.any():
                    one, other = (1, 0) if sides[1][whole].mean() > sides[0][whole].mean() else (0, 1)
                    seeds = [[] if pair[i] == base else sides[i][whole].mean(0).tolist() for i in (one, other)]
                    gains = sides[one][whole].mean(1) - sides[other][whole].mean(1)
                    low, high = bootstrap_interval(gains, prompts)
                    counts = (len(gains), len(set(prompts.tolist())))
                    found.append(
                        Pairwise(
                            pair[one], pair[other], steps, metric, *counts, float(gains.mean()), low, high,
                            welch(*seeds),
                        )
                    )  # fmt: skip
    return found
