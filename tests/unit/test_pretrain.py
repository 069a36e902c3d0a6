"""The command that makes the weights, at a scale of seconds."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlvid.toy
from rlvid.diffusion.generate import generate
from rlvid.models.unet3d import load_model
from rlvid.reward.load import load_reward

WEIGHTS = Path(rlvid.toy.__file__).parent / "weights"


def pretrain(out: Path) -> str:
    command = [sys.executable, "-m", "rlvid.toy.pretrain", "--scale", "0.0005", "--device", "cpu", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_the_command_makes_every_part_that_is_not_there(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS / "reward", tmp_path / "reward")
    said = pretrain(tmp_path)
    assert "reward 200, contrastive 2/2" in said
    assert "reward 100, contrastive" not in said, "a stage whose folder is there was trained again"
    assert [said.count(f"denoiser, {frames} frames 2/2") for frames in (1, 3, 8)] == [1, 1, 2]
    assert "in_domain motion" in (tmp_path / "README.md").read_text()
    model = load_model(str(tmp_path / "model"), frames=8)
    frames = generate(model, ["a red circle moving left"], seed=0, steps=2)
    assert frames.shape == (1, 8, 3, 32, 32)
    assert frames.isfinite().all()
    rewards = [load_reward("fitted", path=str(tmp_path / name)) for name in ("reward", "heldout")]
    scores = [reward(frames, ["a red circle moving left"]) for reward in rewards]
    assert all(score.isfinite().all() for score in scores)
    assert not torch.equal(*scores), "two seeds gave one reward"
    assert (tmp_path / "reward" / "model.safetensors").read_bytes() == (
        WEIGHTS / "reward" / "model.safetensors"
    ).read_bytes()
