"""The guard's rule for over-optimisation, on numbers alone.

An evaluation has, for each metric, one value per prompt: the mean over the prompt's videos. Evaluation 0 is the base
model. All evaluations have the same prompts and the same noise, so two evaluations are compared prompt by prompt.

==============  ====================================================================================================
word            meaning
==============  ====================================================================================================
best            the evaluation with the largest mean held-out reward up to the warning (later ones cannot win)
lost(m, t)      metric m of evaluation t is below (1 - ``TOLERANCE[m]``) of its value at its best evaluation b before t,
                beyond noise: the one-sided paired t interval of ``x_t - (1 - tolerance) x_b`` at level ``alpha / t``
                is below 0. The division by t is Bonferroni's correction: b was chosen among t earlier evaluations, and
                the largest of several noisy means is too good by chance. The level of each of r held-out rewards is
                ``alpha / (t r)``, because one of them is enough for a warning
rising(t)       the mean trained reward of evaluation t is above the one at the best evaluation
warning(m)      lost(m) and rising at two evaluations in a row; once for each metric
collapse        lost(held-out reward) and lost(trained reward) at two evaluations in a row: training itself went wrong
==============  ====================================================================================================

The warning of a held-out reward says that the run is over-optimised. Those of temporal consistency, motion and
diversity are called side effects. Where fewer than two prompts have finite values, there is no verdict.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from rlvid.metric_names import REWARD_PREFIX
from rlvid.shapes import ROUNDING
from rlvid.stats import finite_mean, one_sided_half

MetricValues = Mapping[str, Sequence[float]]
"""Metric -> one value a prompt; NaN where a video was not finite."""

TRAINED, HELD_OUT = "reward", "held_out"
COLLAPSE = "collapse"
TOLERANCE = {HELD_OUT: 0.0, "consistency": 0.02, "motion": 0.25, "diversity": 0.25}
"""Share of its best value that a metric may lose: a better video may move or vary less than a noisy one."""
ALPHA = 0.05


def is_held_out(metric: str) -> bool:
    """Returns whether a metric is a held-out reward: the run's own, or one of ``guard.rewards``."""
    return metric == HELD_OUT or metric.startswith(REWARD_PREFIX)


def is_fatal(metric: str) -> bool:
    """Returns whether a metric's warning says that training does harm."""
    return metric == COLLAPSE or is_held_out(metric)


def held_out_rewards(values: MetricValues) -> list[str]:
    """Returns the held-out rewards that have a value."""
    return [metric for metric, each in values.items() if is_held_out(metric) and any(map(math.isfinite, each))]


@dataclass(frozen=True)
class Loss:
    """The loss of ``metric`` at evaluation ``at`` against evaluation ``best``: means, and the difference's interval."""

    metric: str
    at: int
    best: int
    before: float
    after: float
    half: float

    @property
    def difference(self) -> float:
        """After less before."""
        return self.after - self.before


@dataclass(frozen=True)
class Verdict:
    """The verdict on all evaluations so far; an evaluation is given by its place.

    Attributes:
        best: the evaluation with the largest mean of the run's own held-out reward up to the warning.
        warnings: by metric, the loss at the evaluation that raised its warning, in order of evaluations; ``COLLAPSE``
            has that of the held-out reward.
        losses: all losses at the last evaluation, whether or not there is a warning.
        held_out: mean held-out reward of each evaluation.
    """

    best: int
    warnings: dict[str, Loss] = field(default_factory=dict)
    losses: tuple[Loss, ...] = ()
    held_out: tuple[float, ...] = ()

    @property
    def over_optimised(self) -> bool:
        """Whether a held-out reward has raised its warning."""
        return any(map(is_held_out, self.warnings))

    @property
    def fatal_loss(self) -> Loss | None:
        """The first warning after which training does harm: over-optimised, or collapsed."""
        return min(
            (loss for metric, loss in self.warnings.items() if is_fatal(metric)),
            key=lambda loss: loss.at, default=None,
        )  # fmt: skip


class _Peak(NamedTuple):
    """The largest mean of a metric so far, and its evaluation."""

    at: int
    mean: float


def judge(evaluations: Sequence[MetricValues]) -> Verdict:
    """Judges evaluations in the order of their steps, the base model first; the rule is at the top of this file.

    Raises:
        ValueError: no evaluations, or numbers of prompts that differ.
    """
    if not evaluations:
        raise ValueError("judge: no evaluations; the base model's is the first")
    held_out = tuple(finite_mean(evaluation[HELD_OUT]) for evaluation in evaluations)
    best = 0
    watched = dict.fromkeys([*TOLERANCE, *filter(is_held_out, evaluations[0])])
    warnings, before, lost = dict[str, Loss](), dict[str, Loss](), dict[str, Loss]()
    peaks = dict[str, _Peak]()
    for at in range(1, len(evaluations)):
        for metric in (*watched, TRAINED):
            mean = finite_mean(evaluations[at - 1][metric])
            if math.isfinite(mean) and (metric not in peaks or mean > peaks[metric].mean):
                peaks[metric] = _Peak(at - 1, mean)
        losses = {m: loss for m, peak in peaks.items() if (loss := lost_at(evaluations, m, at, peak.at))}
        rising = finite_mean(evaluations[at][TRAINED]) > finite_mean(evaluations[best][TRAINED])
        lost = {m: losses[m] for m in watched if m in losses and rising}
        if HELD_OUT in losses and TRAINED in losses:
            lost[COLLAPSE] = replace(losses[HELD_OUT], metric=COLLAPSE)
        warnings |= {m: loss for m, loss in lost.items() if m in before and m not in warnings}
        harmful = any(map(is_fatal, warnings))
        if not harmful and math.isfinite(held_out[at]) and not held_out[best] >= held_out[at]:
            best = at
        before = lost
    return Verdict(best, warnings, tuple(lost.values()), held_out)


def lost_at(evaluations: Sequence[MetricValues], metric: str, at: int, best: int) -> Loss | None:
    """Returns the loss of ``metric`` at evaluation ``at`` beyond tolerance and noise; None if there is none.

    ``best`` is the first evaluation with the metric's largest mean before ``at``.
    """
    before, after = (np.asarray(evaluations[place][metric], dtype=np.float64) for place in (best, at))
    if before.shape != after.shape:
        raise ValueError(f"judge: evaluations {best} and {at} have {len(before)} and {len(after)} prompts")
    both = np.isfinite(before) & np.isfinite(after)
    before, after = before[both], after[both]
    left = after - (1 - TOLERANCE.get(metric, 0.0)) * before
    if len(left) < 2:
        return None
    tests = at * (sum(map(is_held_out, evaluations[0])) if is_held_out(metric) else 1)
    half = max(one_sided_half(left.tolist(), ALPHA / tests), ROUNDING * float(np.abs(before).max()))
    if not float(left.mean()) + half < 0:
        return None
    return Loss(metric, at, best, float(before.mean()), float(after.mean()), half)
