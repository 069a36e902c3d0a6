"""The guard's recommendation on made-up candidates: disagreement, vetoes, ties, noise."""

import math

import numpy as np
import pytest

from rlvid.runs.over_optimisation import HELD_OUT, TRAINED, judge
from rlvid.runs.recommendation import DISTANCE, Candidate, recommend

SECOND = "reward_second"
COUNT = 24
PROMPTS = np.random.default_rng(5).normal(0, 0.2, COUNT)
SIDES = {"consistency": 0.95, "motion": 0.1, "diversity": 0.2}


def candidate(step: int, scale: float = 1.0, noise: float = 0.02, **means: float) -> Candidate:
    """A candidate with the given means; prompts differ by the same amounts everywhere, and noise comes on top."""
    rng = np.random.default_rng([step, round(100 * scale)])
    spread = {HELD_OUT: 1.0, SECOND: 5.0, TRAINED: 1.0, "consistency": 0.01, "motion": 0.05, "diversity": 0.05}
    all_means = {TRAINED: 0.5, HELD_OUT: 0.5, **SIDES} | means
    values = {
        metric: (mean + spread.get(metric, 0.0) * (PROMPTS + rng.normal(0, noise, COUNT))).tolist()
        for metric, mean in all_means.items()
    }
    return Candidate(step, scale, values)


def test_the_largest_gain_is_recommended_with_the_reason_in_one_line() -> None:
    found = recommend([candidate(0), *(candidate(s, held_out=0.5 + 0.1 * s) for s in (1, 2, 3)), candidate(4)])
    assert (found.step, found.scale) == (3, 1.0)
    assert "held-out reward +0.30" in found.reason
    assert "\n" not in found.reason
    assert found.spec("toy") == "toy@3"


def test_the_trained_reward_has_no_influence() -> None:
    plain = [candidate(0), *(candidate(s, held_out=0.5 + 0.05 * s) for s in (1, 2))]
    games = [candidate(0), *(candidate(s, held_out=0.5 + 0.05 * s, reward=9.0 - 4 * s) for s in (1, 2))]
    assert recommend(plain) == recommend(games)


def test_where_held_out_rewards_disagree_the_least_favourable_counts() -> None:
    """The first keeps rising and the second, in another unit, turns at step 2."""
    second = {1: 2.5, 2: 3.0, 3: 2.2, 4: 1.0}
    found = recommend(
        [candidate(0, reward_second=2.0)]
        + [candidate(s, held_out=0.5 + 0.2 * s, reward_second=value) for s, value in second.items()]
    )
    assert found.step == 2
    assert "the least gain of 2 held-out rewards" in found.reason


def test_a_gain_in_one_reward_alone_is_no_gain() -> None:
    found = recommend([candidate(0, reward_second=2.0), candidate(1, held_out=0.9, reward_second=1.5)])
    assert found.step == 0
    assert "no candidate gains in every held-out reward" in found.reason
    assert "reward second -0.5" in found.reason
    assert found.spec("toy") == "the base model"


@pytest.mark.parametrize(("metric", "lost"), [("motion", 0.05), ("consistency", 0.85), ("diversity", 0.01)])
def test_a_loss_beyond_tolerance_and_noise_is_a_veto(metric: str, lost: float) -> None:
    whole = [candidate(0), candidate(1, held_out=0.6), candidate(2, held_out=0.9, **{metric: lost})]
    found = recommend(whole)
    assert found.step == 1
    assert f"1 that gain lose too much else ({'temporal ' * (metric == 'consistency')}{metric} 1)" in found.reason
    slight = SIDES[metric] * (0.99 if metric == "consistency" else 0.9)
    assert recommend([*whole[:2], candidate(2, held_out=0.9, **{metric: slight})]).step == 2
    assert recommend([whole[0], whole[2]]).reason.startswith("no candidate gains without a loss; 1 that gain")


def test_noise_does_not_decide_between_candidates_that_gain() -> None:
    """The first gains 0.1 in all prompts alike, the second a little more, by less than its interval."""
    found = recommend([candidate(0), candidate(1, held_out=0.6, noise=0.0), candidate(2, held_out=0.61, noise=0.1)])
    assert found.step == 2


def test_of_equal_gains_the_smaller_change_is_recommended() -> None:
    def same(step: int, scale: float, **means: float) -> Candidate:
        return Candidate(step, scale, candidate(1, held_out=0.8, **means).values)

    found = recommend([candidate(0), *(same(s, k) for s in (10, 20) for k in (1.0, 0.5))])
    assert (found.step, found.scale) == (10, 0.5), "the smaller scale, then the earlier step"
    assert found.spec("toy") == "toy@10*0.5"
    far = {(10, 0.5): 0.4, (10, 1.0): 0.3, (20, 0.5): 0.2, (20, 1.0): 0.5}
    found = recommend([candidate(0, distance=0.0), *(same(*key, **{DISTANCE: d}) for key, d in far.items())])
    assert (found.step, found.scale) == (20, 0.5), "the distance, where it was measured"


def test_a_gain_within_noise_is_no_gain() -> None:
    found = recommend([candidate(0), candidate(1, held_out=0.51, noise=1.0)])
    assert found.step == 0
    assert "beyond noise; the nearest is step 1" in found.reason


def test_a_reward_that_gains_within_noise_stops_no_candidate_that_gains_on_the_mean() -> None:
    """The second reward rises by a tenth of its deviation, and the first by two."""
    found = recommend([candidate(0, reward_second=2.0), candidate(1, held_out=0.9, reward_second=2.1, noise=0.3)])
    assert found.step == 1
    assert "reward second +0." in found.reason


def test_noise_alone_recommends_the_base_in_most_runs() -> None:
    """A candidate without a true gain passes in 5 % of trials; of 6 independent ones, in at most 27 %."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        each = [{HELD_OUT: rng.normal(0.5, 0.1, 16).tolist(), **{m: [v] * 16 for m, v in SIDES.items()}}] * 1
        each += [each[0] | {HELD_OUT: rng.normal(0.5, 0.1, 16).tolist()} for _ in range(6)]
        wrong += recommend([Candidate(step, 1.0, values) for step, values in enumerate(each)]).step > 0
    assert wrong <= 0.3 * 200
    assert recommend([candidate(0), candidate(1, noise=0.0, held_out=0.5)]).step == 0


def test_two_rewards_pass_by_chance_less_often_than_one() -> None:
    def passes(rewards: list[str]) -> int:
        rng, found = np.random.default_rng(1), 0
        for _ in range(300):
            sides = {m: [v] * 16 for m, v in SIDES.items()}
            pair = [sides | {m: rng.normal(0.5, 0.1, 16).tolist() for m in rewards} for _ in range(2)]
            found += recommend([Candidate(step, 1.0, values) for step, values in enumerate(pair)]).step
        return found

    one, two = passes([HELD_OUT]), passes([HELD_OUT, SECOND])
    assert two < one <= 0.08 * 300


def test_candidates_with_videos_that_are_not_finite_are_not_considered() -> None:
    broken = candidate(2, held_out=0.9)
    hole = broken.values | {HELD_OUT: [math.nan, *broken.values[HELD_OUT][1:]]}
    found = recommend([candidate(0), candidate(1, held_out=0.6), Candidate(2, 1.0, hole)])
    assert found.step == 1
    unread = candidate(0).values | {HELD_OUT: [math.nan, *candidate(0).values[HELD_OUT][1:]]}
    assert recommend([Candidate(0, 1.0, unread), Candidate(2, 1.0, hole)]).step == 2, "the base has none there either"
    silent = {metric: [math.nan] * COUNT for metric in candidate(0).values}
    nothing = recommend([Candidate(0, 1.0, silent), candidate(1, held_out=0.9)])
    assert nothing.step == 0
    assert nothing.reason == "no candidate has values of every held-out reward"


def test_metrics_that_were_not_measured_veto_nothing() -> None:
    def alone(each: Candidate) -> Candidate:
        return Candidate(each.step, each.scale, each.values | {"diversity": [math.nan] * COUNT})

    assert recommend([alone(candidate(0)), alone(candidate(1, held_out=0.9))]).step == 1


def test_candidates_that_cannot_be_compared_are_errors() -> None:
    assert recommend([candidate(0)]).reason == "there is no other candidate yet"
    for wrong in ([], [candidate(1)]):
        with pytest.raises(ValueError, match="base model"):
            recommend(wrong)
    short = Candidate(1, 1.0, {metric: values[:3] for metric, values in candidate(1).values.items()})
    with pytest.raises(ValueError, match=r"step 1 has 3 prompts, and the base model 24"):
        recommend([candidate(0), short])


def test_any_held_out_reward_can_warn() -> None:
    up, turned = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [2.0, 3.0, 4.0, 2.0, 1.0, 0.0]
    pairs = zip(up, turned, strict=True)
    rows = [candidate(s, reward=v, held_out=v, reward_second=w).values for s, (v, w) in enumerate(pairs)]
    verdict = judge(rows)
    assert verdict.over_optimised
    assert set(verdict.warnings) == {SECOND}
    assert verdict.fatal_loss is verdict.warnings[SECOND]
    assert (verdict.fatal_loss.at, verdict.fatal_loss.best) == (4, 2)
