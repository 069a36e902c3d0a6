"""The guard's rule on series that are known, its false alarms counted, and what it leaves behind on disk."""

import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_run

from rlvid.cluster.nodes import guard_gpus, worker_gpus
from rlvid.config import RunConfig, load_config, parse_config
from rlvid.evaluate.load import load_run
from rlvid.evaluate.models import find_models
from rlvid.evaluate.scorers import guard_rewards, load_run_scorer
from rlvid.reward.builtin import builtin_folder
from rlvid.runs import over_optimisation
from rlvid.runs.checkpoints import flaw
from rlvid.runs.find import find_run
from rlvid.runs.guard_log import GuardEvaluation, best_step, find_best, read_means, read_recommendation
from rlvid.runs.over_optimisation import COLLAPSE, HELD_OUT, TOLERANCE, TRAINED, judge
from rlvid.runs.recommendation import Recommendation
from rlvid.stats import finite_mean
from rlvid.train import guard
from rlvid.train.guard import check_room
from rlvid.train.guard_evaluator import GuardEvaluator
from rlvid.train.guard_folder import GuardLog, copy_trained, guard_prompts, stop_flag
from rlvid.train.record import reward_digest

PROMPTS = [f"prompt {i}" for i in range(16)]


def evaluation_of(
    rng: np.random.Generator, mean: dict[str, float], noise: float = 0.05, count: int = 16
) -> dict[str, Any]:
    """One value a prompt: prompts differ by the same amounts in every evaluation, and noise comes on top."""
    spread = np.random.default_rng(5).normal(0, 0.3, count)
    base = {TRAINED: 0.5, HELD_OUT: 0.5, "consistency": 0.95, "motion": 0.1, "diversity": 0.1} | mean
    scale = {"consistency": 0.01, "motion": 0.1, "diversity": 0.1}
    return {m: (v + scale.get(m, 1.0) * (spread + rng.normal(0, noise, count))).tolist() for m, v in base.items()}


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


# -------------------------------------------------------------------------------------------------------- on disk


def values(held_out: float, trained: float) -> dict[str, list[float]]:
    return evaluation_of(np.random.default_rng(0), {HELD_OUT: held_out, TRAINED: trained})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """A run with checkpoints of steps 2, 4 and 6."""
    home = tmp_path_factory.mktemp("guarded")
    for step in (2, 4, 6):
        folder, config = save_run(home, step)
    (folder / "logs").mkdir()
    return folder, config


def guard_log_of(run: Path, config: RunConfig, **guard: Any) -> GuardLog:
    return GuardLog(
        run, PROMPTS, parse_config(config.model_dump() | {"guard": guard, "output": {"checkpoint_every": 2}})
    )


@pytest.fixture
def guarded(trained: tuple[Path, RunConfig], tmp_path: Path) -> tuple[Path, RunConfig]:
    return Path(shutil.copytree(trained[0], tmp_path / "run")), trained[1]


def test_every_checkpoint_gets_one_look_and_the_best_survives(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    evaluations = guard_log_of(run, config, every=2)
    assert evaluations.stage(last=False) == [2, 4, 6]
    for step in (2, 4, 6):
        shutil.rmtree(run / f"step-{step:06d}")  # as keep_checkpoints does while evaluations wait
    for step, held_out in ((0, 0.4), (2, 0.7), (4, 0.6)):
        evaluations.add(GuardEvaluation(step, 1.0, values(held_out, 0.4 + step / 10)))
        evaluations.update_best(evaluations.recommendation())
    assert json.loads((run / "best" / "best.json").read_text())["step"] == 2
    assert not (run / "guard" / "step-000002").exists()
    again = guard_log_of(run, config, every=2)  # as after a kill
    assert again.steps == [0, 2, 4]
    assert again.stage(last=True) == [6]
    assert again.verdict() == evaluations.verdict()
    best = find_best(run)
    assert best is not None
    assert best.step == 2
    _, found = find_run(run, 2)
    assert found.folder == run / "best"
    assert load_run(run, 2).checkpoint.step == 2
    steps, means = read_means(run)
    assert steps == [0, 2, 4]
    assert means[HELD_OUT] == pytest.approx([0.4, 0.7, 0.6], abs=0.2)


def test_only_the_asked_steps_and_the_last_are_looked_at(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    evaluations = guard_log_of(run, config, every=4)
    assert evaluations.stage(last=False) == [4]
    assert evaluations.stage(last=True) == [4, 6]


def test_a_checkpoint_that_is_half_there_is_left_for_later(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    weights = run / "step-000006" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    evaluations = guard_log_of(run, config, every=2)
    for damaged in (whole[:-10], whole[:-10] + b"0123456789"):  # cut off, and of the right length
        weights.write_bytes(damaged)
        assert flaw(run / "step-000006", read=True)
        assert evaluations.stage(last=True) == [2, 4]
    weights.write_bytes(whole)
    assert evaluations.stage(last=True) == [2, 4, 6]


def test_a_checkpoint_that_is_deleted_while_it_is_copied_is_passed_over(
    guarded: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = guarded
    evaluations, copy = guard_log_of(run, config, every=2), shutil.copytree

    def deleted_meanwhile(source: Path, target: Path) -> Any:
        if source.parent.name == "step-000002":
            shutil.rmtree(source.parent)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copytree", deleted_meanwhile)
    assert evaluations.stage(last=False) == [4, 6]

    def full(source: Path, target: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    shutil.rmtree(run / "guard")
    with pytest.raises(OSError, match="No space left"):
        evaluations.stage(last=False)


def test_a_kill_between_two_bests_loses_neither(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    evaluations = guard_log_of(run, config, every=2)
    evaluations.add(GuardEvaluation(0, 1.0, values(0.4, 0.4)))
    evaluations.stage(last=False)
    evaluations.add(GuardEvaluation(2, 1.0, values(0.7, 0.5)))
    evaluations.update_best(evaluations.recommendation())
    (run / "best").rename(run / ".best")  # killed after the old one went and before the new one came
    shutil.rmtree(run / "step-000002")
    evaluations.update_best(evaluations.recommendation())
    best = find_best(run)
    assert best is not None
    assert best.step == 2


def test_a_kill_before_the_old_best_went_loses_nothing(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    log = guard_log_of(run, config, every=2)
    log.add(GuardEvaluation(0, 1.0, values(0.4, 0.4)))
    log.update_best(log.recommendation())
    log.add(GuardEvaluation(2, 1.0, values(0.7, 0.5)))
    copy_trained(run / "step-000002", run / ".best")  # killed before best, of the base, was replaced
    shutil.rmtree(run / "step-000002")
    assert log.recommendation().step == 2
    log.update_best(log.recommendation())
    best = find_best(run)
    assert best is not None
    assert (best.step, best_step(run)) == (2, 2)
    assert not (run / ".best").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"step": ',
        "[2]",
        "{}",
        '{"step": "2"}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": 2, "scale": 0}',
        "\xff",
    ],
)
def test_a_damaged_note_of_the_best_checkpoint_is_named_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    assert best_step(tmp_path) is None
    (tmp_path / "best" / "best.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"best\.json is damaged .*; delete the folder best") as error:
        best_step(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_best_checkpoint_is_not_called_the_base_model(guarded: tuple[Path, RunConfig]) -> None:
    run, _ = guarded
    copy_trained(run / "step-000002", run / "best")
    for content, why in (("{}", "best.json is damaged"), ('{"step": 0}', "is the base model"), ('{"step": 2}', None)):
        (run / "best" / "state.json").write_text("{")
        (run / "best" / "best.json").write_text(content)
        with pytest.raises(ValueError, match=why or r"is damaged \(state\.json .*name another step") as error:
            find_models([f"{run}@best"])
        assert "\n" not in str(error.value)


def test_the_flag_is_there_only_when_it_is_asked_for(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    evaluations = guard_log_of(run, config, every=2, stop=True)
    assert not evaluations.flag(judge([values(0.5, 0.5)]))
    for step, held_out in ((0, 0.5), (2, 0.8), (4, 0.4), (6, 0.3)):
        evaluations.add(GuardEvaluation(step, 1.0, values(held_out, 0.5 + step / 10)))
    assert evaluations.flag(evaluations.verdict())
    assert stop_flag(run).is_file()
    line = evaluations.describe(evaluations.verdict().warnings[HELD_OUT])
    assert line.startswith("over-optimised at step 6: since step 2 the trained reward went from ")
    assert "\n" not in line
    assert not guard_log_of(run, config, every=2).flag(evaluations.verdict())
    assert not stop_flag(run).exists()


def test_looks_at_other_prompts_and_damaged_ones_are_refused(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    guard_log_of(run, config, every=2).add(GuardEvaluation(0, 1.0, values(0.5, 0.5)))
    with pytest.raises(ValueError, match=r"guard\.jsonl .* guard\.videos_per_prompt"):
        guard_log_of(run, config, every=2, videos_per_prompt=3)
    (run / "guard.jsonl").write_text('{"step": 0\n')
    with pytest.raises(ValueError, match=r"guard\.jsonl is damaged"):
        guard_log_of(run, config, every=2)


def test_every_scale_of_a_checkpoint_is_evaluated_and_scale_1_first(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    log = guard_log_of(run, config, every=2, scales=[0.5, 1.0])
    assert log.missing(2) == [1.0, 0.5]
    log.add(GuardEvaluation(0, 1.0, values(0.4, 0.4)))
    assert log.stage(last=False) == [2, 4, 6]
    log.add(GuardEvaluation(2, 1.0, values(0.6, 0.9)))
    log.update_best(log.recommendation())
    assert log.stage(last=False) == [2, 4, 6], "half a scale is still to come"
    assert (run / "guard" / "step-000002").is_dir()
    log.add(GuardEvaluation(2, 0.5, values(0.8, 0.6)))
    log.update_best(log.recommendation())
    assert not (run / "guard" / "step-000002").exists()
    assert log.stage(last=False) == [4, 6]
    assert [(each.step, each.scale) for each in log.all] == [(0, 1.0), (2, 0.5), (2, 1.0)]
    assert log.steps == [0, 2], "warnings are about checkpoints as they are"
    again = guard_log_of(run, config, every=2, scales=[0.5, 1.0])
    assert again.all == log.all
    best = json.loads((run / "best" / "best.json").read_text())
    assert (best["step"], best["scale"]) == (2, 0.5)
    found = read_recommendation(run)
    assert found is not None
    assert found.spec("toy") == "toy@2*0.5"
    assert found.reason.startswith("held-out reward +0.4")
    model = find_models([found.spec(str(run))])[1]
    assert (model.step, model.scale) == (2, 0.5)
    assert read_means(run)[0] == [0, 2]
    more = guard_log_of(run, config, every=2, scales=[0.25, 0.5, 1.0])
    assert more.missing(2) == [0.25], "a scale that was added later is evaluated later"
    assert more.missing(0) == []


def test_only_checkpoints_that_are_still_there_are_recommended(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    log = guard_log_of(run, config, every=2)
    for step, held_out in ((0, 0.4), (2, 0.9), (4, 0.6)):
        log.add(GuardEvaluation(step, 1.0, values(held_out, 0.5)))
    assert log.recommendation().step == 2
    log.update_best(log.recommendation())
    shutil.rmtree(run / "step-000002")
    assert log.recommendation().step == 2, "best holds a copy"
    shutil.rmtree(run / "best")
    assert log.recommendation().step == 4


def test_files_of_earlier_versions_are_read_and_continued(guarded: tuple[Path, RunConfig]) -> None:
    """Their lines have neither a scale nor a distance, and their best.json neither a scale nor a reason."""
    run, config = guarded
    log = guard_log_of(run, config, every=2)
    for step in (0, 2):
        log.add(GuardEvaluation(step, 1.0, values(0.4 + step / 10, 0.4)))
    lines = [json.loads(line) for line in (run / "guard.jsonl").read_text().splitlines()]
    for line in lines:
        del line["scale"]
    (run / "guard.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "best").mkdir()
    (run / "best" / "best.json").write_text('{"step": 0}')
    assert read_recommendation(run) == Recommendation(0, 1.0, "")
    old = guard_log_of(run, config, every=2, scales=[0.5, 1.0])
    assert [each.scale for each in old.all] == [1.0, 1.0]
    assert old.missing(2) == [0.5]
    old.add(GuardEvaluation(4, 1.0, values(0.7, 0.4) | {"distance": [0.1] * 16}))
    again = guard_log_of(run, config, every=2)
    assert again.steps == [0, 2, 4]
    assert all("distance" not in each.values for each in again.all)


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


def test_further_rewards_belong_to_an_evaluation(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    guard_log_of(run, config, every=2).add(GuardEvaluation(0, 1.0, values(0.5, 0.5)))
    with pytest.raises(ValueError, match=r"guard\.jsonl .* guard\.rewards"):
        guard_log_of(run, config, every=2, rewards=[{"name": "brightness"}])


def test_evaluations_by_a_fitted_reward_are_not_continued_with_another_one(
    guarded: tuple[Path, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = guarded
    monkeypatch.setenv("HOME", str(tmp_path))
    fitted = shutil.copytree(builtin_folder("builtin-frames"), tmp_path / "liked")
    rewards = [{"name": "fitted", "path": "~/liked"}]
    monkeypatch.setattr("rlvid.train.guard_folder.reward_digest", lambda path: None)  # as earlier versions
    guard_log_of(run, config, every=2, rewards=rewards).add(GuardEvaluation(0, 1.0, values(0.5, 0.5)))
    monkeypatch.setattr("rlvid.train.guard_folder.reward_digest", reward_digest)
    guard_log_of(run, config, every=2, rewards=rewards).add(GuardEvaluation(2, 1.0, values(0.5, 0.5)))
    assert guard_log_of(run, config, every=2, rewards=rewards).steps == [0, 2]
    shutil.copytree(builtin_folder("builtin"), fitted, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"guard\.jsonl .* guard\.rewards"):
        guard_log_of(run, config, every=2, rewards=rewards)


def same(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> bool:
    assert found.keys() == wanted.keys()
    return all(found[metric] == pytest.approx(wanted[metric], nan_ok=True, abs=1e-6) for metric in wanted)


def test_an_evaluation_has_scales_distances_and_further_rewards(trained: tuple[Path, RunConfig]) -> None:
    run, config = trained
    guard = {"every": 2, "videos_per_prompt": 1, "steps": 2, "scales": [0.5, 1.0], "rewards": [{"name": "brightness"}]}
    asked = parse_config(config.model_dump() | {"guard": guard, "output": {"checkpoint_every": 2}})
    job = (asked.model_dump(), asked.model.path, asked.reward.model_dump(), ["a red circle", "a dog"])
    evaluator = GuardEvaluator(*job, False)
    base, folder = evaluator.evaluate(None), str(run / "step-000004")
    whole, half = evaluator.evaluate(folder), evaluator.evaluate(folder, 0.5)
    assert same(evaluator.evaluate(folder), whole)
    assert base["distance"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert 0 < np.mean(half["distance"]) < np.mean(whole["distance"])
    assert base["reward_brightness"] != whole["reward_brightness"]
    restarted = GuardEvaluator(*job, False).evaluate(folder, 0.5)
    assert same(restarted, half), "a restarted actor measures the same distance"


def test_a_checkpoint_of_full_fine_tuning_is_evaluated_between_the_base_and_itself(tmp_path: Path) -> None:
    run, config = save_run(tmp_path, 2, finetune="full")
    guard = {"every": 2, "videos_per_prompt": 1, "steps": 2, "scales": [0.5, 1.0]}
    asked = parse_config(config.model_dump() | {"guard": guard, "output": {"checkpoint_every": 2}})
    evaluator = GuardEvaluator(asked.model_dump(), asked.model.path, asked.reward.model_dump(), ["a dog"], False)
    base, folder = evaluator.evaluate(None), str(run / "step-000002")
    half, whole = evaluator.evaluate(folder, 0.5), evaluator.evaluate(folder)
    assert base["distance"] == pytest.approx([0.0], abs=1e-6)
    assert 0 < half["distance"][0] < whole["distance"][0]
    assert same(evaluator.evaluate(folder, 0.5), half)


def test_a_look_is_the_same_whenever_it_is_made(trained: tuple[Path, RunConfig]) -> None:
    run, config = trained
    asked = parse_config(
        config.model_dump()
        | {"guard": {"every": 2, "videos_per_prompt": 2, "steps": 2}, "output": {"checkpoint_every": 2}}
    )
    job = (asked.model_dump(), asked.model.path, asked.reward.model_dump(), ["a red circle", "a dog", "a star", "a b"])
    evaluator = GuardEvaluator(*job, False)
    base, tuned = evaluator.evaluate(None), evaluator.evaluate(str(run / "step-000004"))
    again = GuardEvaluator(*job, False).evaluate(str(run / "step-000004"))
    for metric in tuned:
        assert tuned[metric] == pytest.approx(again[metric], nan_ok=True), metric
    assert base[TRAINED] != tuned[TRAINED]
    for metric in (TRAINED, *TOLERANCE):
        assert len(tuned[metric]) == 4
        assert all(map(math.isfinite, tuned[metric])), metric
    with pytest.raises(AssertionError, match="base model"):
        evaluator.evaluate(None)


@pytest.mark.parametrize("there", [True, False])
def test_a_look_may_take_as_long_as_it_takes_and_room_for_it_may_not(
    guarded: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    run, config = guarded
    watch = object.__new__(guard.Watch)
    watch.guard_log, watch._actor, watch._ready = guard_log_of(run, config, every=2), None, "there"
    watch._ended, watch._given_up = threading.Event(), threading.Event()
    watch._ended.set()
    waits = 0

    def wait(references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        nonlocal waits
        waits += references == ["look"]
        done = there if references == ["there"] else waits > 2 * guard._START
        return (references, []) if done else ([], references)

    monkeypatch.setattr(guard.ray, "wait", wait)
    monkeypatch.setattr(guard.ray, "get", lambda reference: f"result of {reference}")
    if there:
        assert watch._wait_for("look") == "result of look"
    else:
        with pytest.raises(ValueError, match="its actor found no room in the cluster for 180 s after training"):
            watch._wait_for("look")


def test_a_look_with_a_reward_that_hangs_ends_with_its_name(trained: tuple[Path, RunConfig], tmp_path: Path) -> None:
    _, config = trained
    (tmp_path / "mine.py").write_text(
        "import threading\ndef score(frames, prompts):\n    threading.Event().wait()\n", encoding="utf-8"
    )
    own = {"name": "custom", "path": f"{tmp_path}/mine.py:score", "timeout": 0.5}
    asked = parse_config(
        config.model_dump()
        | {"guard": {"every": 2, "videos_per_prompt": 2, "steps": 2}, "reward": own, "output": {"checkpoint_every": 2}}
    )
    evaluator = GuardEvaluator(
        asked.model_dump(), asked.model.path, asked.reward.model_dump(), ["a dog", "a star"], False
    )
    with pytest.raises(RuntimeError, match=r"the reward mine.py:score gave no answer for 0.5 s .* 'a dog'$"):
        evaluator.evaluate(None)


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
