"""A sweep's description, space, memory and judgement; no Ray cluster."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlvid.config import load_config
from rlvid.plan.plan import flops_of_step
from tuning.description import Sweep
from tuning.journal import INVALID, Journal, scores_path, trial_name
from tuning.load import load_sweep, shipped_sweeps
from tuning.measure import job_of
from tuning.search import Judge, Proposals
from tuning.space import draw, grid, parse_space


def sweep(tmp_path: Path, *overrides: str, source: str = "toy") -> Sweep:
    return load_sweep(source, [f"storage={tmp_path}", *overrides])


def test_the_sweep_over_policy_gradients_has_three_seeds_of_each() -> None:
    made = load_sweep("policy")
    runs = [(settings["variant"], settings["seed"]) for settings in made.planned()]
    assert sorted(runs) == [(name, seed) for name in ("ddpo", "dpok", "grpo") for seed in range(3)]


def test_the_sweep_over_the_flow_model_has_three_methods_at_equal_compute() -> None:
    made = load_sweep("wan")
    planned = made.planned()
    assert (made.scheduler, made.unit, made.count) == ("none", "tflops", 9)
    runs = [made.run(settings, "trial", made.rungs[-1]) for settings in planned]
    methods = ("instructvideo", "draft", "grpo")
    assert {(run.method.name, run.seed) for run in runs} == {(name, seed) for name in methods for seed in range(3)}
    assert {run.model.path for run in runs} == {made.base().model.path} == {"builtin-wan"}
    assert {(run.train.workers, run.train.zero_stage) for run in runs} == {(1, 0)}
    assert {run.reward.name for run in runs} == {"builtin-frames"}
    work = [run.train.steps * flops_of_step(run) / 1e12 for run in runs if run.seed == 0]
    assert all(1.8 <= each <= made.rungs[-1] for each in work), "a step of GRPO is the coarsest unit"


def test_the_sweep_for_the_guard_keeps_eight_checkpoints_of_runs_that_nothing_stops() -> None:
    made = load_sweep("guard")
    planned = made.planned()
    assert len(planned) >= 24
    assert (made.scheduler, made.unit) == ("none", "steps")
    runs = [made.run(settings, trial_name(number, settings), made.rungs[-1]) for number, settings in enumerate(planned)]
    assert len({run.name for run in runs}) == len(runs)
    rates: dict[str, set[float]] = {}
    for run in runs:
        assert run.train.steps // run.output.checkpoint_every >= 8
        assert run.output.keep_checkpoints >= 8
        assert not run.guard.every
        assert run.model.path == "builtin", "which alone has an oracle"
        rates.setdefault(run.method.name, set()).add(run.optimizer.lr)
    assert all(sorted(each) == [min(each), 2 * min(each), 4 * min(each)] for each in rates.values())


OF_OTHER_KINDS = {"evidence", "guard", "methods", "policy", "rates", "remedies", "wan"}


@pytest.mark.parametrize("name", sorted(shipped_sweeps().keys() - OF_OTHER_KINDS))
def test_searches_for_lambda_and_s_are_valid(name: str) -> None:
    made = load_sweep(name)
    planned = made.planned()
    assert len(planned) == made.count >= 8
    assert made.scheduler == "asha"
    lambdas = {settings["reward.attenuation"] for settings in planned}
    assert lambdas == {0, 0.5, 1, 2, math.inf}
    assert {settings["reward.segments"] for settings in planned} == {1, 2, 4, 8}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trials=0"], "trials = 0: input should be greater than or equal to 1"),
        (["space.reward.atenuation=[0]"], "unknown key reward.atenuation; allowed here: name, path"),
        (["space.rewards.segments=[1]"], "unknown key rewards; allowed here: name, seed"),
        (["space={}"], "space is empty; name a setting"),
        (["space.reward.segments=[]"], "space.reward.segments = []: the range is empty"),
        (["space.reward.segments=[1, 1.0]"], "1.0 stands in the list twice"),
        (["space.reward.segments=[0]"], "a trial with reward.attenuation=0 reward.segments=0: reward.segments = 0"),
        (["space.method.tau={uniform: [0.8, 0.4]}"], "is empty; the lower end must be below"),
        (["space.method.tau={uniform: [0.4]}"], "expected two finite numbers"),
        (["space.model.lora.rank={integers: [1, 2.5]}"], "expected two whole numbers"),
        (["space.optimizer.lr={loguniform: [0, 1]}"], "both ends must be above 0"),
        (["space.reward={attenuation: [1]}"], "nested keys are written with dots"),
        (["space.method.tau={uniform: [0.4, 0.8]}"], "a grid needs a list of values"),
        (["trials=5"], "the grid has 20 combinations (5 x 4), more than trials = 5"),
        (["space.seed=" + str(list(range(60)))], "the grid has 1200 combinations (5 x 4 x 60), more than 1000"),
        (["algorithm=random"], "trials is missing"),
        (["algorithm=random", "trials=21"], "trials = 21 exceeds the 20 different settings"),
        (["algorithm=random", "trials=4", "first=[{reward.segments: 4}]"], "must name each key of space once"),
        (["rungs=[4, 2]"], "rungs = [4, 2]; expected ascending"),
        (["storage=s3://bucket/sweeps"], "must be a folder"),
        (
            ["unit=videos", "rungs=[4, 6]"],
            "after 4 and after 6 videos, instructvideo with batches of 4 is at step 1",
        ),
        (["rungs=[]"], "rungs = []; expected ascending"),
        (["metric=seconds"], "metric = 'seconds'; allowed: one of objectives"),
        (["objectives=[reward, oracle_score]"], "objective 'oracle_score' is none"),
        (["space.train.steps=[1, 2]"], "train.steps belongs to the sweep"),
        (
            ["guard.rewards=[]", "metric=gain", "objectives=[gain, reward_builtin_video]"],
            "objective reward_builtin_video: no reward of the base's guard; allowed: none",
        ),
        (
            ["reward.name=builtin-video", "metric=gain", "objectives=[gain, reward_builtin_video]"],
            "objective reward_builtin_video: no reward of the base's guard; allowed: reward_builtin_frames",
        ),
        (["reward.held_out=null"], "objective held_out: the base has reward.held_out = null"),
        (
            ["reward.held_out=null", "metric=gain", "objectives=[reward, gain]"],
            "objective gain: the base has reward.held_out = null",
        ),
        (
            ["metric=gain", "objectives=[gain]", "space.reward.name=[builtin, builtin-video]"],
            "a trial trains on builtin-video, which judges all trials; leave it out of guard.rewards, or",
        ),
        (
            [
                "reward.held_out=builtin-frames",
                "space={variant: {other: {reward.name: builtin-frames, reward.held_out: builtin-heldout}}}",
            ],
            "a trial trains on builtin-frames, which judges all trials; set another reward.held_out, or",
        ),
        (
            ["space.sampling.negative_prompt=['', blurred]"],
            "a trial has sampling.negative_prompt = 'blurred', and the base '': its videos would be of another kind",
        ),
        (["space.model.size=[32, 40]"], "a trial has model.height = 40, and the base 32: its videos would be"),
        (["guard.rewards=[{name: oracle}]"], "guard.rewards: a sweep chooses nothing by the oracle"),
        (["trails=3"], "'trails' is a key neither of a sweep nor of a run"),
        (["evaluation.video=3"], "unknown key evaluation.video; allowed here: prompts, videos"),
        (["evaluation.prompts=nowhere.txt"], "evaluation.prompts = 'nowhere.txt' is neither"),
        (["train.batch_size=-1"], "train.batch_size = -1"),
        (["space=[1]", "space.seed=[0, 1]"], "'space.seed=[0, 1]': space = [1] has no keys; write it as a mapping"),
        (["evaluation=in_domain", "evaluation.videos=3"], "evaluation = 'in_domain' has no keys"),
        (["name=" + "a" * 96], "string should match pattern"),
        (
            ["algorithm=optuna", "trials=3", "space={reward.segments: {uniform: [1, 4]}}"],
            "reward.segments = 2.145898: input should be a valid integer",
        ),
        (
            [
                "algorithm=optuna",
                "trials=3",
                "space={reward.skip_below: {uniform: [0, 2]}}",
                "first=[{reward.skip_below: 0.1}]",
            ],
            "reward.skip_below = 2",
        ),
    ],
)
def test_mistakes_are_one_clear_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_sweep("toy", overrides).planned()
    assert "\n" not in str(error.value)


def test_another_method_brings_its_own_settings(tmp_path: Path) -> None:
    made = sweep(tmp_path, "space={method.name: [instructvideo, draft, rwr], optimizer.lr: [1e-4, 0.001]}")
    runs = [made.run(settings, "trial", 4) for settings in made.planned()]
    assert [run.method.name for run in runs] == ["instructvideo"] * 2 + ["draft"] * 2 + ["rwr"] * 2
    assert runs[0].method.tau == 0.6  # the base's own
    assert [run.optimizer.lr for run in runs[:2]] == [1e-4, 1e-3]
    assert runs[0].train.steps == 4
    assert runs[0].output.storage == str(tmp_path / "toy-sweep")


def test_draws_differ_repeat_and_are_extended_by_more_trials() -> None:
    finite = parse_space({"a": [0, 1, "inf"], "b": {"integers": [1, 4]}})
    eight = draw(finite, [{"a": math.inf, "b": 4}], 8, seed=3)
    assert eight[0] == {"a": math.inf, "b": 4}
    assert len({tuple(one.values()) for one in eight}) == 8
    assert draw(finite, [{"a": math.inf, "b": 4}], 12, seed=3)[:8] == eight
    assert draw(finite, [], 8, seed=4) != draw(finite, [], 8, seed=3)
    assert len(grid(finite, None)) == 12
    ranges = parse_space({"lr": {"loguniform": [1e-5, 1e-1]}, "tau": {"uniform": [0.4, 0.8]}, "m": ["x", "y"]})
    many = draw(ranges, [], 200, seed=0)
    assert all(1e-5 <= one["lr"] <= 1e-1 and 0.4 <= one["tau"] <= 0.8 for one in many)
    below = sum(one["lr"] < 1e-3 for one in many)
    assert 75 < below < 125  # half of them, as the logarithm is uniform
    for kind in ("uniform", "loguniform"):  # narrow ones too
        narrow = draw(parse_space({"lr": {kind: [1.0, 1.0001]}}), [], 100, seed=0)
        assert len({one["lr"] for one in narrow}) == 100
        assert all(1.0 <= one["lr"] <= 1.0001 for one in narrow)
    with pytest.raises(ValueError, match="trials = 50: the ranges of space have fewer different values than that"):
        draw(parse_space({"lr": {"uniform": [1.0, 1.0 + 1e-15]}}), [], 50, seed=0)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ([{"a": 3, "b": 4, "c": 0.1}], "first: a = 3 is not in the space; allowed: [0, 1, inf]"),
        ([{"a": 1, "b": 5, "c": 0.1}], "first: b = 5 is not in the space; allowed: {'integers': [1, 4]}"),
        ([{"a": 1, "b": 2.5, "c": 0.1}], "first: b = 2.5 is not in the space"),
        ([{"a": 1, "b": 2, "c": "x"}], "first: c = 'x' is not in the space; allowed: {'uniform': [0, 0.5]}"),
        ([{"a": 1, "b": 2, "c": 0.1}, {"a": 1.0, "b": 2, "c": "1e-1"}], "first: a=1 b=2 c=0.1 stands there twice"),
    ],
)
def test_what_is_tried_first_is_in_the_space_and_there_once(first: list[dict[str, Any]], message: str) -> None:
    space = parse_space({"a": [0, 1, "inf"], "b": {"integers": [1, 4]}, "c": {"uniform": [0, 0.5]}})
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(space, first, 1, seed=0)


def test_the_journal_survives_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"trial": 0, "settings": {"reward.attenuation": math.inf}})
    journal.append({"trial": 1, "settings": {"reward.attenuation": 0}})
    journal.append({"trial": 0, "step": 2, "score": 0.5, "decision": "goes on"})
    journal.append({"trial": 1, "failed": "the disk is full"})
    with open(journal.path, "ab") as file:
        file.write(b'{"trial": 0, "step": 6, "sco')
    again = Journal(tmp_path)
    first, second = again.trials
    assert (first.settings, first.judged, first.end) == ({"reward.attenuation": math.inf}, [2], None)
    assert (second.end, second.reason) == ("failed", "the disk is full")
    again.append({"trial": 1, "step": 2, "score": 0.4, "decision": "stopped early"})
    assert [trial.end for trial in Journal(tmp_path).trials] == [None, "stopped early"]


def judged(judge: Judge, number: int, step: int, score: float) -> str:
    result = dict.fromkeys(load_sweep("toy", []).objectives, score) | {"step": step}
    return judge.on_trial_result(None, SimpleNamespace(config={"trial": number}), result)


SCORES = [(0, 4, 0.5), (1, 4, 0.6), (2, 4, 0.4), (1, 12, 0.1), (3, 4, 0.45), (0, 12, 0.9), (4, 4, 0.7), (5, 4, 0.55)]


def test_asha_decides_alike_whenever_the_driver_dies(tmp_path: Path) -> None:
    """Decisions with a new judge before every result, as after a kill, are those of a judge that lived."""
    made = sweep(tmp_path)
    decisions = []
    for case in ("lives", "dies"):
        (tmp_path / case).mkdir()
        journal = Journal(tmp_path / case)
        for number in range(6):
            journal.append({"trial": number, "settings": {}})
        judge = Judge(made, journal, lambda text: None)
        for number, step, score in SCORES:
            if case == "dies":
                journal = Journal(tmp_path / case)
                judge = Judge(made, journal, lambda text: None)
            judged(judge, number, step, score)
        decisions.append([entry["decision"] for entry in journal.entries if "score" in entry])
    assert decisions[0] == decisions[1]
    assert decisions[0][:4] == ["goes on", "goes on", "stopped early", "finished"]  # the last rung ends, whatever comes
    assert decisions[0][6:] == ["goes on", "stopped early"]


def test_without_a_scheduler_all_go_on_and_a_score_must_be_finite(tmp_path: Path) -> None:
    made, journal = sweep(tmp_path, "scheduler=none"), Journal(tmp_path)
    for number in range(2):
        journal.append({"trial": number, "settings": {}})
    told: list[str] = []
    judge = Judge(made, journal, told.append)
    assert judged(judge, 0, 4, 0.9) == judged(judge, 1, 4, 0.1) == "CONTINUE"
    assert judged(judge, 1, 12, math.nan) == "STOP"
    assert journal.trials[1].end == "failed"
    assert told[-1] == "trial-001 failed: held_out is not finite after 12 steps"


def test_only_what_has_not_ended_is_proposed_again(tmp_path: Path) -> None:
    made = sweep(tmp_path)
    planned, journal = made.planned(), Journal(tmp_path)
    first = Proposals(made, journal, planned)
    assert (first.left, len(journal.trials)) == (20, 20)
    assert first.suggest("a")["trial"] == 0
    journal.append({"trial": 0, "step": 4, "score": 0.5, "decision": "goes on"})
    journal.append({"trial": 1, "step": 4, "score": 0.5, "decision": "stopped early"})
    journal.append({"trial": 2, "failed": "lost"})
    again = Proposals(made, Journal(tmp_path), planned)
    assert again.left == 19
    proposals = [again.suggest(str(i)) for i in range(19)]
    assert [(one["trial"], one["judged"]) for one in proposals[:3]] == [(0, [4]), (2, []), (3, [])]
    assert proposals[0]["run"]["name"] == "trial-000"
    assert proposals[0]["run"]["reward"]["attenuation"] == 0
    assert again.suggest("last") == Proposals.FINISHED
    assert len(Journal(tmp_path).trials) == 20


def test_optuna_is_told_the_past(tmp_path: Path) -> None:
    made = sweep(tmp_path, "algorithm=optuna", "trials=6", "space.optimizer.lr={loguniform: [1e-4, 1e-2]}")
    journal = Journal(tmp_path)
    proposals = Proposals(made, journal, made.planned())
    for number in range(3):
        one = proposals.suggest(f"id{number}")
        assert 1e-4 <= one["run"]["optimizer"]["lr"] <= 1e-2
        journal.append({"trial": number, "step": 4, "score": number / 10, "decision": "stopped early"})
        proposals.on_trial_complete(f"id{number}")
    again = Proposals(made, Journal(tmp_path), made.planned())
    assert again.left == 3
    values = [trial.value for trial in again._optuna._ot_study.trials]
    assert values == [0.0, 0.1, 0.2]
    assert again.suggest("x")["trial"] == 3
    kept = Journal(tmp_path).trials
    assert len({json.dumps(trial.settings) for trial in kept}) == 4


def test_a_proposal_that_is_no_valid_run_ends_there_and_the_next_one_comes(tmp_path: Path) -> None:
    """Each setting is fine, and a group of two does not fit a batch of one."""
    made = sweep(
        tmp_path, "algorithm=optuna", "trials=8",
        "space={train.batch_size: {integers: [1, 4]}, train.group_size: {integers: [1, 2]}}",
    )  # fmt: skip
    journal = Journal(tmp_path)
    journal.append({"trial": 0, "settings": {"train.batch_size": 1, "train.group_size": 2}})  # open, as after a kill
    proposals = Proposals(made, journal, [])
    valid = 0
    while proposals.suggest(str(valid)) != Proposals.FINISHED:
        valid += 1
    trials = Journal(tmp_path).trials
    assert len(trials) == 8
    assert trials[0].end == INVALID
    assert "train.group_size = 2 does not divide train.batch_size = 1" in str(trials[0].reason)
    assert 0 < valid == [each.end for each in trials].count(None) < 7
    assert Proposals(made, Journal(tmp_path), []).left == valid  # the others would be no run the next time either


def test_storage_and_names_may_be_what_yaml_would_take_for_something_else(tmp_path: Path) -> None:
    name = "a" * 95
    made = load_sweep("toy", [f"storage='{tmp_path}/a: b'", f"name={name}"])
    assert made.run({}, "trial-000", 4).output.storage == f"{tmp_path}/a: b/{name}"
    best = made.to_train({}, f"{name}-best")
    assert (best.output.storage, best.name) == (f"{tmp_path}/a: b", f"{name}-best")


def test_the_base_measures_whatever_varies(tmp_path: Path) -> None:
    made = sweep(tmp_path, "space={sampling.guidance: [1, 5], reward.attenuation: [0]}", "evaluation.steps=7")
    assert made.base().sampling.guidance == 3.0
    assert made.base().reward.attenuation == 1.0
    assert made.run(made.planned()[1], "t", 4).sampling.guidance == 5.0
    assert job_of(made, use_gpu=False)["evaluation"]["steps"] == 7


def test_the_best_settings_are_a_run_of_the_base_s_length(tmp_path: Path) -> None:
    made = sweep(tmp_path)
    best = made.to_train({"reward.attenuation": math.inf, "reward.segments": 2}, "best")
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best.model_dump(mode="json")))
    again = load_config(tmp_path / "best.yaml")
    assert again == best
    assert (again.reward.attenuation, again.reward.segments, again.name) == (math.inf, 2, "best")
    assert again.train.steps == load_config("toy").train.steps
    assert again.output.videos_every == load_config("toy").output.videos_every
    assert again.sampling.steps == 10
    assert scores_path(tmp_path, trial_name(7, {}), 4) == tmp_path / "trial-007" / "rungs" / "000004.json"
