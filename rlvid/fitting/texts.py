"""The prompts of a fit, as far as its backbone reads them: which are cut, and how the pairs are divided."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from open_clip.tokenizer import SimpleTokenizer

from rlvid.config.fit import BackboneConfig
from rlvid.fitting.prepare import held_out_prompts
from rlvid.models.text_limit import TextLimit
from rlvid.reward.builtin import BUILTIN, builtin_folder
from rlvid.reward.clip import Tokenise, own_tokenizer, pad_with
from rlvid.reward.published import find_files
from rlvid.reward.text_limit import reward_text_limit


def text_limit(config: BackboneConfig) -> TextLimit | None:
    """Returns the limit of a backbone; None of a published one with random weights."""
    limit = reward_text_limit(config.name, config.path)
    return limit and replace(limit, reader=f"the backbone {config.name!r}")


def cut_prompts(config: BackboneConfig, limit: TextLimit, prompts: Iterable[str]) -> dict[str, str]:
    """Returns each prompt that is cut, and the one that stands for it: the first that has the same tokens then.

    A prompt that is read to its end goes before one that is cut.
    """
    different = sorted(set(prompts))
    counts = dict(zip(different, limit.count(different), strict=True))
    cut = [prompt for prompt in different if counts[prompt] > limit.tokens]
    if not cut:
        return {}
    named = [prompt for prompt in different if counts[prompt] == limit.tokens] + cut
    first = dict[tuple[int, ...], str]()
    keys = [tuple(row) for row in _tokeniser(config, limit.tokens)(named).tolist()]
    for key, prompt in zip(keys, named, strict=True):
        first.setdefault(key, prompt)
    return {prompt: first[key] for key, prompt in zip(keys, named, strict=True) if counts[prompt] > limit.tokens}


def held_out_of(prompts: Iterable[str], stand_ins: Mapping[str, str], share: float, seed: int) -> set[str]:
    """Returns the prompts whose pairs are not fitted on; those that the backbone cannot tell apart stay together.

    Args:
        prompts: of all pairs.
        stand_ins: of the prompts that are cut; the others lie where ``held_out_prompts`` has them.
        share: of the prompts.
        seed: of the split.

    Raises:
        ValueError: the backbone reads one prompt alone.
    """
    different = set(prompts)
    chosen = held_out_prompts(different, share, seed)
    found = {prompt for prompt in different if stand_ins.get(prompt, prompt) in chosen}
    if 0 < len(found) < len(different):
        return found
    others = {stand_ins.get(prompt, prompt) for prompt in different}
    if len(others) < 2:
        raise ValueError(
            f"all {len(different)} prompts have the same tokens up to the backbone's limit, and some are held out by "
            "prompt; ask about shorter prompts, or name a backbone that reads more"
        )
    chosen = held_out_prompts(others, share, seed)
    return {prompt for prompt in different if stand_ins.get(prompt, prompt) in chosen}


def _tokeniser(config: BackboneConfig, length: int) -> Tokenise:
    where = f"backbone.path = {config.path!r}"
    builtin = config.name in BUILTIN
    source = builtin_folder(config.name) if builtin else find_files(config.name, str(config.path), where)
    assert source is not None, "one with random weights has no limit"
    words = own_tokenizer(source, where)
    return SimpleTokenizer(context_length=length) if words is None else pad_with(words, length)
