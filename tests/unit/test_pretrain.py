"""The command that makes the weights: its trained stages at a scale of seconds, and the commands of its rewards."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlvid.config import load_config
from rlvid.config.fit import load_fit
from rlvid.diffusion.generate import generate
from rlvid.files import sha256
from rlvid.fitting.backbone import begin
from rlvid.fitting.votes import counts_of
from rlvid.models.unet3d import load_model
from rlvid.reward.builtin import BUILTIN
from rlvid.reward.fit.seal import check_seal
from rlvid.toy.pretrain.plan import JUDGES, MEAN, REWARDS, TUNINGS
from rlvid.toy.pretrain.rewards import Maker, accuracy_of_reward
from rlvid.world.pairs import NEW

TINY, CPU = 0.0005, torch.device("cpu")


def pretrain(out: Path, stage: str) -> str:
    command = [sys.executable, "-m", "rlvid.toy.pretrain", "--scale", str(TINY), "--device", "cpu", "--out", out]
    done = subprocess.run([*command, "--stage", stage], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_the_command_makes_every_part_that_is_not_there(tmp_path: Path) -> None:
    assert "autoencoder 2/2" in pretrain(tmp_path, "autoencoder")
    said = pretrain(tmp_path, "denoiser")
    assert [said.count(f"denoiser, {frames} frames 2/2") for frames in (1, 3, 8)] == [1, 1, 2]
    model = load_model(str(tmp_path / "model"), frames=8)
    frames = generate(model, ["a red circle moving left"], seed=0, steps=2)
    assert frames.shape == (1, 8, 3, 32, 32)
    assert frames.isfinite().all()
    assert "denoiser, 1 frames" not in pretrain(tmp_path, "denoiser"), "a stage that is there was trained again"


class Recorder:
    """Notes commands, and makes what they would make; the command of number ``fails`` fails."""

    def __init__(self, fails: int | None = None) -> None:
        self.commands: list[list[str]] = []
        self.fails = fails

    def __call__(self, command: Sequence[str]) -> None:
        if len(self.commands) == self.fails:
            raise subprocess.CalledProcessError(1, list(command))
        self.commands.append(list(command))
        if command[0] == "rlvid.fitting.votes":
            Path(command[1]).touch()
        elif command[1] == "reward":
            folder = Path(command[command.index("--out") + 1])
            folder.mkdir()
            (folder / "reward.json").write_text(json.dumps({"axes": [str(folder)]}))
            (folder / "README.md").write_text(str(folder))
            save_file({"logit_scale": torch.tensor(1 / 3), "proj": torch.ones(2) / 3}, folder / "model.safetensors")
            share = {"share": 0.9, "low": 0.8, "high": 1.0, "pairs": 20}
            kinds = {"time": share | {"share": 0.7}, "structure": share | {"pairs": 19}}
            axes = {"quality": {"held_out": {"accuracy": share, "kinds": kinds}}}
            report = {"pairs": 9, "axes": axes, "base": {}, "settings": {"backbone": {"path": str(folder)}}}
            (folder / "report.json").write_text(json.dumps(report))


def test_rewards_are_made_by_commands_in_rounds_and_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    first, second, third = Recorder(fails=9), Recorder(), Recorder()
    with pytest.raises(subprocess.CalledProcessError):
        Maker(out, work, 0, TINY, CPU, first).make_rewards(2)
    assert not out.exists()
    clip = work / "clip-a" / "model.safetensors"
    stamp = clip.stat().st_mtime_ns
    maker = Maker(out, work, 0, TINY, CPU, second)
    maker.make_rewards(2)
    assert clip.stat().st_mtime_ns == stamp
    assert not (work / "clip-b").exists()
    maker.make_judges()
    planned = [list(step.command) for each in (*maker.rounds(2), maker.judging()) for step in maker.steps(each)]
    assert first.commands + second.commands == planned
    for plan, folder in [*((each, "round-2") for each in REWARDS), *((each, "judges") for each in JUDGES)]:
        made = json.loads((out / plan.name / "reward.json").read_text())
        assert made["axes"] == [str(work / folder / plan.name)]
        check_seal(out / plan.name, "a rounded copy has a seal of its own")
        assert made["sha256"]["model.safetensors"] == sha256(out / plan.name / "model.safetensors")
        assert sorted(each.name for each in (out / plan.name).iterdir()) == [
            "model.safetensors", "report.json", "reward.json"
        ]  # fmt: skip
        assert str(tmp_path) not in (out / plan.name / "report.json").read_text()
        weights = load_file(out / plan.name / "model.safetensors")
        assert torch.equal(weights["proj"], (torch.ones(2) / 3).half())
        assert torch.equal(weights["logit_scale"], torch.tensor(1 / 3)), "half precision would move all scores"
    found = accuracy_of_reward(out / "video")
    assert found == {"agrees with votes, quality": 0.9, "agrees with votes, time": 0.7}
    again = Maker(out, work, 0, TINY, CPU, third)
    again.make_rewards(2)
    again.make_judges()
    assert third.commands == []
    for other, what in ((Maker(tmp_path / "o", work, 0, 2 * TINY, CPU, third), "scale"), (again, "rounds")):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(work))}: was made with another {what}; delete it"):
            Maker(tmp_path / "o", work, 0, other.scale, CPU, third).make_rewards(2 if what == "scale" else 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[Maker.__module__], "PLAN_DIGEST", "0" * 16)
        with pytest.raises(ValueError, match="was made with another plan; delete it"):
            Maker(tmp_path / "o", work, 0, TINY, CPU, third).make_rewards(2)
    check_begins(work / "clip-b")


def check_begins(clip: Path) -> None:
    """A fit begins with what the contrastive stage wrote."""
    made = begin(load_fit(["backbone.name=clip", f"backbone.path={clip}"]))
    assert made.tokenizer is not None
    assert made.clip.visual.image_size == (32, 32)
    assert made.structure["vision_cfg"]["layers"] == 5


def after(option: str, words: Sequence[str]) -> list[str]:
    """Returns the values of an option."""
    rest = words[words.index(option) + 1 :] if option in words else ()
    return list(takewhile(lambda word: not word.startswith("--"), rest))


@pytest.mark.parametrize("scale", [1.0, TINY])
def test_the_commands_of_a_round_have_settings_that_are_known_and_files_that_earlier_ones_made(
    tmp_path: Path, scale: float
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    made = {*(work / name for name in ("clip-a", "clip-b", "clip-c")), *(out / plan.name for plan in REWARDS)}
    maker = Maker(out, work, 3, scale, CPU)
    kinds = []
    for step in (step for each in (*maker.rounds(3), maker.judging()) for step in maker.steps(each)):
        words = step.command
        if words[0] == "rlvid.fitting.votes":
            kinds.append("votes")
            assert counts_of(after("--rendered", words))[NEW] == 0
            assert {Path(f"{run.partition('*')[0]}.trained") for run in after("--runs", words)} <= made
            assert set(after("--model", words)) <= {str(out / "model")}
            assert set(map(Path, after("--add", words))) <= made
        elif words[1] == "reward":
            kinds.append("fit")
            config = load_fit([word for word in words[6:] if "=" in word])
            assert Path(str(config.backbone.path)) in made
            assert Path(words[3]) in made
            assert (config.mean, words[4]) == (MEAN, "--out")
        else:
            kinds.append("train")
            run = load_config(words[2], list(words[3:]))
            assert Path(str(run.reward.path)) in made
            assert run.model.path == str(out / "model")
        assert step.makes not in made
        made.add(step.makes)
    assert kinds.count("train") == 3 * len(TUNINGS)
    assert kinds.count("fit") == 3 * len(REWARDS) + len(JUDGES)
    made_by_name = {plan.name for plan in (*REWARDS, *JUDGES)}
    assert set(BUILTIN.values()) - made_by_name == {"reward", "heldout"}, "these were made otherwise"
