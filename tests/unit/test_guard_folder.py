"""The guard's looks at checkpoints, and what it leaves behind on disk."""

import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard_looks import evaluation_of
from helpers import save_run
from rich.console import Console

from rlvid.config import RunConfig, load_config, parse_config
from rlvid.evaluate.load import load_run
from rlvid.evaluate.models import find_models
from rlvid.reward.builtin import builtin_folder
from rlvid.runs.checkpoints import flaw
from rlvid.runs.find import find_run
from rlvid.runs.guard_log import GuardEvaluation, best_step, find_best, read_means, read_recommendation
from rlvid.runs.over_optimisation import HELD_OUT, TOLERANCE, TRAINED, judge
from rlvid.runs.recommendation import Recommendation
from rlvid.train import guard
from rlvid.train.guard_evaluator import GuardEvaluator
from rlvid.train.guard_folder import GuardLog, copy_trained, guard_prompts, stop_flag
from rlvid.train.preflight import open_run
from rlvid.train.record import reward_digest

PROMPTS = [f"prompt {i}" for i in range(16)]


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


def watch_of(run: Path, evaluations: GuardLog, said: list[str]) -> guard.Watch:
    """A guard whose run has ended."""
    watch = object.__new__(guard.Watch)
    watch.folder, watch.guard_log, watch.verdict, watch.recommended = run, evaluations, evaluations.verdict(), None
    watch._ended, watch._given_up = threading.Event(), threading.Event()
    watch._ended.set()
    watch._say = said.append  # type: ignore[method-assign]
    return watch


def test_a_damaged_file_of_the_guard_does_not_end_training(guarded: tuple[Path, RunConfig]) -> None:
    run, config = guarded
    evaluations, said = guard_log_of(run, config, every=2), list[str]()
    for step in (0, 2):
        judged = values(0.5 + step / 10, 0.5)
        evaluations.add(GuardEvaluation(step, 1.0, judged | {"oracle_score": judged[HELD_OUT]}))
    (run / "best").mkdir()
    (run / "best" / "best.json").write_text("{")
    watch_of(run, evaluations, said)._end()
    (line,) = said
    assert line.startswith("no picture and no recommendation: ")
    assert "best.json is damaged" in line
    shutil.rmtree(run / "best")
    watch_of(run, evaluations, said)._end()
    assert said[1].startswith("recommended of steps 0, 2: ")


def test_a_resumed_guard_writes_all_scales_of_the_last_step_again(
    guarded: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = guarded
    evaluations, acted = guard_log_of(run, config, every=6, scales=[0.5, 1.0]), list[tuple[int, float]]()
    for place in ((0, 1.0), (2, 0.5), (2, 1.0), (6, 0.5), (6, 1.0)):
        evaluations.add(GuardEvaluation(*place, values(0.5, 0.5)))
    watch = watch_of(run, evaluations, [])
    monkeypatch.setattr(guard.Watch, "_act_on", lambda self, evaluation: acted.append(evaluation.place))
    watch._watch()
    assert acted == [(6, 0.5), (6, 1.0)]


def guarded_start(storage: Path, *settings: str) -> RunConfig:
    given = [f"output.storage={storage}", "name=run", "guard.every=20", "output.checkpoint_every=20", *settings]
    return load_config("toy", given)


def test_a_run_that_never_began_loses_the_guards_evaluation_of_its_base(tmp_path: Path) -> None:
    run, quiet = tmp_path / "run", Console(quiet=True)
    first = guarded_start(tmp_path)
    with open_run(first, quiet):
        GuardLog(run, PROMPTS, first).add(GuardEvaluation(0, 1.0, values(0.5, 0.5)))
        (run / "best").mkdir()
    with open_run(guarded_start(tmp_path, "sampling.guidance=5", "seed=4"), quiet):
        assert not (run / "guard.jsonl").exists()
        assert not (run / "best").exists()


def test_another_guard_is_refused_before_the_settings_are_written(tmp_path: Path) -> None:
    run, quiet = tmp_path / "run", Console(quiet=True)
    first = guarded_start(tmp_path, "guard.prompts=in_domain")
    with open_run(first, quiet):
        (run / "archive").mkdir()
        GuardLog(run, guard_prompts(first, ()), first).add(GuardEvaluation(0, 1.0, values(0.5, 0.5)))
    written = (run / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"guard\.jsonl holds evaluations with another"):
        open_run(guarded_start(tmp_path, "guard.prompts=in_domain", "guard.steps=7"), quiet).__enter__()
    with open_run(first, quiet):
        (run / "guard.jsonl").write_text('{"step": 0\n')
    for prompts in ("in_domain", "null"):
        with pytest.raises(ValueError, match=r"guard\.jsonl is damaged"):
            open_run(guarded_start(tmp_path, f"guard.prompts={prompts}"), quiet).__enter__()
    assert (run / "config.yaml").read_bytes() == written


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
