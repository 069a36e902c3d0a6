"""Prompts that a fit's backbone cuts: which are alike to it, and on which side of the split they lie."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from rlvid.config.fit import BackboneConfig
from rlvid.fitting.prepare import held_out_prompts
from rlvid.fitting.texts import cut_prompts, held_out_of, text_limit
from rlvid.toy.tiny import save_tiny_clip

LIMIT = 24
FULL = " ".join(["star"] * (LIMIT - 2))
SHORT = [f"a dog {place}" for place in range(20)]


def cut(prompts: Iterable[str], config: BackboneConfig | None = None) -> dict[str, str]:
    config = config or BackboneConfig()
    limit = text_limit(config)
    assert limit is not None
    return cut_prompts(config, limit, prompts)


@pytest.mark.parametrize("name", ["builtin", "clip"])
def test_a_cut_prompt_stands_with_the_one_that_has_its_tokens(tmp_path: Path, name: str) -> None:
    config = BackboneConfig()
    if name == "clip":
        save_tiny_clip(tmp_path)
        config = BackboneConfig(name="clip", path=str(tmp_path))
    two = [f"dog {FULL} moon", f"dog {FULL} circle"]
    assert cut([*SHORT, FULL], config) == {}
    assert cut([FULL, f"{FULL} moon", *two, *SHORT], config) == {
        f"{FULL} moon": FULL, two[0]: two[1], two[1]: two[1],
    }  # fmt: skip
    limit = text_limit(config)
    assert limit is not None
    assert (limit.reader, limit.tokens) == (f"the backbone {name!r}", LIMIT)


def test_random_weights_of_a_published_model_have_no_limit() -> None:
    assert text_limit(BackboneConfig(name="hpsv2", path="random")) is None
    assert text_limit(BackboneConfig(path="random")) is not None


@pytest.mark.parametrize("seed", range(5))
def test_alike_prompts_lie_on_one_side_and_the_others_where_they_did(seed: int) -> None:
    longer = [f"{FULL} {word}" for word in ("moon", "dog", "circle", "red")]
    prompts = [*SHORT, *longer]
    whole, found = held_out_prompts(prompts, 0.4, seed), held_out_of(prompts, cut(prompts), 0.4, seed)
    assert len({prompt in found for prompt in longer}) == 1
    assert found & {*SHORT} == whole & {*SHORT}
    assert held_out_of(SHORT, cut(SHORT), 0.4, seed) == held_out_prompts(SHORT, 0.4, seed)
    few = [FULL, *longer, "a dog"]
    assert 0 < len(held_out_of(few, cut(few), 0.2, seed)) < len(few), "neither side is empty"
    with pytest.raises(ValueError, match="all 4 prompts have the same tokens"):
        held_out_of(longer, cut(longer), 0.2, seed)
