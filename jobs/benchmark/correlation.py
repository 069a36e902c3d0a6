"""Spearman's rank correlation of rewards and metrics with the oracle over the checkpoints of runs, on numbers alone.

===========  =========================================================================================================
word         meaning
===========  =========================================================================================================
checkpoint   a candidate of a run other than the base model. The base is left out, because nearly every checkpoint is
             better than it by every reward, and one pair that is easy to order would hide the others
value        the mean over prompts of a metric, and of the oracle's score on the same videos
pooled       the correlation over the checkpoints of all runs together
within       the mean over runs of the correlation over the checkpoints of one run. A run of fewer than ``LEAST``
             checkpoints with values, or of one value alone, has none
===========  =========================================================================================================

Intervals are percentiles over resamples of whole runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.benchmark.regret import ORACLE, Mean, MeasuredRun
from rlvid.metric_names import REWARD_PREFIX
from rlvid.runs.over_optimisation import HELD_OUT, TRAINED
from rlvid.runs.recommendation import VETO
from rlvid.stats import RESAMPLES, bootstrap_interval, finite_mean

LEAST = 3
"""Checkpoints of a run from which on it has a correlation."""


@dataclass(frozen=True)
class Correlation:
    """The correlation of a metric with the oracle.

    Attributes:
        runs: that have the metric.
        checkpoints: of these runs.
        pooled: over all of them.
        within: the mean over runs.
        with_value: runs that have a correlation of their own.
    """

    runs: int
    checkpoints: int
    pooled: Mean
    within: Mean
    with_value: int


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, where ties share the mean of their ranks.

    Args:
        first: N finite values.
        second: N more.

    Returns:
        NaN for fewer than ``LEAST`` pairs, or where all values of a side are equal.
    """
    from scipy.stats import rankdata  # half a second, which the other commands save

    if len(first) < LEAST:
        return math.nan
    ranks_2N = np.array([rankdata(first), rankdata(second)])
    ranks_2N -= ranks_2N.mean(axis=1, keepdims=True)
    norms = np.sqrt((ranks_2N**2).sum(axis=1))
    return float(ranks_2N[0] @ ranks_2N[1] / norms.prod()) if norms.all() else math.nan


def correlate(runs: Sequence[MeasuredRun]) -> dict[str, Correlation]:
    """Returns the correlation of each metric with the oracle's score; metrics that no run has are left out.

    Where runs were trained on several rewards, each is a metric of its own, ``reward: NAME``, over its runs; held-out
    rewards are the same.
    """
    seen = {metric for run in runs for each in run.candidates for metric in each.values}
    further = sorted(metric for metric in seen if metric.startswith(REWARD_PREFIX))
    asked = [*_by_reward(TRAINED, [run.trained for run in runs], runs)]
    asked += _by_reward(HELD_OUT, [run.held_out for run in runs], runs)
    asked += [(metric, metric, list(runs)) for metric in (*further, *VETO)]
    points = {key: [each for run in own if len(each := _points(run, metric))] for key, metric, own in asked}
    return {key: _correlation(each) for key, each in points.items() if each}


def _by_reward(
    metric: str, names: Sequence[str], runs: Sequence[MeasuredRun]
) -> Iterator[tuple[str, str, list[MeasuredRun]]]:
    """Yields the key of each reward that a metric is, the metric and its runs."""
    for name in (different := sorted(set(names))):
        own = [run for run, its in zip(runs, names, strict=True) if its == name]
        yield f"{metric}: {name}" if len(different) > 1 else metric, metric, own


def _points(run: MeasuredRun, metric: str) -> np.ndarray:
    """Returns the values of a run's checkpoints (C, 2): the metric's and the oracle's, both finite."""
    tuned = [each.values for each in run.candidates if each.step and metric in each.values]
    means = [(finite_mean(each[metric]), finite_mean(each[ORACLE])) for each in tuned]
    return np.array([each for each in means if all(map(math.isfinite, each))], dtype=np.float64).reshape(-1, 2)


def _correlation(points: Sequence[np.ndarray]) -> Correlation:
    """Correlates the columns of the arrays (C, 2) of all runs."""
    own = np.array([spearman(*each.T) for each in points])
    own = own[np.isfinite(own)]
    together = np.concatenate(points)
    within = Mean(finite_mean(own), *bootstrap_interval(own, np.arange(len(own))))
    pooled = Mean(spearman(*together.T), *_pooled_interval(points))
    return Correlation(len(points), len(together), pooled, within, len(own))


def _pooled_interval(points: Sequence[np.ndarray]) -> tuple[float, float]:
    """Ends of the pooled correlation's 95 % interval over resamples of runs; NaN for fewer than two runs."""
    if len(points) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(0, len(points), (RESAMPLES, len(points)))
    # Of a few runs most resamples are alike, and the order of runs does not count: each is correlated once.
    different, which = np.unique(np.sort(drawn, axis=1), axis=0, return_inverse=True)
    found = np.array([spearman(*np.concatenate([points[place] for place in each]).T) for each in different])
    found = found[which.reshape(-1)]
    found = found[np.isfinite(found)]
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (math.nan, math.nan)
    return float(low), float(high)
