"""The built-in rewards are folders of fitted rewards: one list of names, and one way to load them."""

import json
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from rlvid.config.fit import BackboneConfig, FitConfig, load_fit
from rlvid.config.reward import RewardConfig
from rlvid.config.reward_names import BuiltinReward, HeldOutReward
from rlvid.evaluate.clip import load_clip
from rlvid.fitting.backbone import begin, check_backbone, preprocess_for, scorer_of, spec_of
from rlvid.plan.parts import _clip_outline
from rlvid.reward.builtin import BUILTIN, builtin_folder
from rlvid.reward.clip import ClipReward
from rlvid.reward.fit.folder import FittedVideoReward, read_spec, save_fitted
from rlvid.reward.load import load_reward, scores_whole_videos
from rlvid.reward.text_limit import reward_text_limit
from rlvid.toy.pretrain.plan import JUDGES, REWARDS, RewardPlan

PROMPTS = ["a red circle moving left", "a dog"]


def frames(count: int = 4) -> torch.Tensor:
    return torch.rand((2, count, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def test_settings_and_folders_name_the_same_rewards() -> None:
    assert [*BUILTIN] == [*get_args(BuiltinReward), *get_args(HeldOutReward)]
    assert set(BUILTIN) <= {*get_args(BackboneConfig.model_fields["name"].annotation)}


@pytest.mark.parametrize("name", BUILTIN)
def test_a_built_in_reward_is_a_fitted_one_that_also_scores_from_its_folder(name: str) -> None:
    reward, fitted = load_reward(name), load_reward("fitted", path=str(builtin_folder(name)))
    torch.testing.assert_close(reward(frames(), PROMPTS), fitted(frames(), PROMPTS))
    if isinstance(reward, ClipReward):
        assert reward.chunk == 64
        assert not reward.recompute
    assert isinstance(reward, FittedVideoReward) == name.endswith("-video")
    with pytest.raises(ValueError, match="takes no path"):
        load_reward(name, path="mine")


@pytest.mark.parametrize("name", ["builtin", "builtin-heldout"])
def test_the_first_two_answer_the_plain_cosine(name: str) -> None:
    folder = builtin_folder(name)
    spec, weights = json.loads((folder / "reward.json").read_text()), load_file(folder / "model.safetensors")
    assert spec["base_deviation"] == [pytest.approx(math.exp(float(weights["logit_scale"])), rel=1e-6)]
    reward = load_reward(name)
    assert isinstance(reward, ClipReward)
    assert (reward.scale, reward.shift) == (pytest.approx(1, abs=1e-6), 0)


@pytest.mark.parametrize("plan", [*REWARDS, *JUDGES], ids=lambda plan: plan.name)
def test_a_shipped_reward_looks_at_as_many_frames_as_its_fit_reads(plan: RewardPlan) -> None:
    config = load_fit(["backbone.name=clip", "backbone.path=random", *plan.settings])
    found = read_spec(builtin_folder(f"builtin-{plan.name}"), "here").frames
    assert found == (config.frames if config.kind == "video" else None)


@pytest.mark.parametrize("name", ["builtin-video", "builtin-heldout-video"])
def test_a_shipped_reward_of_whole_videos_looks_at_eight_frames(name: str) -> None:
    reward = load_reward(name)
    assert isinstance(reward, FittedVideoReward)
    of_all = FittedVideoReward(reward.scorer, reward.text_features, reward.spec.model_copy(update={"frames": None}))
    assert torch.equal(reward(frames(8), PROMPTS), of_all(frames(8), PROMPTS))
    assert torch.equal(reward(frames(16), PROMPTS), of_all(frames(16)[:, 1::2], PROMPTS))
    wan = frames(9)[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    assert torch.equal(reward(frames(9), PROMPTS), of_all(wan, PROMPTS))


@pytest.fixture
def video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a built-in reward of whole videos, whose folder is a temporary one."""
    config = FitConfig(kind="video", head={"grid": 2, "width": 16, "heads": 2})
    made = begin(config)
    spec = spec_of(config, made, ["quality"], [0.0], [1.0])
    save_fitted(tmp_path, spec, scorer_of(config, made, 1), made.structure, made.tokenizer)
    monkeypatch.setitem(BUILTIN, "builtin-of-a-test", str(tmp_path))
    monkeypatch.setattr("rlvid.reward.load.NAMES", ("builtin-of-a-test",))
    return "builtin-of-a-test"


def test_a_name_and_a_folder_make_a_built_in_reward_of_whole_videos(video: str) -> None:
    reward = load_reward(video)
    assert isinstance(reward, FittedVideoReward)
    assert reward(frames(), PROMPTS).shape == (2,)
    config = RewardConfig().model_copy(update={"name": video})
    assert scores_whole_videos(config)
    assert not scores_whole_videos(RewardConfig())
    limit = reward_text_limit(video)
    assert limit is not None
    assert limit.tokens == 24
    assert _clip_outline(video, None).visual.output_dim == 64
    backbone = BackboneConfig().model_copy(update={"name": video})
    assert check_backbone(backbone) == []
    assert preprocess_for(backbone) == reward.spec.preprocess


def test_a_reward_of_whole_videos_is_no_clip_that_measures(video: str) -> None:
    with pytest.raises(ValueError, match=f"--clip '{video}' is a reward of whole videos") as error:
        load_clip(video)
    assert "\n" not in str(error.value)
