"""The guard's rule on series that are known, its false alarms counted, and its settings."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guard_looks import evaluation_of

from rlvid.cluster.nodes import guard_gpus, worker_gpus
from rlvid.config import load_config, parse_config
from rlvid.evaluate.scorers import guard_rewards, load_run_scorer
from rlvid.runs import over_optimisation
from rlvid.runs.over_optimisation import COLLAPSE, HELD_OUT, TOLERANCE, TRAINED, judge
from rlvid.stats import finite_mean
from rlvid.train.guard import check_room
from rlvid.train.guard_folder import guard_prompts


def series(trained: list[float], held_out: list[float], **others: list[float]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    columns = {TRAINED: trained, HELD_OUT: held_out, **others}
    return [evaluation_of(rng, {m: values[t] for m, values in columns.items()}) for t in range(len(trained))]


UP = [0.5 + 0.05 * t for t in range(9)]


def test_both_rise_and_nothing_is_said() -> None:
    verdict = judge(series(UP, [0.5 + 0.04 * t for t in range(9)]))
    assert not verdict.warnings
    assert verdict.best == 8


def test_proxy_rises_and_held_out_falls_and_the_best_is_where_it_turned() -> None:
    turned = [0.5, 0.6, 0.7, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    verdict = judge(series(UP, turned))
    assert verdict.over_optimised
    assert verdict.best == 3
    loss = verdict.warnings[HELD_OUT]
    assert (loss.at, loss.best) == (5, 3), "the second evaluation in a row warns"
    assert loss.difference == pytest.approx(-0.2, abs=0.05)
    assert loss.difference + loss.half < 0
    assert set(verdict.warnings) == {HELD_OUT}


def test_both_fall_and_it_is_a_collapse_and_no_over_optimisation() -> None:
    turned = [0.5, 0.6, 0.7, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2]
    verdict = judge(series(turned, turned))
    assert not verdict.over_optimised
    assert set(verdict.warnings) == {COLLAPSE}
    assert verdict.fatal_loss is verdict.warnings[COLLAPSE]
    assert (verdict.fatal_loss.at, verdict.fatal_loss.best, verdict.best) == (4, 2, 2)
    level = series([0.5] * 9, [0.5] * 9)
    assert judge(level).fatal_loss is None


def test_an_evaluation_is_averaged_as_often_in_a_long_run_as_in_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[float] = []

    def counted(values: list[float]) -> float:
        averaged.append(finite_mean(values))
        return averaged[-1]

    monkeypatch.setattr(over_optimisation, "finite_mean", counted)
    counts = []
    for length in (6, 11, 21):
        averaged.clear()
        judge(series([0.5] * length, [0.5] * length))
        counts.append(len(averaged) - 1)
    assert counts[1:] == [2 * counts[0], 4 * counts[0]]


def test_one_bad_look_is_not_enough_and_later_looks_cannot_win_after_a_warning() -> None:
    dip = [0.5, 0.6, 0.7, 0.4, 0.7, 0.4, 0.7, 0.75, 0.8]
    verdict = judge(series(UP, dip))
    assert not verdict.warnings
    assert verdict.best == 8
    back = [0.5, 0.8, 0.5, 0.4, 0.5, 0.9, 0.95, 1.0, 1.0]
    verdict = judge(series(UP, back))
    assert verdict.over_optimised
    assert verdict.best == 1
    assert not verdict.losses, "the last evaluation has lost nothing"


@pytest.mark.parametrize(("metric", "from_to"), [("motion", (0.1, 0.05)), ("diversity", (0.1, 0.05))])
def test_side_effects_have_lines_of_their_own(metric: str, from_to: tuple[float, float]) -> None:
    falls = np.linspace(*from_to, 9).tolist()
    verdict = judge(series(UP, UP, **{metric: falls}))
    assert set(verdict.warnings) == {metric}
    assert not verdict.over_optimised
    slight = np.linspace(from_to[0], from_to[0] * (1 - TOLERANCE[metric] / 2), 9).tolist()
    assert not judge(series(UP, UP, **{metric: slight})).warnings, "within what a metric may lose"


def walk(kind: str, rng: np.random.Generator, evaluations: int, count: int) -> list[dict[str, list[float]]]:
    """Held-out rewards that do not fall in truth: noise about a level, or a random walk without drift."""
    base, moved, found = rng.normal(0.5, 0.3, count), np.zeros(count), []
    for t in range(evaluations):
        moved = moved + rng.normal(0, 0.05, count) if kind == "walk" else rng.normal(0, 0.1, count)
        silent = dict.fromkeys(TOLERANCE, [math.nan] * count)
        trained = base + (rng.normal(0, 0.1, count) if kind == "flat, both" else 0.02 * t)
        found.append(silent | {HELD_OUT: (base + moved).tolist(), TRAINED: trained.tolist()})
    return found


@pytest.mark.parametrize("kind", ["flat", "walk", "flat, both"])
@pytest.mark.parametrize(("evaluations", "count"), [(6, 4), (16, 16)])
def test_false_alarms_are_rare_however_often_it_looks(kind: str, evaluations: int, count: int) -> None:
    rng = np.random.default_rng(0)
    alarms = sum(judge(walk(kind, rng, evaluations, count)).fatal_loss is not None for _ in range(150))
    assert alarms <= 0.08 * 150, f"{alarms} of 150 runs"


def test_a_fall_worth_a_deviation_of_the_noise_is_found() -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(50):
        evaluations = walk("flat", rng, 10, 16)
        for t in range(5, 10):
            evaluations[t][HELD_OUT] = [value - 0.15 for value in evaluations[t][HELD_OUT]]
        found += judge(evaluations).over_optimised
    assert found >= 45, "power: a fall of 1.5 deviations of a prompt's noise"


def test_what_rounding_lost_is_no_loss() -> None:
    evaluations = [{TRAINED: [0.5 + 0.1 * t] * 16, HELD_OUT: [21.3 - 4e-6 * t] * 16} for t in range(5)]
    assert not judge([{m: [math.nan] * 16 for m in TOLERANCE} | each for each in evaluations]).warnings


def test_looks_without_numbers_are_passed_over() -> None:
    evaluations = series(UP, UP)
    for metric in evaluations[4]:
        evaluations[4][metric] = [math.nan] * 16
    assert judge(evaluations).best == 8
    assert judge(evaluations[:1]).best == 0
    with pytest.raises(ValueError, match="base model"):
        judge([])
    with pytest.raises(ValueError, match=r"\b0 and 1 .* 16 and 3 prompts"):
        judge([evaluations[0], {metric: values[:3] for metric, values in evaluations[1].items()}])


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"guard": {"every": 30}, "output": {"checkpoint_every": 20}}, "guard.every=40"),
        ({"guard": {"every": 50}, "reward": {"held_out": None}}, "set reward.held_out, or guard.every=0"),
        ({"guard": {"rewards": [{"name": "builtin-heldout"}]}}, "'builtin-heldout' is reward.held_out"),
        (
            {
                "guard": {"rewards": [{"name": "fitted", "path": "./liked"}]},
                "reward": {"held_out": "fitted", "held_out_path": "liked"},
            },
            "guard.rewards: 'liked' is reward.held_out, and would count twice",
        ),
        ({"guard": {"count": 3}}, "guard.count = 3"),
        ({"guard": {"evry": 3}}, "unknown key guard.evry; allowed here: every, prompts"),
        ({"guard": {"scales": [0.5]}}, "guard.scales"),
        ({"guard": {"scales": [1.0, 5.0]}}, "guard.scales"),
        (
            {"guard": {"rewards": [{"name": "brightness"}, {"name": "brightness"}]}},
            "two rewards are called 'brightness'",
        ),
        (
            {"guard": {"rewards": [{"name": "fitted", "path": f"runs/liked{x}v1"} for x in "-."]}},
            "two rewards are called 'liked-v1' and 'liked.v1'",
        ),
        ({"guard": {"rewards": [{"name": "builtin"}]}}, "'builtin' is the reward that is trained on"),
        ({"guard": {"rewards": [{"name": "brightness", "weight": 2}]}}, "weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_config(data)
    assert words in str(error.value)


def test_the_guard_is_off_by_default_and_no_part_of_a_fingerprint() -> None:
    plain = load_config("toy")
    assert plain.guard.every == 0
    assert load_config("toy", ["guard.every=20", "guard.stop=true"]).fingerprint == plain.fingerprint


def test_room_is_looked_for_before_anything_waits() -> None:
    run = parse_config({"guard": {"every": 50}, "train": {"workers": 2}})
    assert (guard_gpus(run, False), guard_gpus(run, True), worker_gpus(run)) == (0, 1, 1)
    check_room(run, False, [({"CPU": 2}, 1)])
    check_room(run, True, [({"CPU": 1}, 2), ({"GPU": 1}, 3)])
    with pytest.raises(ValueError, match=r"has 2 GPUs, and the workers leave 0; set guard.gpus=0.3"):
        check_room(run, True, [({"CPU": 2, "GPU": 2}, 1)])
    shared = parse_config({"guard": {"every": 50, "gpus": 0.25}, "train": {"workers": 2}})
    assert worker_gpus(shared) == 0.75
    check_room(shared, True, [({"CPU": 2, "GPU": 2}, 1)])
    alone = parse_config({"guard": {"every": 50, "gpus": 0.1}, "train": {"workers": 1}})
    check_room(alone, True, [({"CPU": 2, "GPU": 1}, 1)])
    for gpus in (0.5, 0.7, 1.5):
        with pytest.raises(ValueError, match=r"must be a whole number, or below 0\.5"):
            parse_config({"guard": {"every": 50, "gpus": gpus}})


def test_prompts_are_the_first_captions_or_those_asked_for(tmp_path: Path) -> None:
    run = parse_config({"guard": {"every": 50, "count": 4}})
    assert guard_prompts(run, ["a", "a", "b", "c", "d", "e"]) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="there are 2 different ones, and noise is judged over at least 4"):
        guard_prompts(run, ["a", "b", "a"])
    asked = parse_config({"guard": {"every": 50, "prompts": "new_shapes"}})
    assert len(set(guard_prompts(asked, []))) == 16
    with pytest.raises(ValueError, match="neither a built-in set"):
        guard_prompts(parse_config({"guard": {"every": 50, "prompts": "no.txt"}}), [])


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({}, ["builtin-frames", "builtin-video"]),
        ({"model": {"path": "builtin-wan"}}, ["builtin-frames", "builtin-video"]),
        ({"model": {"path": "random"}}, []),
        ({"reward": {"name": "builtin-video"}}, ["builtin-frames"]),
        ({"reward": {"mixture": [{"name": "builtin"}, {"name": "builtin-frames"}]}}, ["builtin-video"]),
        ({"reward": {"held_out": "builtin-video"}}, ["builtin-frames"]),
        ({"guard": {"rewards": []}}, []),
        ({"guard": {"rewards": [{"name": "brightness"}]}}, ["brightness"]),
    ],
)
def test_built_in_models_have_judges_that_were_fitted_to_votes(sections: dict[str, Any], names: list[str]) -> None:
    assert [each.name for each in parse_config(sections).guard_rewards] == names


@pytest.mark.parametrize(
    ("held_out", "further", "own", "measures"),
    [
        ("builtin-heldout", ["builtin-frames"], False, "held out"),
        ("builtin-video", ["builtin-frames"], False, "reward_builtin_frames"),
        ("builtin-video", [], False, "another"),
        ("builtin-video", [], True, "trained"),
    ],
)
def test_the_trained_reward_measures_videos_only_where_no_other_clip_can(
    held_out: str, further: list[str], own: bool, measures: str
) -> None:
    config = parse_config({"reward": {"held_out": held_out}, "guard": {"rewards": [{"name": x} for x in further]}})
    if own:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": "a/model/of/mine"})})
    scorer = load_run_scorer(config, torch.device("cpu"), guard_rewards(config))
    candidates = {"trained": scorer.reward, "held out": scorer.held_out, **scorer.further}
    assert next((name for name, each in candidates.items() if each is scorer.clip), "another") == measures
