"""Regret of rules that choose a checkpoint and a scale of the learned change, on numbers alone.

All rules choose among the same candidates of a run: the base model, and every checkpoint at every scale. The oracle,
which no rule knows, says how good the choice was.

==============  ====================================================================================================
word            meaning
==============  ====================================================================================================
halves          the prompts of even and of odd places. A rule chooses on one half, the oracle chooses the best
                candidate on the same half, and both are read on the other half; then the halves change places. So no
                value is read where it was chosen, and the means are over all prompts
best gain       the oracle's score of the best candidate less that of the base
regret          the oracle's score of the best candidate less that of the rule's choice; its share is of the best gain
without gain    a run whose best gain is below ``ERRORS`` standard errors over prompts: its share would be noise, so
                only the loss against the base is shown, the oracle's score of the base less that of the choice
false alarm     an alarm (a fatal warning of the guard) after which a later checkpoint is better, by the oracle and
                beyond noise, than the best one up to the alarm; both are chosen on one half and read on the other
==============  ====================================================================================================

Intervals of means are bootstraps over groups, a group being a method at a learning rate and on a trained reward; the
interval of the share of false alarms is Wilson's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlvid.runs.over_optimisation import ALPHA, HELD_OUT, TRAINED, judge
from rlvid.runs.recommendation import Candidate, recommend
from rlvid.stats import bootstrap_interval, finite_mean, one_sided_half, wilson

ORACLE = "oracle_score"
ERRORS = 2.0
GUARD = "guard"
RULES = {
    GUARD: "the guard",
    "last": "last",
    TRAINED: "best by the trained reward",
    HELD_OUT: "best by the held-out reward",
    "fixed": "a fixed number of steps",
}
"""The rules that are compared, as tables call them."""


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run and its candidates, the base model first.

    Attributes:
        name: of the run.
        group: its method, learning rate and trained reward.
        candidates: the base model and the checkpoints at all scales.
        trained: the name of the trained reward.
        held_out: of the held-out one.
    """

    name: str
    group: str
    candidates: Sequence[Candidate]
    trained: str = ""
    held_out: str = ""

    def at_scale_1(self) -> "MeasuredRun":
        """Returns the run without the candidates of other scales."""
        return replace(self, candidates=[c for c in self.candidates if not c.step or c.scale == 1])

    @property
    def checkpoints(self) -> list[Candidate]:
        """The base and the checkpoints at scale 1, in the order of their steps."""
        return sorted(self.at_scale_1().candidates, key=lambda each: each.step)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        run: its name.
        group: its method, learning rate and trained reward.
        gain: the best gain.
        error: the standard error of the best gain over prompts.
        regret: rule -> regret.
        loss: rule -> loss against the base.
        choices: rule -> its choices on the two halves.
        best: the oracle's on the two halves.
    """

    run: str
    group: str
    gain: float
    error: float
    regret: dict[str, float]
    loss: dict[str, float]
    choices: dict[str, tuple[str, str]]
    best: tuple[str, str]

    @property
    def has_gain(self) -> bool:
        """Whether the best gain is beyond noise."""
        return self.gain > 0 and self.gain >= ERRORS * self.error


@dataclass(frozen=True)
class Mean:
    """A mean over runs and the ends of its interval, NaN where there are fewer than two groups."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RuleSummary:
    """A rule over all runs.

    Attributes:
        share: regret as a share of the best gain, over runs with a gain.
        median: of the same shares; a few bad choices do not move it.
        regret: the same in the oracle's score.
        excess: the share of this rule less the guard's, run by run.
        loss: against the base, over runs without a gain.
    """

    share: Mean
    median: float
    regret: Mean
    excess: Mean
    loss: Mean


@dataclass(frozen=True)
class Alarm:
    """The first fatal warning of a run: its step, and whether it was false; None without a later checkpoint."""

    run: str
    step: int
    false: bool | None


def choose(rule: str, candidates: Sequence[Candidate], fixed: int) -> int:
    """Returns the place of a rule's choice.

    Args:
        rule: of ``RULES``.
        candidates: the base model first.
        fixed: the fixed number of steps; the nearest checkpoint is taken, of two the earlier.
    """
    whole = [place for place, each in enumerate(candidates) if each.step and each.scale == 1]
    if rule == "last":
        return max(whole, key=lambda place: candidates[place].step)
    if rule == "fixed":
        return min(whole, key=lambda place: (abs(candidates[place].step - fixed), candidates[place].step))
    if rule == GUARD:
        found = recommend(candidates)
        chosen = (found.step, found.scale)
        return [(each.step, each.scale if each.step else 1.0) for each in candidates].index(chosen)
    return _largest([finite_mean(each.values[rule]) for each in candidates])


def measure(run: MeasuredRun, fixed: int) -> Outcome:
    """Measures the regret of every rule in a run; see the top of this file."""
    oracle_CP = _oracle(run.candidates)
    gains, regrets = list[np.ndarray](), {rule: list[np.ndarray]() for rule in RULES}
    choices, best = {rule: list[str]() for rule in RULES}, list[str]()
    for chosen_on, read_on in _halves():
        seen, read_CP = [_part(each, chosen_on) for each in run.candidates], oracle_CP[:, read_on]
        top = _largest(_means(oracle_CP[:, chosen_on]))
        best.append(seen[top].name)
        gains.append(read_CP[top] - read_CP[0])
        for rule in RULES:
            place = choose(rule, seen, fixed)
            choices[rule].append(seen[place].name)
            regrets[rule].append(read_CP[top] - read_CP[place])
    gain_P = np.concatenate(gains)
    finite = gain_P[np.isfinite(gain_P)]
    error = float(finite.std(ddof=1)) / math.sqrt(len(finite)) if len(finite) > 1 else math.nan
    gain, regret = finite_mean(gain_P), {rule: finite_mean(np.concatenate(each)) for rule, each in regrets.items()}
    loss = {rule: each - gain for rule, each in regret.items()}
    named = {rule: (each[0], each[1]) for rule, each in choices.items()}
    return Outcome(run.name, run.group, gain, error, regret, loss, named, (best[0], best[1]))


def summarise(outcomes: Sequence[Outcome]) -> dict[str, RuleSummary]:
    """Returns the means of every rule over runs, with intervals over groups."""
    with_gain = [each for each in outcomes if each.has_gain]
    without = [each for each in outcomes if not each.has_gain]
    found = dict[str, RuleSummary]()
    for rule in RULES:
        regret = [each.regret[rule] for each in with_gain]
        share = [each.regret[rule] / each.gain for each in with_gain]
        excess = [(each.regret[rule] - each.regret[GUARD]) / each.gain for each in with_gain]
        found[rule] = RuleSummary(
            _over(with_gain, share), float(np.median(share)) if share else math.nan, _over(with_gain, regret),
            _over(with_gain, excess), _over(without, [each.loss[rule] for each in without]),
        )  # fmt: skip
    return found


def find_alarm(run: MeasuredRun) -> Alarm | None:
    """Returns the first fatal warning of a run that went to its end, or None."""
    found = run.checkpoints
    fatal = judge([each.values for each in found]).fatal_loss
    if fatal is None:
        return None
    alarm = Alarm(run.name, found[fatal.at].step, None)
    oracle_CP, later = _oracle(found), fatal.at + 1
    if later == len(found):
        return alarm
    differences = []
    for chosen_on, read_on in _halves():
        means = _means(oracle_CP[:, chosen_on])
        before, after = _largest(means[:later]), later + _largest(means[later:])
        differences.append(oracle_CP[after, read_on] - oracle_CP[before, read_on])
    both = np.concatenate(differences)
    both = both[np.isfinite(both)]
    return replace(alarm, false=bool(both.mean() - one_sided_half(both.tolist(), ALPHA) > 0))


def false_alarms(alarms: Sequence[Alarm]) -> Mean:
    """Returns the share of false alarms among those before a later checkpoint, with Wilson's interval; NaN without."""
    judged = [each.false for each in alarms if each.false is not None]
    if not judged:
        return Mean(math.nan, math.nan, math.nan)
    share = sum(judged) / len(judged)
    return Mean(share, *wilson(share, len(judged)))


def _over(outcomes: Sequence[Outcome], values: Sequence[float]) -> Mean:
    if not outcomes:
        return Mean(math.nan, math.nan, math.nan)
    groups = np.array([each.group for each in outcomes])
    return Mean(float(np.mean(values)), *bootstrap_interval(np.array(values), groups))


def _oracle(candidates: Sequence[Candidate]) -> np.ndarray:
    """The oracle's score of each candidate (C) on each prompt (P)."""
    return np.array([each.values[ORACLE] for each in candidates], dtype=np.float64)


def _halves() -> list[tuple[slice, slice]]:
    even, odd = slice(0, None, 2), slice(1, None, 2)
    return [(even, odd), (odd, even)]


def _part(candidate: Candidate, places: slice) -> Candidate:
    return replace(candidate, values={metric: each[places] for metric, each in candidate.values.items()})


def _means(values_CP: np.ndarray) -> list[float]:
    return [finite_mean(each) for each in values_CP]


def _largest(means: Sequence[float]) -> int:
    """Returns the place of the largest mean, the first of equal ones; without any value the first."""
    return max(range(len(means)), key=lambda place: means[place] if math.isfinite(means[place]) else -math.inf)
