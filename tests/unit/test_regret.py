"""Regret on made-up numbers: the halves of the prompts, runs without a gain, groups, false alarms; and its report."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jobs.benchmark.guard_report import alarms_line, write_report
from jobs.benchmark.regret import (
    GUARD,
    ORACLE,
    RULES,
    Alarm,
    MeasuredRun,
    choose,
    false_alarms,
    find_alarm,
    measure,
    summarise,
)
from rlvid.runs.over_optimisation import HELD_OUT, TRAINED
from rlvid.runs.recommendation import Candidate, recommend

COUNT = 32
SPREAD = np.random.default_rng(3).normal(0, 0.2, COUNT)


def candidate(step: int, scale: float = 1.0, noise: float = 0.01, **means: float) -> Candidate:
    rng = np.random.default_rng([step, round(100 * scale)])
    sides = {"consistency": 0.95, "motion": 0.1, "diversity": 0.1}
    values = {m: (v + 0.01 * SPREAD).tolist() for m, v in sides.items()}
    for metric, mean in ({TRAINED: 0.5, HELD_OUT: 0.5, ORACLE: 0.5} | means).items():
        values[metric] = (mean + SPREAD + rng.normal(0, noise, COUNT)).tolist()
    return Candidate(step, scale, values)


def gamed(name: str = "run", group: str = "draft at 0.01", peak: int = 2, steps: int = 6) -> MeasuredRun:
    """The trained reward rises to the end; the held-out reward turns one checkpoint after the oracle."""
    found = [candidate(0)]
    for step in range(1, steps):
        truth = 0.5 + 0.1 * (peak - abs(step - peak))
        later = 0.5 + 0.1 * (peak + 1 - abs(step - peak - 1))
        found.append(candidate(step, reward=0.5 + 0.1 * step, held_out=later, oracle_score=truth))
        found.append(candidate(step, 0.5, reward=0.5 + 0.05 * step, held_out=0.55, oracle_score=(0.5 + truth) / 2))
    return MeasuredRun(name, group, found)


def level(name: str, group: str = "grpo at 0.01", noise: float = 0.1) -> MeasuredRun:
    """The trained reward rises, and the oracle sees nothing but noise or harm."""
    found = [candidate(0, noise=noise)]
    found += [candidate(s, noise=noise, reward=0.5 + s, oracle_score=0.5 - 0.1 * s) for s in (1, 2, 3)]
    return MeasuredRun(name, group, found)


def test_each_rule_chooses_by_its_own_signal() -> None:
    found = gamed().candidates
    chosen = {rule: found[choose(rule, found, fixed=4)] for rule in RULES}
    named = {rule: (each.step, each.scale) for rule, each in chosen.items()}
    assert named == {GUARD: (3, 1.0), "last": (5, 1.0), TRAINED: (5, 1.0), HELD_OUT: (3, 1.0), "fixed": (4, 1.0)}
    assert found[choose("fixed", found, fixed=100)].step == 5
    between = [candidate(0), candidate(2), candidate(4)]
    assert choose("fixed", between, fixed=3) == 1, "of two that are as near, the earlier"
    assert choose(HELD_OUT, [candidate(0, held_out=2.0), candidate(1)], 1) == 0, "the base is a candidate"
    assert choose(GUARD, [candidate(0), candidate(1, held_out=0.2)], 1) == 0


def test_the_guards_choice_is_the_one_of_the_shipped_rule() -> None:
    found = gamed().candidates
    shipped = recommend(found)
    assert (found[choose(GUARD, found, 1)].step, found[choose(GUARD, found, 1)].scale) == (shipped.step, shipped.scale)


def test_regret_is_the_distance_from_the_best_and_0_for_the_oracles_own_choice() -> None:
    outcome = measure(gamed(), fixed=2)
    assert outcome.best == ("step 2", "step 2")
    assert outcome.gain == pytest.approx(0.2, abs=0.02)
    assert outcome.has_gain
    assert outcome.regret["fixed"] == 0, "the fixed step is the oracle's best"
    assert outcome.regret["last"] == pytest.approx(0.3, abs=0.02)
    assert outcome.regret[HELD_OUT] == pytest.approx(0.1, abs=0.02)
    assert outcome.loss["last"] == pytest.approx(0.1, abs=0.02), "the last one is below the base"
    assert outcome.loss["fixed"] == pytest.approx(-outcome.gain)
    assert outcome.choices["last"] == ("step 5", "step 5")


def test_scale_1_alone_leaves_the_other_scales_out() -> None:
    alone = gamed().at_scale_1()
    assert [(each.step, each.scale) for each in alone.candidates] == [(step, 1.0) for step in range(6)]
    half = MeasuredRun("half", "x", [candidate(0), candidate(1, 0.5, oracle_score=0.9), candidate(1)])
    assert measure(half, 1).best == ("step 1 at scale 0.5", "step 1 at scale 0.5")
    assert measure(half.at_scale_1(), 1).gain == pytest.approx(0, abs=0.02)


def test_what_is_chosen_on_one_half_is_read_on_the_other() -> None:
    """Two candidates are good on one half each: the choice on a half is bad where it is read."""
    even = np.arange(COUNT) % 2 == 0
    flat = candidate(0, noise=0)
    good = [np.where(half, 0.9, 0.1) for half in (even, ~even)]
    found = [Candidate(s, 1.0, flat.values | {ORACLE: v.tolist()}) for s, v in enumerate(good, start=1)]
    outcome = measure(MeasuredRun("run", "x", [Candidate(0, 1.0, flat.values | {ORACLE: [0.5] * COUNT}), *found]), 1)
    assert outcome.best == ("step 1", "step 2")
    assert outcome.gain == pytest.approx(-0.4)
    assert not outcome.has_gain


def test_the_best_of_noise_has_no_gain() -> None:
    """Read where it was chosen, the best of 20 candidates of noise would have a gain in nearly every run."""
    rng, gains = np.random.default_rng(0), 0
    for number in range(60):
        found = [
            Candidate(step, 1.0, candidate(0).values | {ORACLE: rng.normal(0.5, 0.1, COUNT).tolist()})
            for step in range(21)
        ]
        gains += measure(MeasuredRun(str(number), "x", found), 1).has_gain
    assert gains <= 0.1 * 60


def test_runs_without_a_gain_stand_apart() -> None:
    found = summarise([measure(each, 2) for each in (gamed(), level("a"), level("b"))])
    only = measure(gamed(), 2)
    assert found["last"].share.value == pytest.approx(only.regret["last"] / only.gain)
    assert found["last"].loss.value == pytest.approx(0.3, abs=0.05), "against the base, absolute"
    assert found[GUARD].loss.value == pytest.approx(0.0, abs=0.05)
    assert found[GUARD].excess.value == 0
    assert found["last"].excess.value == pytest.approx(found["last"].share.value - found[GUARD].share.value)
    nothing = summarise([measure(level("a"), 2)])
    assert math.isnan(nothing["last"].share.value)
    assert math.isnan(nothing["last"].median)


def test_the_median_is_over_runs_with_a_gain() -> None:
    outcomes = [measure(each, 2) for each in (gamed(), gamed("b", peak=4), gamed("c", peak=3), level("a"))]
    shares = sorted(each.regret["last"] / each.gain for each in outcomes if each.has_gain)
    assert len(shares) == 3
    assert summarise(outcomes)["last"].median == pytest.approx(shares[1])


def test_intervals_are_over_groups_and_not_over_runs() -> None:
    """Two groups that differ, of many equal runs each: the interval reaches from one to the other."""
    runs = [gamed(f"a{k}", "a") for k in range(8)] + [gamed(f"b{k}", "b", peak=4) for k in range(8)]
    share = summarise([measure(each, 2) for each in runs])["last"].share
    ends = [measure(each, 2) for each in (runs[0], runs[-1])]
    low, high = sorted(each.regret["last"] / each.gain for each in ends)
    assert (share.low, share.high) == pytest.approx((low, high))
    alone = summarise([measure(each, 2) for each in runs[:8]])["last"].share
    assert math.isnan(alone.low), "one group has no interval"


def alarming(oracle: list[float]) -> MeasuredRun:
    """The held-out reward falls from step 2 on, so that the alarm is at step 4."""
    held = [0.5, 0.7, 0.9, 0.6, 0.5, 0.4, 0.3]
    each = enumerate(zip(held, oracle, strict=True))
    return MeasuredRun(
        "run", "x", [candidate(s, reward=0.5 + 0.1 * s, held_out=h, oracle_score=o) for s, (h, o) in each]
    )


def test_an_alarm_is_false_where_a_later_checkpoint_is_better_beyond_noise() -> None:
    right = alarming([0.5, 0.7, 0.8, 0.6, 0.5, 0.4, 0.3])
    assert find_alarm(right) == Alarm("run", 4, False)
    assert find_alarm(alarming([0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7])) == Alarm("run", 4, True)
    assert find_alarm(alarming([0.5, 0.7, 0.8, 0.6, 0.5, 0.801, 0.8])) == Alarm("run", 4, False), "within noise"
    assert find_alarm(MeasuredRun("run", "x", right.candidates[:5])) == Alarm("run", 4, None), "nothing comes later"
    assert find_alarm(MeasuredRun("run", "x", right.candidates[:4])) is None


def test_false_alarms_have_wilsons_interval() -> None:
    last = Alarm("last", 6, None)
    found = false_alarms([last, *(Alarm("run", 4, place == 0) for place in range(10))])
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.0179, 0.4042), abs=1e-3)
    assert math.isnan(false_alarms([]).value)
    assert math.isnan(false_alarms([last]).low)
    assert "in 2 of 5 runs, 1 of them with a later checkpoint, of which 1 false" in alarms_line(
        [last, Alarm("run", 4, True)], 5
    )
    assert "in 1 of 5 runs, none of them with a later" in alarms_line([last], 5)


@pytest.mark.slow
def test_the_report_has_both_ways_and_all_rules(tmp_path: Path) -> None:
    runs = [gamed("a", "draft at 0.01"), gamed("b", "draft at 0.1", peak=3), level("c"), alarming([0.5] * 7)]
    page = write_report(tmp_path, runs, fixed=2)
    assert page == (tmp_path / "regret.md").read_text(encoding="utf-8")
    for text in (
        "at scale 1 alone",
        "with scales",
        "a fixed number of steps (2)",
        "4 runs of 4 methods",
        "Alarms: in ",
    ):
        assert text in page
    content = json.loads((tmp_path / "regret.json").read_text(encoding="utf-8"))
    assert content["rules"].keys() == content["outcomes"].keys() == {"at scale 1 alone", "with scales"}
    assert content["rules"]["with scales"].keys() == RULES.keys()
    assert (tmp_path / "regret.png").stat().st_size > 10_000
