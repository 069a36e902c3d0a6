"""Rank correlations with the oracle: ties by hand, pooled and within runs, intervals over runs, and their table."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.benchmark.correlation import correlate, spearman
from jobs.benchmark.guard_report import write_report
from jobs.benchmark.regret import ORACLE, MeasuredRun
from rlvid.runs.over_optimisation import HELD_OUT, TRAINED
from rlvid.runs.recommendation import VETO, Candidate

PROMPTS = 8


def run(name: str, points: list[tuple[float, float]], trained: str = "builtin", metric: str = TRAINED) -> MeasuredRun:
    """A run whose base is below all, and whose checkpoints have these means of a metric and of the oracle."""
    found = []
    for step, (value, oracle) in enumerate([(-9.0, -9.0), *points]):
        values = dict.fromkeys((TRAINED, HELD_OUT, *VETO), [0.5] * PROMPTS)
        found.append(Candidate(step, 1.0, values | {metric: [value] * PROMPTS, ORACLE: [oracle] * PROMPTS}))
    return MeasuredRun(name, name, found, trained)


def test_ties_share_the_mean_of_their_ranks() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, squares 4.5 and 5."""
    found = spearman(np.array([1.0, 2.0, 2.0, 9.0]), np.array([0.1, 0.3, 0.2, 0.4]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(np.array([3.0, 2.0, 1.0]), np.array([1.0, 10.0, 100.0])) == pytest.approx(-1)
    assert math.isnan(spearman(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0]))), "no order at all"
    assert math.isnan(spearman(np.array([1.0, 2.0]), np.array([1.0, 2.0])))


def test_within_and_pooled_may_differ_in_sign() -> None:
    """Each run falls, and the run with the higher reward has the higher oracle."""
    low, high = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], [(11.0, 13.0), (12.0, 12.0), (13.0, 11.0)]
    found = correlate([run("a", low), run("b", high)])[TRAINED]
    assert (found.runs, found.checkpoints, found.with_value) == (2, 6, 2)
    assert found.within.value == found.within.low == found.within.high == pytest.approx(-1)
    ranks = np.array([1.0, 2, 3, 4, 5, 6]), np.array([3.0, 2, 1, 6, 5, 4])
    assert found.pooled.value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.pooled.low == pytest.approx(-1), "a resample may hold one run alone"


def test_runs_without_an_order_count_for_nothing_and_one_run_has_no_interval() -> None:
    rising, level = run("a", [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]), run("b", [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)])
    found = correlate([rising, level])[TRAINED]
    assert (found.runs, found.with_value, found.within.value) == (2, 1, pytest.approx(1))
    assert math.isnan(found.within.low)
    alone = correlate([rising])
    assert math.isnan(alone[TRAINED].pooled.low)
    assert math.isnan(alone[HELD_OUT].pooled.value), "it is the same at all checkpoints"
    lost = run("c", [(math.nan, 1.0), (2.0, 2.0), (3.0, 1.0), (4.0, 4.0)])
    assert correlate([lost])[TRAINED].checkpoints == 3


def test_each_trained_reward_and_further_reward_stands_alone() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    found = correlate([run("a", points), run("b", points, "builtin-video"), run("c", points, metric="reward_liked")])
    assert [*found] == ["reward: builtin", "reward: builtin-video", HELD_OUT, "reward_liked", *VETO]
    assert found["reward_liked"].runs == 1
    assert found[HELD_OUT].runs == 3


def test_each_held_out_reward_stands_alone() -> None:
    rising = replace(run("a", [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], metric=HELD_OUT), held_out="builtin-heldout")
    falling = replace(run("b", [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], metric=HELD_OUT), held_out="builtin-unvoted")
    found = correlate([rising, falling])
    assert [*found] == [TRAINED, "held_out: builtin-heldout", "held_out: builtin-unvoted", *VETO]
    values = [found[key].pooled.value for key in ("held_out: builtin-heldout", "held_out: builtin-unvoted")]
    assert values == pytest.approx([1, -1])


def test_the_report_has_both_ways(tmp_path: Path) -> None:
    runs = [
        run("a", [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]),
        run("b", [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], "builtin-video"),
    ]
    half = [Candidate(each.step, 0.5, each.values) for each in runs[0].candidates[1:]]
    runs[0] = MeasuredRun("a", "a", [*runs[0].candidates, *half], "builtin")
    page = write_report(tmp_path, runs, fixed=2)
    assert "## Rank correlation with the oracle" in page
    assert "| Reward, builtin | 1 | 3 | -1.00 | -1.00 |" in page
    assert "| Reward, builtin | 1 | 6 | -1.00 | -1.00 |" in page
    content = json.loads((tmp_path / "regret.json").read_text(encoding="utf-8"))["correlations"]
    assert content["with scales"]["reward: builtin-video"]["pooled"]["value"] == pytest.approx(1)
    assert content["at scale 1 alone"]["motion"]["within"]["value"] is None
