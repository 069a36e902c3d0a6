"""When a run is over-optimised: the rule of the guard, on numbers alone.

A look holds, for each metric, one value a prompt: the mean over the prompt's videos. Look 0 is the base model. All
looks have the same prompts and the same noise, so two looks are compared prompt by prompt.

==============  ====================================================================================================
word            meaning
==============  ====================================================================================================
best            the look with the largest mean held-out reward, of all up to the warning (later ones cannot win)
lost(m, t)      metric m of look t is below (1 - ``TOLERANCE[m]``) of its value at its own best look b before t,
                beyond noise: the one-sided paired t interval of ``x_t - (1 - tolerance) x_b`` at level ``alpha / t``
                is below 0. The t earlier looks among which b was chosen are so many comparisons, hence the division
                (Bonferroni): the largest of several noisy means looks too good, and what follows it too bad
rising(t)       the mean trained reward of look t is above the one at the best look
warning(m)      lost(m) and rising at two looks in a row; once for each metric
collapse        lost(held-out reward) and lost(trained reward) at two looks in a row: training itself went wrong
==============  ====================================================================================================

The warning of the held-out reward says that the run is over-optimised. Those of temporal consistency, motion and
diversity are side effects, and say so. Where fewer than two prompts have finite values, nothing is said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rlvid.shapes import ROUNDING
from rlvid.stats import finite_mean, t_quantile

MetricValues = Mapping[str, Sequence[float]]
"""Metric -> one value a prompt; NaN where a video was not finite."""

TRAINED, HELD_OUT = "reward", "held_out"
COLLAPSE = "collapse"
TOLERANCE = {HELD_OUT: 0.0, "consistency": 0.02, "motion": 0.25, "diversity": 0.25}
"""Share of its best value that a metric may lose: a better video may well move or vary less than a spoilt one."""
ALPHA = 0.05


@dataclass(frozen=True)
class Loss:
    """What metric ``metric`` of look ``at`` lost against look ``best``: means, and the interval of the difference."""

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
    """What the looks so far say; looks are given by their place.

    Attributes:
        best: the look with the largest mean held-out reward up to the warning.
        warnings: by metric, the loss at the look that raised its warning, in order of looks; ``COLLAPSE`` has that of
            the held-out reward.
        losses: everything that was lost at the last look, whether or not it is a warning.
        held_out: mean held-out reward of each look.
    """

    best: int
    warnings: dict[str, Loss] = field(default_factory=dict)
    losses: tuple[Loss, ...] = ()
    held_out: tuple[float, ...] = ()

    @property
    def over_optimised(self) -> bool:
        """Whether the held-out reward has raised its warning."""
        return HELD_OUT in self.warnings

    @property
    def spoilt(self) -> Loss | None:
        """The first warning after which training does harm: over-optimised, or collapsed."""
        return min(
            (loss for metric, loss in self.warnings.items() if metric in (HELD_OUT, COLLAPSE)),
            key=lambda loss: loss.at, default=None,
        )  # fmt: skip


def judge(looks: Sequence[MetricValues], alpha: float = ALPHA) -> Verdict:
    """The verdict on looks in the order of their steps, the base model first; see the top of this file.

    Raises:
        ValueError: no looks, or numbers of prompts that differ.
    """
    if not looks:
        raise ValueError("judge: no looks; the base model's is the first")
    held_out = tuple(finite_mean(look[HELD_OUT]) for look in looks)
    best = 0
    warnings, before, lost = dict[str, Loss](), dict[str, Loss](), dict[str, Loss]()
    for at in range(1, len(looks)):
        rising = finite_mean(looks[at][TRAINED]) > finite_mean(looks[best][TRAINED])
        lost = {m: loss for m in TOLERANCE if (loss := lost_at(looks, m, at, alpha)) and rising}
        if (loss := lost_at(looks, HELD_OUT, at, alpha)) and lost_at(looks, TRAINED, at, alpha):
            lost[COLLAPSE] = replace(loss, metric=COLLAPSE)
        warnings |= {m: loss for m, loss in lost.items() if m in before and m not in warnings}
        spoilt = bool({HELD_OUT, COLLAPSE} & warnings.keys())
        if not spoilt and math.isfinite(held_out[at]) and not held_out[best] >= held_out[at]:
            best = at
        before = lost
    return Verdict(best, warnings, tuple(lost.values()), held_out)


def lost_at(looks: Sequence[MetricValues], metric: str, at: int, alpha: float = ALPHA) -> Loss | None:
    """What ``metric`` lost at look ``at`` beyond its tolerance and noise; None where that cannot be said."""
    means = [finite_mean(look[metric]) for look in looks[:at]]
    if not any(map(math.isfinite, means)):
        return None
    best = int(np.nanargmax(means))
    before, after = (np.asarray(looks[place][metric], dtype=np.float64) for place in (best, at))
    if before.shape != after.shape:
        raise ValueError(f"judge: look {at} has {len(after)} prompts and look {best} has {len(before)}; give the same")
    both = np.isfinite(before) & np.isfinite(after)
    before, after = before[both], after[both]
    left = after - (1 - TOLERANCE.get(metric, 0.0)) * before
    if len(left) < 2:
        return None
    half = t_quantile(1 - alpha / at, len(left) - 1) * float(left.std(ddof=1)) / math.sqrt(len(left))
    half = max(half, ROUNDING * float(np.abs(before).max()))
    if not float(left.mean()) + half < 0:
        return None
    return Loss(metric, at, best, float(before.mean()), float(after.mean()), half)
