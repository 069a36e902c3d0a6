"""Intervals, rankings and agreement, against published examples and an independent way of computing them."""

import math
import random

import numpy as np
import pytest
import scipy.stats

from rlvid.stats import beyond_chance, bradley_terry, krippendorff_alpha, mean_interval, t_quantile, welch, wilson


def test_the_interval_of_a_mean_is_students() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3), rel=1e-4))
    assert math.isnan(mean_interval([1.0])[1])


@pytest.mark.parametrize(
    ("probability", "freedom", "table"),
    [(0.95, 1, 6.314), (0.99, 2, 6.965), (0.95, 3, 2.353), (0.999, 7, 4.785), (0.95, 15, 1.753), (0.9995, 15, 4.073)],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: int, table: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(table, abs=6e-4)


@pytest.mark.parametrize(("one", "other"), [([1, 2, 3], [2, 4, 9]), ([1, 2, 3], [4, 5, 6]), ([0, 9], [3, 4, 5, 5])])
def test_welchs_interval_is_scipys(one: list[float], other: list[float]) -> None:
    low, high = scipy.stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert welch(one, other) == pytest.approx((high - low) / 2)


def test_welchs_interval_with_a_known_mean_is_students() -> None:
    assert welch([1, 2, 3], []) == pytest.approx(mean_interval([1, 2, 3])[1])
    assert welch([2, 2], [3, 3]) == 0
    assert math.isnan(welch([1, 2, 3], [4]))
    assert math.isnan(welch([], []))


def test_welchs_interval_covers_what_it_says() -> None:
    """Of normal samples with unlike deviations."""
    drawn = np.random.default_rng(0)
    inside = []
    for _ in range(4000):
        one, other = drawn.normal(1, 1, 3), drawn.normal(0, 3, 4)
        inside.append(abs(one.mean() - other.mean() - 1) <= welch(one.tolist(), other.tolist()))
    assert 0.94 <= np.mean(inside) <= 0.985


def test_a_gain_is_beyond_chance_from_six_prompts_on() -> None:
    intervals = ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.1), (math.nan, math.nan))
    assert [beyond_chance(*ends, 6) for ends in intervals] == [1, -1, 0, 0]
    assert beyond_chance(0.1, 0.3, 5) == 0


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I: score method without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_published_intervals(wins: int, count: int, low: float, high: float) -> None:
    assert wilson(wins / count, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(math.nan, 0) == (0, 1)


def test_bradley_terry_gives_the_published_strengths_of_baseball_teams() -> None:
    # Agresti, Categorical Data Analysis (1990), section 10.6: American League, Eastern Division, 1987
    wins = [
        [0, 7, 9, 7, 7, 9, 11], [6, 0, 7, 5, 11, 9, 9], [4, 6, 0, 7, 7, 8, 12], [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12], [4, 4, 5, 6, 6, 0, 6], [2, 4, 1, 3, 1, 7, 0],
    ]  # fmt: skip
    strengths = bradley_terry(np.array(wins, float))
    assert strengths.mean() == pytest.approx(0)
    assert strengths - strengths[-1] == pytest.approx([1.581, 1.436, 1.294, 1.248, 1.108, 0.684, 0], abs=1e-3)


def test_bradley_terry_agrees_with_newtons_method_on_the_likelihood() -> None:
    rng = np.random.default_rng(3)
    wins = rng.integers(0, 12, (5, 5)) + rng.choice([0, 0.5], (5, 5))
    np.fill_diagonal(wins, 0)
    strengths = np.zeros(5)
    for _ in range(50):  # gradient and Hessian of the sum of wins_ij log sigmoid(s_i - s_j)
        chance = 1 / (1 + np.exp(strengths - strengths[:, None]))
        gradient = (wins * (1 - chance)).sum(1) - (wins * (1 - chance)).sum(0)
        weight = (wins + wins.T) * chance * (1 - chance)
        strengths += np.linalg.pinv(np.diag(weight.sum(1)) - weight) @ gradient
    assert bradley_terry(wins) == pytest.approx(strengths - strengths.mean(), abs=1e-8)


@pytest.mark.parametrize(
    "wins",
    [[[0, 5], [0, 0]], [[0, 1, 0], [2, 0, 0], [0, 0, 0]], [[0, 1, 3], [1, 0, 2], [0, 0, 0]]],
    ids=["one won all", "one was never compared", "one lost all"],
)
def test_bradley_terry_has_no_strengths_where_there_is_no_maximum(wins: list[list[float]]) -> None:
    assert np.isnan(bradley_terry(np.array(wins, float))).all()


def test_krippendorffs_alpha_gives_the_published_example() -> None:
    # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: 4 observers, 12 units, gaps
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[value for value in unit if value != "."] for unit in zip(*observers, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_krippendorffs_alpha_for_two_people_is_what_a_hand_computes() -> None:
    # Of 20 values 14 are 0 and 6 are 1, and 4 of 10 units differ: 1 - 19 x 4 / (14 x 6)
    assert krippendorff_alpha([*zip("0100000000", "1110010010", strict=True)]) == pytest.approx(1 - 76 / 84)


def test_krippendorffs_alpha_at_its_ends() -> None:
    generator = random.Random(0)
    assert krippendorff_alpha([("a", "a"), ("b", "b")]) == 1
    assert abs(krippendorff_alpha([(generator.choice("ab"), generator.choice("ab")) for _ in range(20_000)])) < 0.02
    assert math.isnan(krippendorff_alpha([("a", "a")]))
    assert math.isnan(krippendorff_alpha([("a",), ("b",)]))
