"""Judges a fitted reward on pairs that it was not fitted on: accuracy, calibration, and a single voter beside it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlvid.stats import bootstrap_interval, calibration, wilson


@dataclass(frozen=True)
class Judged:
    """A held-out pair on one axis: the difference of the raw scores of ``a`` and ``b``, and the votes for ``a``.

    ``named``: each vote has the name of its voter.
    """

    prompt: str
    kind: str
    axis: str
    difference: float
    votes: tuple[float, ...]
    named: bool = True

    @property
    def preference(self) -> float:
        """The mean of the votes."""
        return float(np.mean(self.votes))


@dataclass(frozen=True)
class Share:
    """A share of pairs with its 95 % interval."""

    share: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Verdict:
    """What held-out pairs say of a reward, on one axis.

    Attributes:
        accuracy: share of pairs with a majority in which the reward prefers what the majority prefers; the interval is
            a bootstrap over prompts, and at least Wilson's for as many answers as there are prompts.
        kinds: the same by kind of pair, of kinds that have pairs with a majority.
        voter: share of votes that agree with the majority of the other votes on their pair; None where nobody voted
            on a pair that others voted on. Pairs with votes without a name do not count: they may be of one person.
        instead: the same, of the reward in the place of each vote.
        log_loss: mean of Bradley and Terry's loss.
        least: the least that it could be, the entropy of the votes.
        bins: of the calibration: count, mean probability, mean preference.
        error: the expected calibration error.
    """

    axis: str
    accuracy: Share
    kinds: dict[str, Share]
    voter: Share | None
    instead: Share | None
    log_loss: float
    least: float
    bins: list[tuple[int, float, float]]
    error: float


def judge(pairs: Sequence[Judged], axis: str) -> Verdict:
    """Returns the verdict of the pairs with a vote on an axis.

    Raises:
        ValueError: there are none.
    """
    own = [pair for pair in pairs if pair.axis == axis]
    if not own:
        raise ValueError(f"the axis {axis!r} has no held-out pair; raise held_out, or ask about more prompts")
    difference_N = np.array([pair.difference for pair in own])
    preference_N = np.array([pair.preference for pair in own])
    # log(1 + exp(x)) without overflow
    loss_N = preference_N * np.logaddexp(0, -difference_N) + (1 - preference_N) * np.logaddexp(0, difference_N)
    bins, error = calibration(1 / (1 + np.exp(-difference_N.clip(-60, 60))), preference_N)
    kinds = sorted({pair.kind for pair in own if pair.kind and pair.preference != 0.5})
    return Verdict(
        axis,
        accuracy(own),
        {kind: accuracy([pair for pair in own if pair.kind == kind]) for kind in kinds},
        *_beside_a_voter(own),
        float(loss_N.mean()),
        float(_entropy(preference_N).mean()),
        bins,
        error,
    )


def accuracy(pairs: Iterable[Judged]) -> Share:
    """Returns the accuracy of the pairs with a majority; a score that ties counts half."""
    decided = [pair for pair in pairs if pair.preference != 0.5]
    right = np.array([0.5 + 0.5 * np.sign(pair.difference) * np.sign(pair.preference - 0.5) for pair in decided])
    return _share(right, [pair.prompt for pair in decided])


def _beside_a_voter(pairs: Iterable[Judged]) -> tuple[Share | None, Share | None]:
    """Returns how often a vote, and the reward in its place, agrees with the majority of the others; a tie is half."""
    agree, prompts = [], []
    for pair in pairs:
        for place, vote in enumerate(pair.votes if pair.named else ()):
            others = [*pair.votes[:place], *pair.votes[place + 1 :]]
            if others and vote != 0.5:
                both = np.sign([vote - 0.5, pair.difference])
                agree.append(0.5 + 0.5 * both * np.sign(float(np.mean(others)) - 0.5))
                prompts.append(pair.prompt)
    if not agree:
        return None, None
    voter_N, reward_N = np.array(agree).T
    return _share(voter_N, prompts), _share(reward_N, prompts)


def _share(right_N: np.ndarray, prompts: Sequence[str]) -> Share:
    if not len(right_N):
        return Share(float("nan"), 0.0, 1.0, 0)
    share = float(right_N.mean())
    low, high = wilson(share, count := len(set(prompts)))
    if count > 1:  # a bootstrap of pairs that are all right has no width
        ends = bootstrap_interval(right_N, np.array(prompts))
        low, high = min(low, ends[0]), max(high, ends[1])
    return Share(share, low, high, len(right_N))


def _entropy(preference_N: np.ndarray) -> np.ndarray:
    """Returns -p log p - (1 - p) log (1 - p), 0 for votes that are all alike."""
    both = np.stack([preference_N, 1 - preference_N])
    return -(both * np.log(np.where(both > 0, both, 1.0))).sum(0)
