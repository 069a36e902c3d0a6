"""Embeddings of a run's prompts, made before training and kept in its storage.

Wan's text encoder has 5.7 billion parameters. So workers do not load it, nor do encoders on the way: they read
embeddings, of the captions of encoded clips from the clips themselves, and of all other prompts from here.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from rlvid.config import RunConfig
from rlvid.config.model import ModelConfig
from rlvid.data.clips import EncodedClips, digest
from rlvid.data.encode import EncodeReport, encode_clips, model_fingerprint
from rlvid.data.encoders import Item
from rlvid.data.kept import encoded_once
from rlvid.data.shares import column
from rlvid.data.training_set import TrainingSet
from rlvid.models.base import Posterior, VideoModel
from rlvid.models.folders import is_text_apart, model_folder
from rlvid.models.text_limit import text_length
from rlvid.models.text_rows import pad_rows


class StoredEmbedder:
    """Embeds the prompts of which a folder holds embeddings; a ``rlvid.models.text_rows.TextEmbedder``.

    Args:
        place: folder or URI, see ``kept_embeddings``.
        length: L.
    """

    encoder = None

    def __init__(self, place: str, length: int) -> None:
        self.length, self._rows = length, EncodedClips.open(place)
        self._places = {prompt: place for place, prompt in enumerate(self._rows.captions())}

    def embed(self, prompts: list[str]) -> Tensor:
        """Returns text_BLD, float32 on the CPU.

        Raises:
            ValueError: the folder lacks one of the prompts.
        """
        missing = next((prompt for prompt in prompts if prompt not in self._places), None)
        if missing is not None:
            raise ValueError(
                f"{self._rows.place} holds no embedding of the prompt {missing[:60]!r}; start the run again"
            )
        found = self._rows.rows([self._places[prompt] for prompt in prompts], ("text", "text_shape"))
        return pad_rows(column(found, "text", "text_shape"), self.length)


def embedder_of(path: str, place: str | None) -> StoredEmbedder | bool:
    """Returns the embedder of a model's prompts where they are kept in a place; true for the model's own."""
    return True if place is None else StoredEmbedder(place, text_length(model_folder(path)))


def kept_embeddings(
    config: RunConfig, clips: TrainingSet, shown: Sequence[str], drawn: Callable[[], Sequence[str]], console: Console
) -> str | None:
    """Returns the folder, or the URI, of the embeddings that a run needs beside those of its encoded clips.

    Args:
        config: the run's.
        clips: its training set; where it has prompts alone, all of them are embedded.
        shown: prompts of videos that workers and the guard sample on the way.
        drawn: returns the captions of the videos that the run encodes on the way.
        console: prints what was embedded.

    Returns:
        None where workers load the text encoder, or draw embeddings: for 3D U-Nets, the small built-in Wan model, and
        random weights.

    Raises:
        ValueError: they cannot be written.
    """
    if not is_text_apart(config.model.path):
        return None
    captions: Iterable[str] = ()
    if "prompts" in clips.kinds:
        captions = clips.captions()
    elif "videos" in clips.kinds:
        captions = drawn()
    return kept_texts(config, [config.sampling.negative_prompt, *shown, *captions], console)


def kept_texts(config: RunConfig, prompts: Sequence[str], console: Console) -> str | None:
    """Embeds prompts once, and returns the folder or URI in the run's storage, as ``kept_embeddings`` does."""
    model, different = config.model, list(dict.fromkeys(prompts))
    if not is_text_apart(model.path):
        return None
    name = f"texts-{len(different)}-{digest([different, model_fingerprint(model)])[:8]}"
    make = partial(encode_prompts, different, model, workers=config.train.workers, use_gpu=config.train.use_gpu)
    return encoded_once(config, name, make, console, "prompts embedded")


def encode_prompts(prompts: list[str], model: ModelConfig, out: str | Path, **how: Any) -> EncodeReport:
    """Keeps the embedding of each prompt; ``how`` as for ``rlvid.data.encode.encode_folder``."""
    items = [{"index": i, "source": f"prompt {i}", "caption": prompt} for i, prompt in enumerate(prompts)]
    return encode_clips(items, read_prompt, {"texts": digest(prompts)}, [], model, Path(out), **how)


def read_prompt(item: Item, model: VideoModel) -> tuple[str, Posterior]:
    """Returns the caption of an item, and latents of no numbers: there is no clip."""
    nothing = torch.zeros(1, 0, 0, 0, 0)
    return item["caption"], Posterior(nothing, nothing)
