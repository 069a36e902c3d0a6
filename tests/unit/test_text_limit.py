"""Prompts that a text encoder or a reward does not read to their end are counted, with the limit."""

import json
from pathlib import Path

import pytest
import torch

from rlvid.config.reward import RewardConfig
from rlvid.models.folders import RANDOM
from rlvid.models.text_limit import TextLimit, model_text_limit, notices
from rlvid.models.unet3d import load_model
from rlvid.reward.text_limit import reward_text_limit, reward_text_limits
from rlvid.toy.tiny import save_tiny_clip, save_tiny_model
from rlvid.world.captions import PROMPT_SETS, prompt_set


def test_what_is_counted_as_cut_is_what_the_text_encoder_does_not_read(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    limit, model = model_text_limit(str(tmp_path)), load_model(str(tmp_path), frames=4, size=16)
    assert limit.tokens == 24
    fits, longer = " ".join(["star"] * 22), " ".join(["star"] * 22 + ["moon"])
    assert limit.count([fits, longer]) == [24, 25]
    assert torch.equal(model.encode_prompts([fits]), model.encode_prompts([longer]))
    (line,) = notices([limit], [longer, fits, "a", longer], "captions")
    assert line.startswith("1 of 3 different captions are longer than 24 tokens")
    assert "star star" in line
    assert notices([limit], [fits, "a"]) == []
    assert notices([limit], []) == []


def test_readers_that_cut_the_same_share_a_line() -> None:
    def letters(prompts: list[str]) -> list[int]:
        return [len(prompt) for prompt in prompts]

    limits = [TextLimit("A", 3, letters), TextLimit("B", 3, letters), TextLimit("C", 5, letters)]
    first, second = notices(limits, ["four", "sixsix", "two"])
    assert first.startswith("2 of 3 different prompts are longer than 3 tokens")
    assert "the limit of A, B;" in first
    assert second.startswith("1 of 3 different prompts are longer than 5 tokens")


def test_the_built_in_worlds_captions_are_read_to_their_end() -> None:
    for name in PROMPT_SETS:
        limits = [model_text_limit("builtin"), *reward_text_limits(RewardConfig(held_out="builtin-heldout"))]
        assert [limit.tokens for limit in limits] == [24, 24, 24]
        assert notices(limits, prompt_set(name, 20, 0)) == []


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_rewards_have_limits_of_their_own(tmp_path: Path, kind: str) -> None:
    assert model_text_limit(RANDOM).tokens == 77
    save_tiny_clip(tmp_path)
    if kind == "open_clip":
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": {"context_length": 24}}}))
        (tmp_path / "config.json").unlink()
    limit = reward_text_limit("clip", str(tmp_path))
    assert limit is not None
    assert (limit.tokens, limit.count([" ".join(["star"] * 30)])) == (24, [32])
    (tmp_path / "HPS_v2_compressed.pt").touch()
    limit = reward_text_limit("hpsv2", str(tmp_path / "HPS_v2_compressed.pt"))
    assert limit is not None
    assert (limit.tokens, limit.count(["star " * 80])) == (77, [82])
    (tmp_path / "ImageReward.pt").touch()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "star"]))
    limit = reward_text_limit("imagereward", str(tmp_path))
    assert limit is not None
    assert (limit.tokens, limit.count(["star " * 40])) == (35, [42])
    assert [reward_text_limit(*each) for each in (("oracle",), ("hpsv2", "random"), ("custom", "mine.py:f"))] == [
        None
    ] * 3
