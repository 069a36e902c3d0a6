"""The guard's rule for the checkpoint and the scale of the learned change to keep, on numbers alone.

A candidate is a checkpoint at a scale of the learned change. It has, for each metric, one value per prompt: the mean
over the prompt's videos. All candidates have the same prompts and the same noise, so two candidates are compared
prompt by prompt. The first candidate is the base model. The trained reward is never read: it knows what it was
trained for, and nothing of what was lost.

============  ======================================================================================================
word          meaning
============  ======================================================================================================
gain(j, c)    the mean difference of held-out reward j of candidate c from that of the base, in standard deviations of
              the base's values over prompts. Deviations make rewards of different units comparable
gain(c)       the least gain(j, c) over all held-out rewards. Where they disagree, the least favourable one counts
real(c)       the differences of each prompt, in these deviations and averaged over the rewards, have a mean above 0
              beyond noise: the lower end of their one-sided t interval, at level ``ALPHA``, is above 0
vetoed(c)     consistency, motion or diversity of c is below (1 - ``VETO``) of the base's, beyond noise: the upper end
              of the paired interval of ``c - (1 - veto) base`` is below 0
recommended   the candidate with the largest gain(c) that is above 0, among those that are real and not vetoed; of equal
              ones the smallest change, by the distance of its videos from the base's (where that was not measured, by
              scale and then step). Without one: the base model
============  ======================================================================================================

Noise decides whether to leave the base model, and not which candidate to take: in the built-in world, candidates with a
large and uncertain gain are better by the oracle than those with a small and certain one (docs/guard.md). A candidate
that lacks a value where the base has one is not considered, because some of its videos are not finite.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlvid.metric_names import Metric, metric_of
from rlvid.runs.over_optimisation import ALPHA, HELD_OUT, TOLERANCE, MetricValues, held_out_rewards
from rlvid.shapes import ROUNDING
from rlvid.stats import finite_mean, one_sided_half

DISTANCE = "distance"
VETO = {"consistency": TOLERANCE["consistency"], "motion": TOLERANCE["motion"], "diversity": 0.9}
"""Share of the base's value that a candidate may lose. Much of a base model's diversity is faults that differ: runs
that gain by the oracle of the built-in world keep a tenth to two thirds of it."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, by its step (0 is the base model), at a scale of the learned change, and its values per prompt."""

    step: int
    scale: float
    values: MetricValues

    @property
    def name(self) -> str:
        """As a sentence calls it."""
        if not self.step:
            return "the base model"
        return f"step {self.step}" + (f" at scale {self.scale:g}" if self.scale != 1 else "")


class Gain(NamedTuple):
    """The gain of a candidate in its least favourable held-out reward."""

    metric: Metric
    mean: float
    half: float
    deviations: float
    """In standard deviations of the base's values; NaN where there are fewer than two prompts."""
    real: bool
    """Whether the mean gain over all held-out rewards is beyond noise."""

    @property
    def counts(self) -> bool:
        """Whether the candidate may be recommended."""
        return self.real and self.deviations > 0


@dataclass(frozen=True)
class Recommendation:
    """The recommended step (0 is the base model) and scale, and the reason in one line."""

    step: int
    scale: float
    reason: str

    def spec(self, run: str) -> str:
        """Returns RUN@STEP*SCALE, which ``rlvid evaluate`` and other commands take; in words for the base model."""
        if not self.step:
            return "the base model"
        return f"{run}@{self.step}" + (f"*{self.scale:g}" if self.scale != 1 else "")


def recommend(candidates: Sequence[Candidate]) -> Recommendation:
    """Recommends a candidate; the rule is at the top of this file.

    Args:
        candidates: the base model, then the others in any order.

    Raises:
        ValueError: the first is not the base model, or numbers of prompts differ.
    """
    if not candidates or candidates[0].step:
        raise ValueError("recommend: the base model's evaluation must be the first candidate")
    base, others = candidates[0], candidates[1:]
    gains = {place: least_gain(each, base) for place, each in enumerate(others)}
    faults = {place: vetoes(each, base) for place, each in enumerate(others) if gains[place].counts}
    eligible = [place for place, vetoed in faults.items() if not vetoed]
    left_out = _left_out(list(faults.values()))
    if not eligible:
        return Recommendation(0, 1.0, _no_gain(others, gains, left_out))
    chosen = min(eligible, key=lambda place: (-gains[place].deviations, *_change(others, place)))
    found, gain = others[chosen], gains[chosen]
    rewards = len(held_out_rewards(base.values))
    reason = f"{gain.metric.spoken} {gain.metric.change(gain.mean)}{gain.metric.margin(gain.half)} against the base"
    reason += f", the least gain of {rewards} held-out rewards" if rewards > 1 else ""
    return Recommendation(found.step, found.scale, reason + left_out)


def least_gain(candidate: Candidate, base: Candidate) -> Gain:
    """Returns the gain of the held-out reward in which a candidate gains least."""
    found, scaled, roundings = list[Gain](), list[np.ndarray](), list[float]()
    for metric in held_out_rewards(base.values):
        values, before = _pairs(candidate, base, metric)
        mean, half = _interval(values - before, before)
        spread = float(before.std(ddof=1)) if len(before) > 1 else math.nan
        rounding = _rounding(before)
        unit = max(spread, rounding, 1e-12)
        whole = _complete(candidate, base, metric)
        found.append(Gain(metric_of(metric), mean, half, mean / unit if whole else math.nan, False))
        scaled.append((np.asarray(candidate.values[metric]) - np.asarray(base.values[metric])) / unit)
        roundings.append(rounding / unit)
    if not found:
        return Gain(metric_of(HELD_OUT), math.nan, math.nan, math.nan, False)
    mean_P = [each for each in np.mean(scaled, axis=0).tolist() if math.isfinite(each)]
    real = finite_mean(mean_P) > max(one_sided_half(mean_P, ALPHA), finite_mean(roundings))
    least = min(found, key=lambda gain: gain.deviations if math.isfinite(gain.deviations) else -math.inf)
    return least._replace(real=real)


def vetoes(candidate: Candidate, base: Candidate) -> list[str]:
    """Returns the metrics of which a candidate has lost too much against the base."""
    return [metric for metric, share in VETO.items() if _falls(candidate, base, metric, share)]


def _falls(candidate: Candidate, other: Candidate, metric: str, share: float) -> bool:
    """Whether a metric is below (1 - share) of the other's, beyond noise."""
    values, before = _pairs(candidate, other, metric)
    mean, half = _interval(values - (1 - share) * before, before)
    return mean + half < 0


def _interval(differences: np.ndarray, before: np.ndarray) -> tuple[float, float]:
    """Mean of differences, and the distance to an end of its one-sided interval, at least the rounding of values."""
    mean = float(differences.mean()) if len(differences) else math.nan
    return mean, max(one_sided_half(differences.tolist(), ALPHA), _rounding(before))


def _rounding(values: np.ndarray) -> float:
    return ROUNDING * float(np.abs(values).max(initial=0.0))


def _pairs(candidate: Candidate, other: Candidate, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of both over the prompts where both are finite."""
    values, before = (np.asarray(each.values[metric], dtype=np.float64) for each in (candidate, other))
    if values.shape != before.shape:
        raise ValueError(f"recommend: {candidate.name} has {len(values)} prompts, and {other.name} {len(before)}")
    both = np.isfinite(values) & np.isfinite(before)
    return values[both], before[both]


def _complete(candidate: Candidate, base: Candidate, metric: str) -> bool:
    pairs = zip(candidate.values[metric], base.values[metric], strict=True)
    return all(math.isfinite(value) or not math.isfinite(before) for value, before in pairs)


def _change(others: Sequence[Candidate], place: int) -> tuple[float, float, int]:
    """The size of a candidate's change: its distance where all were measured, then scale and step."""
    means = [finite_mean(each.values.get(DISTANCE, ())) for each in others]
    distance = means[place] if all(map(math.isfinite, means)) else 0.0
    return distance, others[place].scale, others[place].step


def _left_out(faults: Iterable[Sequence[str]]) -> str:
    """Counts the candidates that gained and were vetoed, as the end of a sentence."""
    vetoed = [each for each in faults if each]
    if not vetoed:
        return ""
    counts = {metric: sum(metric in each for each in vetoed) for metric in VETO}
    why = ", ".join(f"{metric_of(metric).spoken} {count}" for metric, count in counts.items() if count)
    return f"; {len(vetoed)} that gain lose too much else ({why})"


def _no_gain(others: Sequence[Candidate], gains: dict[int, Gain], left_out: str) -> str:
    """Returns the reason for the base model."""
    if not others:
        return "there is no other candidate yet"
    if left_out:
        return f"no candidate gains without a loss{left_out}"
    finite = [place for place in gains if math.isfinite(gains[place].deviations)]
    if not finite:
        return "no candidate has values of every held-out reward"
    best = max(finite, key=lambda place: gains[place].deviations)
    gain = gains[best]
    return (
        "no candidate gains in every held-out reward, and on their mean beyond noise; "
        f"the nearest is {others[best].name}, "
        f"{gain.metric.spoken} {gain.metric.change(gain.mean)}{gain.metric.margin(gain.half)}"
    )
