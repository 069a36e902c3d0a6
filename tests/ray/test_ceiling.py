"""A run whose ceiling is a quantile of its clips' rewards: it keeps the number, and reads it when it resumes."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from runs import QUIET, config

from rlvid import randomness
from rlvid.data.shares import tensors
from rlvid.data.sources import training_set
from rlvid.models.unet3d import load_model
from rlvid.reward.load import load_reward
from rlvid.reward.video import plan_frames
from rlvid.runs.scalars import read_scalars
from rlvid.train import launch
from rlvid.train.job import Job
from rlvid.train.launch import train


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_keeps_the_quantile_of_its_clips_and_reads_it_when_it_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the driver gives to workers that resume; what a worker makes of it is in the unit tests."""
    settings = ("reward.ceiling=q0.5", "train.zero_stage=0", "train.workers=1", "output.archive_every=0")
    said = Console(file=io.StringIO(), width=200)
    run = config(folder, "capped", *settings, "train.steps=2")
    done = train(run, said)
    kept = json.loads((done.folder / "ceiling.json").read_text(encoding="utf-8"))

    model, reward, clips = (
        load_model(run.model.path, frames=4, size=16),
        load_reward("builtin"),
        training_set(run, QUIET),
    )
    captions, _, posterior = tensors(clips.rows(range(6)))
    draws = randomness.uniform((2,), run.seed, "segments", [(place,) for place in range(6)])
    plan = plan_frames(draws, 4, run.reward.attenuation, run.frame_weights)
    with torch.no_grad():
        frames = model.decode_frames(posterior.mean, plan.frames_BS)
        rewards = (plan.weights_BS * reward(frames, captions)).sum(1)
    expected = float(np.quantile(rewards.double().numpy(), 0.5))
    assert kept == {
        "ceiling": pytest.approx(expected, rel=1e-5), "quantile": 0.5, "clips": 6, "left_out": 0, "reward": "builtin",
    }  # fmt: skip
    at_ceiling = read_scalars(done.folder / "tensorboard", lambda tag: tag == "reward/at_ceiling")
    assert sorted(at_ceiling["reward/at_ceiling"]) == [0, 1], "the worker has a ceiling"
    line = f"ceiling {expected:.3g}: the 0.5 quantile of the rewards of 6 clips"
    assert said.file.getvalue().count(line) == 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"another config \(reward\.ceiling: q0\.5 -> q0\.9"):
        train(config(folder, "capped", *settings, "reward.ceiling=q0.9", "train.steps=3"), QUIET)

    kept["ceiling"] = -1e6  # no run computes this: one that resumes has read it
    (done.folder / "ceiling.json").write_text(json.dumps(kept), encoding="utf-8")
    said, jobs = Console(file=io.StringIO(), width=200), list[Job]()
    monkeypatch.setattr(launch, "_trainer", lambda job, *_, **__: jobs.append(job) or SimpleNamespace(fit=None))
    monkeypatch.setattr(launch, "run_fit", lambda *_: {"problem": "no workers"})
    with pytest.raises(RuntimeError, match="no workers"):
        train(config(folder, "capped", *settings, "train.steps=3"), said)
    assert [job.measured_ceiling for job in jobs] == [-1e6]
    assert "ceiling" not in said.file.getvalue()  # type: ignore[attr-defined]
    assert json.loads((done.folder / "ceiling.json").read_text(encoding="utf-8")) == kept
