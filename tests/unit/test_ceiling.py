"""A ceiling of the reward that is a quantile of real clips' rewards; without Ray."""

import io
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context, Stopwatch
from rlvid.algorithms.scoring import score
from rlvid.config import parse_config
from rlvid.data.encoders import encode_items
from rlvid.data.shares import tensors
from rlvid.data.sources import read_rendered, rendered_clip, training_set
from rlvid.data.training_set import Source, TrainingSet
from rlvid.data.writing import ClipWriter
from rlvid.models.unet3d import load_model
from rlvid.plots.video import write_mp4
from rlvid.reward.load import trained_reward
from rlvid.reward.segments import choose_frames
from rlvid.toy.tiny import save_tiny_model
from rlvid.train import ceiling
from rlvid.train.ceiling import FILE, ClipRewards, evenly, real_clips, reward_clips, run_ceiling
from rlvid.train.job import Job
from rlvid.train.resume import carries_over

SHAPE: dict[str, Any] = {"frames": 4, "size": 16}
OWN = """
import torch

def some(frames, prompts):
    scores = frames.mean((2, 3, 4))
    return torch.where((scores.mean(1) > scores.mean())[:, None], scores, torch.nan)

def none(frames, prompts):
    raise KeyError("nothing here")

def bright(frames, prompts):
    return frames.mean((2, 3, 4))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, seven encoded clips, a file of rewards, and three videos, of which the second is damaged."""
    folder = tmp_path_factory.mktemp("ceiling")
    save_tiny_model(folder / "tiny")
    items = [{"index": i, "source": f"clip {i}", "caption": ""} for i in range(7)]
    with ClipWriter(folder / "clips", {}) as writer:
        model = load_model(str(folder / "tiny"), **SHAPE)
        writer.add(encode_items(model, items, partial(read_rendered, 0)))
        writer.finish({"fingerprint": "clips"}, [])
    (folder / "mine.py").write_text(OWN)
    (folder / "in").mkdir()
    for index, name in enumerate("abc"):
        write_mp4(folder / "in" / f"{name}.mp4", rendered_clip(0, index, 8, 32)[1], 8)
        (folder / "in" / f"{name}.txt").write_text(f"this is {name}")
    (folder / "in" / "b.mp4").write_bytes((folder / "in" / "b.mp4").read_bytes()[:300])
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards clips in this process."""
    monkeypatch.setattr(ceiling, "_on_ray", reward_clips)


def job_of(home: Path, method: str = "rwr", data: dict[str, Any] | None = None, **reward: Any) -> Job:
    sections = {
        "name": "run", "model": {"path": str(home / "tiny"), **SHAPE}, "method": method, "sampling": {"steps": 4},
        "data": {"source": str(home / "clips")} | (data or {}), "train": {"batch_size": 4, "micro_batch": 4},
        "reward": {"segments": 2, "ceiling": "q0.5"} | reward, "output": {"storage": str(home / "runs")},
    }  # fmt: skip
    return Job.of(parse_config(sections), run=home / "runs" / "run", use_gpu=False, progress=None)


def clips_of(job: Job) -> TrainingSet:
    return training_set(job.config, Console(file=io.StringIO()))


def heard(job: Job, clips: TrainingSet) -> tuple[float | None, str]:
    """The ceiling, and what the console prints."""
    console = Console(file=io.StringIO(), width=40)
    return run_ceiling(job, clips, console), console.file.getvalue()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("given", "found"), [(0.8, 0.8), ("-2", -2.0), (1, 1.0), ("q.90", "q0.9"), ("q1", "q1.0"), ("q-0", "q0.0")]
)
def test_a_ceiling_is_a_number_or_a_quantile_in_one_form(given: Any, found: Any) -> None:
    config = parse_config({"reward": {"ceiling": given}})
    assert config.reward.ceiling == found
    assert type(config.reward.ceiling) is type(found)
    assert config.reward.ceiling_quantile == (float(found[1:]) if isinstance(found, str) else None)
    assert parse_config(config.model_dump(mode="json")) == config


def test_fingerprints_of_runs_with_a_number_or_none_stay() -> None:
    def fingerprint(**reward: Any) -> str:
        return parse_config({"reward": reward}).fingerprint

    assert fingerprint() == fingerprint(ceiling=None) == "cc76c8fc07d3", "as in versions without quantiles"
    assert fingerprint(ceiling=0.8) == "edfd7acf554c"
    assert fingerprint(ceiling=1) == fingerprint(ceiling="1") == "9df03d4dbd04"
    assert fingerprint(ceiling="q0.9") == fingerprint(ceiling="q.90") != fingerprint(ceiling=0.9)


def test_a_run_with_another_quantile_is_another_run() -> None:
    before, now = (parse_config({"reward": {"ceiling": each}}) for each in ("q0.9", "q0.5"))
    assert carries_over(before, before) == "all"
    with pytest.raises(ValueError, match=r"another config \(reward\.ceiling: q0\.9 -> q0\.5\)"):
        carries_over(before, now)


@pytest.mark.parametrize("source", ["prompts", "samples", ["samples", "prompts"]])
def test_data_without_real_clips_is_refused(source: Any) -> None:
    data = {"reward": {"ceiling": "q0.9"}, "method": "raft", "data": {"source": source}}
    with pytest.raises(ValueError, match=r"^reward\.ceiling = 'q0\.9' .*data\.source = .* has none; .*=0\.8$") as error:
        parse_config(data)
    assert "\n" not in str(error.value)
    parse_config(data | {"reward": {"ceiling": 0.8}})
    parse_config(data | {"data": {"source": ["builtin", "prompts"]}})


def test_methods_see_the_number(home: Path) -> None:
    job = job_of(home)
    context = Context(job.config, *[None] * 3, Stopwatch(torch.device("cpu")), measured_ceiling=0.25)  # type: ignore[arg-type]
    assert context.ceiling == 0.25
    context.config = parse_config({"reward": {"ceiling": 0.5}})
    assert context.ceiling == 0.5
    context.config = parse_config({})
    assert context.ceiling is None


# ------------------------------------------------------------------------------------------------------ the number


def test_the_quantile_is_numpys_over_the_rewards_that_there_are() -> None:
    values = np.random.default_rng(0).normal(size=37).tolist()
    for share in (0.0, 0.13, 0.5, 0.9, 1.0):
        expected = np.quantile(values, share)
        assert ClipRewards(values).quantile(share) == pytest.approx(expected, abs=1e-12)
        assert ClipRewards([math.nan, *values, math.nan]).quantile(share) == pytest.approx(expected, abs=1e-12)
    assert ClipRewards([math.nan, 1.0, 2.0]).count == 2


def test_clips_are_chosen_evenly() -> None:
    assert evenly(5, 256) == [0, 1, 2, 3, 4]
    assert evenly(10, 4) == [0, 2, 5, 7]
    found = evenly(1000, 256)
    assert len({*found}) == 256
    assert {*np.diff(found).tolist()} == {3, 4}
    assert 996 <= found[-1] < 1000


def test_of_a_mixture_the_real_clips_are_taken_and_videos_for_methods_without_clips_too() -> None:
    found = {"clips": Source("clips", "a", "1", 3), "prompts": Source("prompts", "b", "2", 4)}

    def opened(source: Source) -> Any:
        return type("Opened", (), {"kind": "videos" if source.place == "c" else "clips"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "open", opened)
        clips = TrainingSet((found["clips"], found["prompts"], Source("prompts", "c", "3", 5)))
        real = real_clips(("builtin", "prompts", "folder"), clips)
    assert [(each.place, each.kind) for each in real.sources] == [("a", "clips"), ("c", "videos")]


def expected_rewards(job: Job, clips: TrainingSet) -> list[float]:
    """The rewards of all clips, written out: TAR's weights of the frames that SegVR draws for a clip's place."""
    model = load_model(job.model, **SHAPE)
    reward, found = trained_reward(job.reward), []
    for place in range(clips.count):
        (caption,), _, posterior = tensors(clips.rows([place]))
        frames_S = choose_frames(randomness.uniform((2,), job.config.seed, "segments", [(place,)]), 4)
        with torch.no_grad():
            frames = model.decode_frames(posterior.mean, frames_S)
            scores_S = reward(frames, [caption])[0].double()
        weights_S = torch.exp(-job.config.reward.attenuation * (frames_S[0] - 2).abs().double())
        weights_S /= weights_S.sum() if job.config.frame_weights == "normalised" else 2
        found.append(float((weights_S * scores_S).sum()))
    return found


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("method", ["rwr", "instructvideo"])
def test_clips_are_rewarded_as_videos_are(home: Path, method: str) -> None:
    job = job_of(home, method)
    clips = clips_of(job)
    expected = expected_rewards(job, clips)
    assert reward_clips(job, clips, range(7)).rewards == pytest.approx(expected, rel=1e-5)
    assert max(expected) > min(expected) + 1e-4
    found, said = heard(job, clips)
    assert found == pytest.approx(float(np.quantile(expected, 0.5)), rel=1e-5)
    assert said == f"ceiling {found:.3g}: the 0.5 quantile of the rewards of 7 clips\n"
    facts = {"ceiling": found, "quantile": 0.5, "clips": 7, "left_out": 0, "reward": "builtin"}
    assert json.loads((job.run / FILE).read_text()) == facts

    model = load_model(job.model, **SHAPE)
    context = Context(
        job.config, model, trained_reward(job.reward), None, Stopwatch(torch.device("cpu")), measured_ceiling=found
    )
    captions, text, posterior = tensors(clips.rows(range(7)))
    rewards = score(context, Batch(0, [*range(7)], captions, text, posterior.mean), posterior.mean)
    assert rewards.metrics["reward/at_ceiling"] == (4.0, 7.0), "the median itself is at the ceiling"


@pytest.mark.usefixtures("here")
def test_a_run_that_has_begun_keeps_its_ceiling(home: Path, tmp_path: Path) -> None:
    job = Job.of(job_of(home).config, run=tmp_path / "run", use_gpu=False, progress=None)
    nothing = TrainingSet(())
    (job.run / "archive").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{FILE} cannot be read .*; bring back the file .* choose another name="):
        run_ceiling(job, nothing, Console())
    (job.run / FILE).write_text('{"ceiling": 0.25, "quantile": 0.5}')
    assert heard(job, nothing) == (0.25, "")
    for content in ('{"ceiling": 0.25, "quantile": 0.9}', '{"ceiling": NaN, "quantile": 0.5}', "{}", "{"):
        (job.run / FILE).write_text(content)
        with pytest.raises(ValueError, match=rf"{FILE} is damaged .*; bring back the file"):
            run_ceiling(job, nothing, Console())


def test_a_run_with_a_number_computes_nothing(home: Path, tmp_path: Path) -> None:
    for number in (0.8, None):
        job = Job.of(job_of(home, ceiling=number).config, run=tmp_path, use_gpu=False, progress=None)
        assert run_ceiling(job, TrainingSet(()), Console()) is None
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------------------------ failures


@pytest.mark.usefixtures("here")
def test_clips_without_a_reward_are_left_out_and_counted(home: Path) -> None:
    bright, some = (job_of(home, path=f"{home}/mine.py:{name}") for name in ("bright", "some"))
    clips = clips_of(some)
    rewards, expected = (reward_clips(each, clips, range(7)).rewards for each in (some, bright))
    sound = [value for value in rewards if math.isfinite(value)]
    assert 0 < len(sound) < 7, "the test needs clips on both sides"
    assert all(math.isnan(a) or a == b for a, b in zip(rewards, expected, strict=True))
    found, said = heard(some, clips)
    assert found == pytest.approx(float(np.median(sound)))
    assert f"of {len(sound)} clips; {7 - len(sound)} more got none (the reward mine.py:some gave NaN" in said
    assert json.loads((some.run / FILE).read_text())["left_out"] == 7 - len(sound)


@pytest.mark.usefixtures("here")
def test_a_reward_that_fails_on_all_clips_is_one_error(home: Path) -> None:
    job = job_of(home, path=f"{home}/mine.py:none")
    job.run.joinpath(FILE).unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match=r"^reward\.ceiling = 'q0\.5': none of the 7 real clips .*KeyError.*$"
    ) as error:
        run_ceiling(job, clips_of(job), Console())
    assert "\n" not in str(error.value)
    assert not (job.run / FILE).exists()


@pytest.mark.slow
def test_a_reward_in_a_process_of_its_own_rewards_clips_too(home: Path, tmp_path: Path) -> None:
    (tmp_path / "away.py").write_text("def bright(frames, prompts):\n    return frames.mean((2, 3, 4))\n")
    away = job_of(home, path=f"{tmp_path}/away.py:bright", remote={"where": "process"})
    clips = clips_of(away)
    found, expected = (
        reward_clips(job, clips, [0, 3, 6]).rewards for job in (away, job_of(home, path=f"{home}/mine.py:bright"))
    )
    assert found == pytest.approx(expected, abs=1 / 255), "it sees 8-bit pixels"


@pytest.mark.parametrize("method", ["rwr", "instructvideo"])
def test_videos_are_encoded_and_decoded_and_one_that_cannot_be_read_is_left_out(home: Path, method: str) -> None:
    job = job_of(home, method, {"source": str(home / "in")})
    clips = real_clips(job.config.data.sources, clips_of(job))
    found = reward_clips(job, clips, range(3))
    assert [math.isnan(value) for value in found.rewards] == [False, True, False]
    assert "b.mp4" in (found.fault or "")


def test_a_text_encoder_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's has several times the weights of its autoencoder, and no reward reads embeddings."""
    monkeypatch.setattr("rlvid.models.wan_parts._embedder", lambda *parts: pytest.fail("a text encoder is loaded"))
    (tmp_path / "in").mkdir()
    write_mp4(tmp_path / "in" / "a.mp4", rendered_clip(0, 0, 9, 32)[1], 8)
    (tmp_path / "in" / "a.txt").write_text("a red circle")
    sections = {
        "name": "run", "model": {"path": "builtin-wan"}, "method": "grpo", "data": {"source": str(tmp_path / "in")},
        "reward": {"segments": 3, "ceiling": "q0.5"}, "train": {"group_size": 2, "batch_size": 2},
    }  # fmt: skip
    job = Job.of(parse_config(sections), run=tmp_path / "run", use_gpu=False, progress=None)
    found = reward_clips(job, real_clips(job.config.data.sources, clips_of(job)), [0])
    assert found.fault is None
    assert math.isfinite(found.rewards[0])
