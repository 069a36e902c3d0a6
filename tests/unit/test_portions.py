"""Evaluation in portions: the rows of the whole, kept as they come, and nothing made twice."""

import shutil
from pathlib import Path

import pytest
from helpers import save_run

from rlvid.actions import evaluate_and_show
from rlvid.evaluate import portions
from rlvid.evaluate.evaluate import METRICS, Row, evaluate_model
from rlvid.evaluate.portions import Evaluation, Scorer, read_rows, run_evaluation
from rlvid.evaluate.run import find_run, load_run
from rlvid.reward.load import load_reward
from rlvid.train.looks import copy_trained

SETS = {"own": ["a red circle", "a dog", "a blue star"], "other": ["a cat"]}


def numbers(rows: list[Row]) -> list[list[object]]:
    """Everything of rows, comparable: NaN is None."""
    values = [[getattr(row, name) for name in ("model", "set", "steps", "index", "prompt", *METRICS)] for row in rows]
    return [[None if value != value else value for value in each] for each in values]


def test_portions_give_the_rows_of_the_whole_and_survive_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = save_run(tmp_path)
    tuned, how = load_run(run), {"reward": load_reward("builtin"), "held_out": load_reward("builtin-heldout")}
    how |= {"steps_list": [2, 3], "guidance": tuned.config.sampling.guidance, "use_oracle": False}
    whole = [
        row for name, scale in (("base", 0.0), ("instructvideo", 1.0))
        for row in evaluate_model(tuned.use(scale), SETS, name=name, **how)
    ]  # fmt: skip
    evaluation = Evaluation.of(*find_run(run), SETS, steps_list=[2, 3])
    assert [len(portion.prompts) for portion in evaluation.portions] == [3, 1] * 4
    scored: list[int] = []
    score = Scorer.score

    def dies_in_the_fourth(self: Scorer, index: int) -> int:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(index)
        return score(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", dies_in_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(evaluation)
    assert evaluation.missing() == [3, 4, 5, 6, 7]
    told: list[tuple[int, int]] = []
    rows = run_evaluation(Evaluation.of(*find_run(run), SETS, steps_list=[2, 3]), progress=lambda *p: told.append(p))
    assert told[0] == (8, 16)  # 7 videos were there
    assert told[-1] == (16, 16)
    assert numbers(rows) == numbers(whole)
    assert all((a.frames == b.frames).all() for a, b in zip(rows, whole, strict=True))
    evaluation.forget()
    assert not list(run.glob(".evaluation-*"))


def test_another_evaluation_is_kept_apart_and_the_same_one_runs_once_at_a_time(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    made = [
        Evaluation.of(*find_run(run), SETS, steps_list=[2], seed=seed, scales=scales)
        for seed, scales in ((0, None), (1, None), (0, {"base": 0.0, "half": 0.5}))
    ]
    assert len({each.folder for each in made}) == 3
    with (
        portions._alone(made[0]),
        pytest.raises(ValueError, match="another process makes the same evaluation"),
    ):
        run_evaluation(made[0])


def test_the_best_checkpoint_is_evaluated_once_training_has_deleted_the_original(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    sets = {"own": ["a dog"]}
    before = run_evaluation(Evaluation.of(*find_run(run), sets, steps_list=[2]))
    copy_trained(run / "step-000003", run / "best")
    shutil.rmtree(run / "step-000003")
    evaluation = Evaluation.of(*find_run(run, 3), sets, steps_list=[2])
    assert evaluation.missing() == []  # it is the same model
    evaluation.forget()
    assert numbers(run_evaluation(evaluation)) == numbers(before)


def test_a_pool_asks_all_nodes_for_the_run_s_folder_and_its_driver_loads_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(storage: str, name: str) -> None:
        raise ValueError(f"a node does not see {storage} of {name}")

    def loads(*_: object) -> None:
        raise AssertionError("the driver has loaded a model")

    run, _ = save_run(tmp_path)
    monkeypatch.setattr("rlvid.train.launch.start_ray", lambda address: None)
    monkeypatch.setattr("rlvid.train.nodes.check_nodes", blind)
    monkeypatch.setattr("rlvid.evaluate.run.load_found", loads)
    monkeypatch.setattr(portions, "load_found", loads)
    with pytest.raises(ValueError, match=f"a node does not see {tmp_path} of run"):
        evaluate_and_show(str(run), [2], ["scenes"], 2, None, 0, None, workers=2)


def test_rows_come_back_from_disk(tmp_path: Path) -> None:
    values = dict.fromkeys(METRICS, float("nan")) | {"reward": 0.1 + 0.2}
    rows = [Row("base", "own", 20, 7, "a dog", **values)]
    portions.write_rows(tmp_path / "a.parquet", rows)
    assert numbers(read_rows(tmp_path / "a.parquet")) == numbers(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
