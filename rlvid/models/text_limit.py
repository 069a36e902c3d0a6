"""The length of prompts that a text encoder reads; counts and reports longer prompts, which are cut."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlvid.models.folders import RANDOM, STRUCTURES, WAN, family, model_folder, read_config
from rlvid.models.text_rows import TEXT_LENGTH
from rlvid.models.weights import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READER = "the model's text encoder"


@dataclass(frozen=True)
class TextLimit:
    """The most tokens that a model reads of a prompt.

    Attributes:
        reader: the model, as a message names it.
        tokens: the most, with the tokens that mark begin and end.
        count: tokens of each prompt if it were not cut.
    """

    reader: str
    tokens: int
    count: Callable[[list[str]], list[int]]


def notices(limits: Sequence[TextLimit], prompts: Iterable[str], kind: str = "prompts") -> list[str]:
    """Returns lines on the prompts that are cut, each with an example; readers that cut the same ones share a line.

    Args:
        limits: of all that read the prompts.
        prompts: each counts once.
        kind: what the prompts are called.
    """
    different = list(dict.fromkeys(prompts))
    readers: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for limit in limits if different else ():
        counts = limit.count(different)
        cut = tuple(prompt for prompt, count in zip(different, counts, strict=True) if count > limit.tokens)
        if cut and limit.reader not in readers.setdefault((limit.tokens, cut), []):
            readers[limit.tokens, cut].append(limit.reader)
    return [
        f"{len(cut)} of {len(different)} different {kind} are longer than {tokens} tokens, and the rest of each has no "
        f"effect; this is the limit of {', '.join(names)}; for example {cut[0][:60]!r}"
        for (tokens, cut), names in readers.items()
    ]


def token_counts(tokenizer: "PreTrainedTokenizerBase", prompts: list[str]) -> list[int]:
    """Returns each prompt's number of tokens, with those that mark begin and end."""
    return [len(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"]]


def model_text_limit(path: str) -> TextLimit:
    """Returns the limit of a model's text encoder, from its tokenizer and configuration; no weights are read.

    Args:
        path: ``model.path``.

    Raises:
        ValueError: see ``model_folder``.
    """
    folder = model_folder(path)
    if family(path) is WAN:
        return _wan_limit(path, folder)
    if path == RANDOM:
        from rlvid.models.untrained import clip_tokenizer

        tokenizer = clip_tokenizer()
    else:
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    positions = read_config(folder, "text_encoder").get("max_position_embeddings", tokenizer.model_max_length)
    length = min(tokenizer.model_max_length, positions)
    return TextLimit(_READER, length, partial(token_counts, tokenizer))


def _wan_limit(path: str, folder: Path) -> TextLimit:
    if path in STRUCTURES:
        return TextLimit(_READER, TEXT_LENGTH, lambda prompts: [len(prompt.split()) + 1 for prompt in prompts])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return TextLimit(_READER, text_length(folder), partial(token_counts, tokenizer))


def text_length(folder: Path) -> int:
    """Returns L, the rows of a prompt's embedding of a Wan model, from its folder."""
    settings = read_json(folder / "tokenizer" / "tokenizer_config.json", "tokenizer")
    return min(int(settings.get("model_max_length", TEXT_LENGTH)), TEXT_LENGTH)
