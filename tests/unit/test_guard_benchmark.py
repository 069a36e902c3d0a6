"""The measurement of the guard: its plan of a run, the files of its candidates, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import save_run

from jobs.benchmark import guard
from jobs.benchmark.guard import Plan, check_about, columns, evaluate_run, file_of, plan_run, read_run
from jobs.benchmark.regret import ORACLE
from rlvid.config import load_config
from rlvid.evaluate.models import BASE, EvaluatedModel
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.evaluate.scorers import parse_rewards
from rlvid.runs.checkpoints import CheckpointRef

SETUP = {"set": "in_domain", "prompts": 8, "videos": 2, "steps": 2, "reuse": 1, "seed": 0}
ABOUT = {
    "method": "draft",
    "lr": 0.01,
    "rewards": {"reward": "builtin"},
    "files": ["base.json", "step-000002x0.5.json"],
}


def model(step: int | None, scale: float = 1.0) -> EvaluatedModel:
    config = load_config("toy")
    return EvaluatedModel("m", "base" if step is None else "run", config, CheckpointRef(Path("run"), 2), scale, step)


def rows(value: float) -> list[Row]:
    """Two videos of each of four prompts; the second video of prompt 0 is not finite."""
    extra = {"reward_second": 2 * value, "distance": 0.1}
    scores: dict[str, Any] = dict.fromkeys(METRICS, value)
    found = [Row("m", "s", 2, k, "p", **scores, copy=c, extra=extra) for k in range(4) for c in range(2)]
    lost = dict.fromkeys(METRICS, math.nan)
    found[1] = Row("m", "s", 2, 0, "p", **lost, copy=1, extra=dict.fromkeys(extra, math.nan))
    return found


def write(folder: Path, *models: EvaluatedModel) -> None:
    check_about(folder, ABOUT)
    for place, each in enumerate(models):
        (folder / file_of(each)).write_text(json.dumps(columns(rows(0.5 + place / 10), each)))


def test_a_candidate_comes_back_from_its_file_with_a_value_per_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, model(None, 0.0))
    assert read_run(folder) is None, "one is still missing"
    write(folder, model(None, 0.0), model(2, 0.5))
    run = read_run(folder)
    assert run is not None
    assert (run.name, run.group) == ("run", "draft at 0.01 on builtin")
    base, tuned = run.candidates
    assert (base.step, tuned.step, tuned.scale) == (0, 2, 0.5)
    assert tuned.values[ORACLE] == pytest.approx([0.6] * 4), "the finite video stands for its prompt"
    assert tuned.values["reward_second"] == pytest.approx([1.2] * 4)
    assert set(guard.KEPT) <= tuned.values.keys()
    (folder / "base.json").write_text('{"step": 0')
    with pytest.raises(ValueError, match=r"base\.json is damaged .*delete it"):
        read_run(folder)


def test_an_evaluation_with_another_setup_is_refused(tmp_path: Path) -> None:
    check_about(tmp_path / "run", ABOUT)
    check_about(tmp_path / "run", ABOUT)
    with pytest.raises(ValueError, match=r"lr = 0.01, and now it is 0.02; choose another folder"):
        check_about(tmp_path / "run", ABOUT | {"lr": 0.02})


def test_runs_that_are_measured_otherwise_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "evaluate_run", lambda *arguments: pytest.fail("something is measured"))
    check_about(tmp_path / "first", ABOUT | SETUP)
    check_about(tmp_path / "second", ABOUT | SETUP | {"prompts": 16})
    with pytest.raises(ValueError, match="first is measured with prompts = 8, and second with 16;"):
        guard.main(["--out", str(tmp_path)])
    check_about(tmp_path / "third", ABOUT | SETUP)
    shutil.rmtree(tmp_path / "second")
    monkeypatch.setattr(guard, "plan_run", lambda run, setup, *more: Plan(run, (), (), setup))
    given = ["--prompts", "8", "--steps", "2", "--seed", "0"]
    with pytest.raises(ValueError, match="new is measured with seed = 3, and first with 0;"):
        guard.main(["new", "--out", str(tmp_path), *given[:-1], "3"])


def test_runs_with_other_scales_or_rewards_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "evaluate_run", lambda *arguments: pytest.fail("something is measured"))
    whole = SETUP | {"scales": [0.5, 1.0], "checkpoints": 4, "further": []}
    for key, other in (("scales", [1.0]), ("checkpoints", 8), ("further", ["reward_x"])):
        folder = tmp_path / key
        check_about(folder / "first", ABOUT | whole)
        check_about(folder / "second", ABOUT | whole | {key: other})
        with pytest.raises(ValueError, match=f"first is measured with {key} = "):
            guard.main(["--out", str(folder)])
    check_about(tmp_path / "older" / "first", ABOUT | SETUP)
    check_about(tmp_path / "older" / "second", ABOUT | whole)
    with pytest.raises(ValueError, match="holds no complete evaluation"):
        guard.main(["--out", str(tmp_path / "older")])


def test_a_run_that_was_measured_otherwise_is_refused_before_another_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "evaluate_run", lambda *arguments: pytest.fail("something is measured"))
    monkeypatch.setattr(guard, "plan_run", lambda run, setup, *more: Plan(run, (), (), setup))
    monkeypatch.setattr(Plan, "about", property(lambda self: ABOUT | self.setup | {"lr": 0.5}))
    given = ["--prompts", "8", "--steps", "2", "--seed", "0"]
    check_about(tmp_path / "old", ABOUT | SETUP)
    with pytest.raises(ValueError, match=r"old: was measured with lr = .*, and now it is 0.5"):
        guard.main(["new", "old", "--out", str(tmp_path), *given])


@pytest.mark.parametrize("content", ["{}", "", "[]", json.dumps(ABOUT | {"rewards": {}})])
def test_a_damaged_setup_is_named(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "about.json").write_text(content)
    for read in (
        lambda: check_about(folder, ABOUT),
        lambda: read_run(folder),
        lambda: guard.main(["--out", str(tmp_path)]),
    ):
        with pytest.raises(ValueError, match=r"run/about\.json is damaged .*; delete .*/run;") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_run_keeps_the_names_of_its_rewards(tmp_path: Path) -> None:
    check_about(tmp_path, ABOUT | {"rewards": {"reward": "builtin", "held_out": "builtin-heldout"}, "files": []})
    run = read_run(tmp_path)
    assert run is not None
    assert (run.trained, run.held_out) == ("builtin", "builtin-heldout")


def test_only_runs_that_an_oracle_can_grade_are_measured(tmp_path: Path) -> None:
    folder, _ = save_run(tmp_path, 2)
    with pytest.raises(ValueError, match=r"model\.path = .*only the built-in world has an oracle"):
        plan_run(str(folder), SETUP, [1.0], 4, ())


@pytest.mark.parametrize(("stop", "words"), [(True, "guard.stop = true"), (False, "")])
def test_a_plan_takes_checkpoints_evenly_and_leaves_a_reward_out_that_training_knew(
    monkeypatch: pytest.MonkeyPatch, stop: bool, words: str
) -> None:
    config = load_config("toy", [f"guard.stop={str(stop).lower()}", "guard.every=20"])
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"name": "brightness"})})
    ref = CheckpointRef(Path("/runs/toy/step-000001"), 1)

    def find(texts: list[str], scales: list[float]) -> tuple[EvaluatedModel, ...]:
        steps = [(step, scale) for step in range(1, 11) for scale in scales]
        tuned = [EvaluatedModel(f"{s} {k}", "checkpoint", config, ref, k, s) for s, k in steps]
        return (EvaluatedModel(BASE, "base", config, ref, 0.0, None), *tuned)

    monkeypatch.setattr(guard, "find_models", find)
    further = parse_rewards("brightness,compression")
    if stop:
        with pytest.raises(ValueError, match=words):
            plan_run("toy", SETUP, [0.5, 1.0], 4, further)
        return
    plan = plan_run("toy", SETUP, [0.5, 1.0], 4, further)
    assert [file_of(each) for each in plan.candidates[:3]] == [
        "base.json",
        "step-000003x0.5.json",
        "step-000003x1.json",
    ]
    assert [each.step for each in plan.candidates if each.scale == 1] == [3, 5, 8, 10]
    assert [each.metric for each in plan.further] == ["reward_compression"]
    assert len(plan_run("toy", SETUP, [1.0], 50, ()).candidates) == 11


def test_candidates_that_have_a_file_are_not_evaluated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "about", property(lambda plan: ABOUT))
    monkeypatch.setattr(guard, "Loader", lambda: pytest.fail("all of them are there"))
    models = (model(None, 0.0), model(2, 0.5))
    write(tmp_path / "run", *models)
    evaluate_run(Plan("run", models, (), SETUP), tmp_path)


def test_the_report_alone_needs_a_complete_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="holds no complete evaluation"):
        guard.main(["--out", str(tmp_path)])
    for wrong in (["--scales", "0.5"], ["--prompts", "4"]):
        with pytest.raises(ValueError, match=wrong[0]):
            guard.main(["--out", str(tmp_path), *wrong])
    folder = tmp_path / "run"
    check_about(folder, ABOUT | {"files": ["base.json", "step-000002x0.5.json", "step-000002x1.json"]})
    for place, each in enumerate((model(None, 0.0), model(2, 0.5), model(2))):
        (folder / file_of(each)).write_text(json.dumps(columns(rows(0.5 + place / 10), each)))
    check_about(tmp_path / "later", ABOUT)
    guard.main(["--out", str(tmp_path)])
    assert (tmp_path / "regret.md").is_file()
    said = capsys.readouterr()
    assert "not complete, and left out: later" in said.out + said.err


@pytest.mark.parametrize("name", ["--steps", "--fixed"])
def test_no_steps_are_not_taken_for_the_default(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} 0: must be at least 1"):
        guard.main(["--out", str(tmp_path), name, "0"])
