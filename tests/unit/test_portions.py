"""Evaluation in shards: videos once, scores from them, kept as they come, and nothing made twice."""

import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import save_run

from rlvid.actions import evaluate_and_show
from rlvid.diffusion.generate import generate
from rlvid.evaluate.cache import copy_part, read_part, write_part
from rlvid.evaluate.command import write_all
from rlvid.evaluate.load import load_run
from rlvid.evaluate.models import find_models
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.evaluate.score import VideoBatch, VideoScorer
from rlvid.evaluate.scorers import Scorers, parse_rewards
from rlvid.evaluate.work import Evaluation
from rlvid.evaluate.workers import ScoreWorker, VideoWorker, exclusive, run_evaluation
from rlvid.models.unet3d import UNet3DModel
from rlvid.reward.load import load_reward
from rlvid.train.guard_folder import copy_trained

SETS = {"own": ["a red circle", "a dog", "a blue star"], "other": ["a cat"]}


def planned(run: Path, **how: object) -> Evaluation:
    return Evaluation.of(find_models([str(run)]), SETS, **({"steps_list": [2]} | how))


def numbers(rows: list[Row]) -> list[list[object]]:
    """Everything of rows, comparable: NaN is None."""
    names = ("model", "set", "steps", "index", "copy", "prompt", *METRICS)
    values = [[getattr(row, name) for name in names] + list(row.extra.items()) for row in rows]
    return [[None if value != value else value for value in each] for each in values]


def test_portions_give_the_numbers_of_the_whole_and_survive_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = save_run(tmp_path)
    tuned, held_out = load_run(run), load_reward("builtin-heldout")
    scorer = VideoScorer(load_reward("builtin"), held_out, clip=held_out, use_oracle=False)
    whole = []
    for name, scale in (("base", 0.0), ("instructvideo", 1.0)):
        for steps in (2, 3):
            for set_name, prompts in SETS.items():
                frames = generate(tuned.use(scale), prompts, seed=0, steps=steps, guidance=2.0)
                batch = VideoBatch(name, set_name, steps, 0, tuple(prompts), copies=1)
                whole += scorer.rows(batch, (frames * 255).round() / 255)
    evaluation = planned(run, steps_list=[2, 3])
    assert [len(shard.prompts) for shard in evaluation.shards] == [3, 1] * 4
    done: list[tuple[str, int]] = []

    def dies_in_the_fourth(work: type) -> None:
        do = work.do

        def dies(self: object, index: int) -> int:
            if len([each for each in done if each[0] == work.__name__]) == 3:
                raise KeyboardInterrupt
            done.append((work.__name__, index))
            return do(self, index)

        patch.setattr(work, "do", dies)

    for work, missing in ((VideoWorker, (5, 8)), (ScoreWorker, (0, 5))):
        with monkeypatch.context() as patch:
            dies_in_the_fourth(work)
            with pytest.raises(KeyboardInterrupt):
                run_evaluation(evaluation)
        assert (len(evaluation.missing_videos()), len(evaluation.missing_scores())) == missing
    assert not yaml.safe_load((run / "evaluation.yaml").read_text())["complete"]
    told: list[tuple[str, int, int]] = []
    lines: list[str] = []
    rows = run_evaluation(planned(run, steps_list=[2, 3]), progress=lambda *each: told.append(each), tell=lines.append)
    assert [re.findall(r"\d+", line) for line in lines] == [["16", "16", "0"]]
    assert told == [("scored", done, 9) for done in (1, 4, 5, 8, 9)]  # 7 videos had their scores
    for found, expected in zip(numbers(rows), numbers(whole), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is done from here on, one a shard."""
    done: list[str] = []
    for work in (VideoWorker, ScoreWorker):

        def do(self: object, index: int, do=work.do, name=work.__name__) -> int:
            done.append(name)
            return do(self, index)

        monkeypatch.setattr(work, "do", do)
    return done


@pytest.mark.slow
def test_another_reward_or_model_makes_nothing_again_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = save_run(tmp_path)
    done = counted(monkeypatch)
    first = run_evaluation(planned(run))
    assert done == ["VideoWorker"] * 4 + ["ScoreWorker"] * 4
    assert numbers(run_evaluation(planned(run))) == numbers(first)
    assert len(done) == 8  # nothing new
    scorers = Scorers(config.reward.resolved(), further=parse_rewards("brightness,compression"))
    rows = run_evaluation(planned(run, scorers=scorers))
    assert done[8:] == ["ScoreWorker"] * 4
    assert list(rows[0].extra) == ["reward_brightness", "reward_compression"]
    frames = read_part(run / "videos" / "part-00000.parquet")
    with torch.no_grad():
        expected = load_reward("brightness")(frames, list(SETS["own"])).mean(1).tolist()
    assert [row.extra["reward_brightness"] for row in rows[:3]] == pytest.approx(expected)
    del done[:]
    half = Evaluation.of(find_models([str(run)], scales=(0.5, 1.0)), SETS, steps_list=[2], scorers=scorers)
    more = run_evaluation(half)
    assert done == ["VideoWorker"] * 2 + ["ScoreWorker"] * 2
    assert numbers(more[:4] + more[8:]) == numbers(rows)
    assert pq.read_table(run / "videos")["model"].to_pylist() == [row.model for row in more]
    named = Evaluation.of(find_models([f"mine={run}"]), SETS, steps_list=[2], scorers=scorers)
    assert [row.model for row in run_evaluation(named)[4:]] == ["mine"] * 4
    assert len(done) == 4
    assert pq.read_table(run / "videos")["model"].to_pylist() == ["base"] * 4 + ["mine"] * 4


def test_videos_of_other_settings_lie_aside_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = save_run(tmp_path)
    first = run_evaluation(planned(run))
    done, lines = counted(monkeypatch), []
    torn = run / "videos" / ".part-00001.parquet.99.tmp"
    torn.write_bytes(b"of a process that was killed while it wrote")
    other = run_evaluation(planned(run, seed=1), tell=lines.append)
    assert not torn.exists()
    assert done.count("VideoWorker") == 4
    assert re.search(r"^4 parts .*\.others", lines[0])
    assert all(a != b for a, b in zip(numbers(first), numbers(other), strict=True))
    assert len(list((run / "videos").glob("*.parquet"))) == 4
    assert numbers(run_evaluation(planned(run))) == numbers(first)
    assert done.count("VideoWorker") == 4
    save_run(tmp_path, step=4)  # training went on
    shutil.rmtree(run / "step-000003")
    grown = run_evaluation(planned(run))
    assert done.count("VideoWorker") == 6  # the base's are the same
    assert numbers(grown[:4]) == numbers(first[:4])
    assert numbers(grown[4:]) != numbers(first[4:])


@pytest.mark.slow
def test_copies_start_from_noise_of_their_own_which_all_models_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = save_run(tmp_path)
    evaluation = planned(run, copies=6, seed=5)
    assert [len(shard.video_keys) for shard in evaluation.shards] == [12, 6, 6] * 2  # of a prompt together
    rows = run_evaluation(evaluation)
    assert [(r.index, r.copy) for r in rows[:18]] == [(index, copy) for index in range(3) for copy in range(6)]
    frames = read_part(evaluation.part(0))[6 * 1 + 2]  # the dog's third
    alone = generate(load_run(run).use(0.0), ["a dog"], seed=5 + 2, steps=2, guidance=2.0, first_index=1)
    torch.testing.assert_close(frames, (alone[0] * 255).round() / 255, atol=1.01 / 255, rtol=0)
    assert all(row.diversity > 0 for row in rows)
    noise: dict[str, list[torch.Tensor]] = {}
    predict = UNet3DModel.predict

    def watched(self: UNet3DModel, latents: torch.Tensor, *args: object, **kwargs: object) -> object:
        noise.setdefault(now[0], []).append(latents.clone())
        return predict(self, latents, *args, **kwargs)

    monkeypatch.setattr(UNet3DModel, "predict", watched)
    evaluation.clear()
    now = [""]
    do = VideoWorker.do

    def named(self: VideoWorker, index: int) -> int:
        now[0] = self.evaluation.shards[index].model
        return do(self, index)

    monkeypatch.setattr(VideoWorker, "do", named)
    run_evaluation(evaluation)
    first_steps = [torch.cat(noise[name][::2]) for name in ("base", "instructvideo")]
    assert torch.equal(*first_steps)
    with pytest.raises(ValueError, match="--copies 17: allowed are 1 to 16"):
        planned(run, copies=17)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("threading.Event().wait()", r"gave no answer for 0.5 s \(reward.timeout\)"),
        ("return {}['x']", r"raised KeyError: 'x' at mine.py:3"),
        ("sys.exit(3)", r"raised sys.exit\(3\)"),
        ("return frames[0]", r"gave scores of shape \(4, 3, 16, 16\)"),
    ],
)
def test_a_reward_of_the_users_that_fails_is_named_with_model_and_prompt(tmp_path: Path, body: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(f"import sys, threading\ndef score(frames, prompts):\n    {body}\n")
    run, config = save_run(tmp_path)
    settings = config.model_dump(mode="json") | {"reward": {"timeout": 0.5}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    further = parse_rewards(f"mine={tmp_path}/mine.py:score")
    evaluation = planned(run, scorers=Scorers(find_models([str(run)])[0].config.reward, further=further))
    where = "first of the prompt 'a red circle'"
    with pytest.raises(RuntimeError, match=rf"^base, own, D = 2: the reward mine.py:score {words}.*{where}"):
        run_evaluation(evaluation)
    assert not evaluation.missing_videos()  # the videos are kept


@pytest.mark.slow
def test_the_best_checkpoint_is_the_same_model_as_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = save_run(tmp_path)
    before = run_evaluation(planned(run))
    copy_trained(run / "step-000003", run / "best")
    done = counted(monkeypatch)
    both = Evaluation.of(find_models([f"{run}@best", f"{run}@3"]), SETS, steps_list=[2])
    rows = run_evaluation(both)
    assert done == []
    assert [row.model for row in rows[4:]] == ["instructvideo@best"] * 4 + ["instructvideo@3"] * 4
    assert (
        [n[1:] for n in numbers(rows[4:8])]
        == [n[1:] for n in numbers(rows[8:])]
        == [n[1:] for n in numbers(before[4:])]
    )
    save_run(tmp_path, step=6)
    run_evaluation(Evaluation.of(find_models([f"{run}@6", f"{run}@3"]), SETS, steps_list=[2]))
    shutil.rmtree(both.stale_dir)
    del done[:]
    lines: list[str] = []
    assert numbers(run_evaluation(both, tell=lines.append)) == numbers(rows)
    assert done == []  # the videos of @best are those of @3, be they first or last
    assert re.findall(r"\d+", lines[0]) == ["12", "12", "0"]
    both.clear()
    run_evaluation(both, tell=lines.append)
    assert len(lines) == 2  # two models of one checkpoint do not count as one that is there
    (run / "best" / "state.json").write_text("{}")  # training went on, and the guard found a better one
    both.clear()
    with pytest.raises(ValueError, match=r"best has changed since this evaluation began; start the same command again"):
        run_evaluation(both)
    shutil.rmtree(run / "best")
    copy_trained(run / "step-000003", run / "best")
    for step in (3, 6):
        shutil.rmtree(run / f"step-{step:06d}")
    assert find_models([str(run)])[1].step == 3  # best/ has it still
    assert planned(run).identities[2:] == both.identities[2:4]


def test_a_folder_is_one_processes_at_a_time_until_its_tables_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = save_run(tmp_path)

    def comes_between(evaluation: Evaluation, *_: object) -> None:
        with exclusive(evaluation):
            raise AssertionError("another process could have begun")

    with exclusive(planned(run)), pytest.raises(ValueError, match=r"another process .* evaluates into this folder"):
        evaluate_and_show([str(run)], steps=[2], sets=["scenes"], videos=2)
    assert not (run / "videos").exists()
    monkeypatch.setattr("rlvid.evaluate.command.write_all", comes_between)
    with pytest.raises(ValueError, match=r"another process .* evaluates into this folder"):
        evaluate_and_show([str(run)], steps=[2], sets=["scenes"], videos=2)
    assert len(list((run / "videos").glob("part-*"))) == 2


def test_videos_of_another_evaluation_are_never_scored(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    run_evaluation(planned(run))
    with pytest.raises(ValueError, match=r"part-00000.parquet: another process has put other videos there"):
        ScoreWorker(planned(run, seed=1)).do(0)


def test_what_is_damaged_is_named_with_the_remedy(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    evaluation = planned(run)
    rows = run_evaluation(evaluation)
    for path in (evaluation.scores(1), evaluation.part(1)):
        whole = path.read_bytes()
        for spoilt in (whole[:100], b"", whole[:4] + b"\xff" * 60 + whole[64:]):  # the last: a page, but not the footer
            path.write_bytes(spoilt)
            with pytest.raises(ValueError, match=rf"{path.name} is damaged \(.*delete it and run"):
                run_evaluation(planned(run))
        path.unlink()
        assert numbers(run_evaluation(planned(run))) == numbers(rows)


def test_a_video_that_is_not_finite_has_no_frames_and_no_scores(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    evaluation = planned(run)
    run_evaluation(evaluation)
    path = evaluation.part(0)
    frames = read_part(path)
    frames[1, 2, 0, 3, 3] = torch.nan
    write_part(path, evaluation.shards[0].labels, frames, evaluation.identities[0])
    evaluation.scores(0).unlink()
    rows = run_evaluation(evaluation)
    assert pq.read_table(path)["frames"].to_pylist()[1] == []
    assert [row.reward == row.reward for row in rows[:3]] == [True, False, True]
    copy_part(path, path, evaluation.shards[0].labels)
    assert read_part(path)[1].isnan().all()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-00000.parquet is damaged .*delete it and run"):
        run_evaluation(evaluation)


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = save_run(tmp_path)
    write_table = pq.write_table

    def full(table: object, file: object, *more: object, **how: object) -> None:
        if hasattr(file, "write"):
            write_table(table, file, **how)
        raise OSError(28, "No space left on device")

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(ValueError, match=f"{run}: No space left on device; make room and start the same command"):
            run_evaluation(planned(run))
    assert os.listdir(run / "videos") == [".others"]
    with monkeypatch.context() as patch:
        patch.setattr("rlvid.evaluate.command.write_results", full)
        with pytest.raises(ValueError, match=f"{run}: No space left on device"):
            write_all(planned(run), [], {})
        patch.setattr("rlvid.evaluate.workers._work", refused)
        with pytest.raises(PermissionError):
            run_evaluation(planned(run))


def test_a_pool_asks_all_nodes_for_the_run_s_folder_and_its_driver_loads_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(storage: str, name: str) -> None:
        raise ValueError(f"a node does not see {storage} of {name}")

    def loads(*_: object) -> None:
        raise AssertionError("the driver has loaded a model")

    run, _ = save_run(tmp_path)
    monkeypatch.setattr("rlvid.evaluate.workers.start_ray", lambda address: None)
    monkeypatch.setattr("rlvid.evaluate.workers.check_nodes", blind)
    monkeypatch.setattr("rlvid.evaluate.models.load_found", loads)
    with pytest.raises(ValueError, match=f"a node does not see {tmp_path} of run"):
        evaluate_and_show([str(run)], steps=[2], sets=["scenes"], videos=2, workers=2)
