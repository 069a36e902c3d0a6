"""The verdict on a fitted reward, held to sums by hand."""

import math

import numpy as np
import pytest

from rlvid.fitting.judge import Judged, judge
from rlvid.stats import calibration


def pair(prompt: str, difference: float, *votes: float, kind: str = "", axis: str = "quality") -> Judged:
    return Judged(prompt, kind, axis, difference, votes)


PAIRS = [
    pair("a", 2.0, 1.0, 1.0, 0.0, kind="structure"),  # right
    pair("a", -1.0, 0.0, kind="structure"),  # right
    pair("b", 1.0, 0.0, 0.0, kind="time"),  # wrong
    pair("b", 3.0, 0.5, kind="time"),  # no majority
    pair("c", 0.0, 1.0),  # a tie of scores
    pair("c", 9.0, 1.0, axis="motion"),
]


def test_accuracy_counts_pairs_with_a_majority_by_kind_and_axis() -> None:
    found = judge(PAIRS, "quality")
    assert (found.accuracy.share, found.accuracy.pairs) == (2.5 / 4, 4)
    assert found.accuracy.low <= found.accuracy.share <= found.accuracy.high
    assert {kind: (each.share, each.pairs) for kind, each in found.kinds.items()} == {
        "structure": (1.0, 2), "time": (0.0, 1),
    }  # fmt: skip
    assert judge(PAIRS, "motion").accuracy.share == 1
    with pytest.raises(ValueError, match="the axis 'colour' has no held-out pair"):
        judge(PAIRS, "colour")


def test_a_single_voter_and_the_reward_are_held_to_the_same_votes_of_others() -> None:
    found = judge(PAIRS, "quality")
    assert found.voter is not None
    assert found.instead is not None
    # of (1, 1, 0): each 1 meets a tie of the others, the 0 meets 1; of (0, 0): both agree
    assert (found.voter.share, found.voter.pairs) == ((0.5 + 0.5 + 0.0 + 1.0 + 1.0) / 5, 5)
    # the reward is for a in both pairs
    assert (found.instead.share, found.instead.pairs) == ((0.5 + 0.5 + 1.0 + 0.0 + 0.0) / 5, 5)
    alone = judge([pair("a", 1.0, 1.0), pair("b", 1.0, 0.0)], "quality")
    assert (alone.voter, alone.instead) == (None, None)


def test_a_reward_can_be_better_than_a_single_voter() -> None:
    draws_NV = np.random.default_rng(0).random((4000, 3)) < 0.8
    found = judge([pair(f"{place}", 1.0, *votes) for place, votes in enumerate(draws_NV.astype(float))], "quality")
    assert found.voter is not None
    assert found.instead is not None
    assert found.accuracy.share == pytest.approx(0.8**3 + 3 * 0.8**2 * 0.2, abs=0.02)
    assert found.voter.share == pytest.approx(0.8**2 + 0.2**2, abs=0.02)
    assert found.instead.share == pytest.approx(0.8, abs=0.02)


def test_the_loss_and_the_least_loss_are_those_of_the_votes() -> None:
    found = judge([pair("a", math.log(3), 1.0, 1.0, 1.0, 0.0), pair("b", -2.0, 0.0)], "quality")
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found.log_loss == pytest.approx((entropy + math.log1p(math.exp(-2))) / 2)
    assert found.least == pytest.approx(entropy / 2)
    assert judge([pair("a", 1e4, 0.0), pair("b", -1e4, 0.0)], "quality").log_loss == pytest.approx(5e3)


def test_calibration_is_the_mean_distance_in_bins() -> None:
    predicted, seen = np.array([0.05, 0.09, 0.55, 1.0]), np.array([0.0, 1.0, 0.5, 1.0])
    rows, error = calibration(predicted, seen)
    assert [row[0] for row in rows] == [2, 1, 1]
    assert rows[0][1:] == pytest.approx((0.07, 0.5))
    assert error == pytest.approx((2 * 0.43 + 0.05 + 0) / 4)


def test_few_pairs_that_are_all_right_prove_little() -> None:
    few = judge([pair(name, 1.0, 1.0) for name in "abcd"], "quality").accuracy
    assert (few.share, few.high) == (1.0, 1.0)
    assert few.low == pytest.approx(4 / (4 + 1.959964**2), abs=1e-4), "Wilson's"
    many = judge([pair(f"{name}", 1.0, 1.0) for name in range(100)], "quality").accuracy
    assert many.low > 0.95
