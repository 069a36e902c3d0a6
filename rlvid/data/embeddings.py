"""Embeddings of a run's prompts, made before training and kept in its storage.

Wan's text encoder has 5.7 billion parameters. So workers do not load it, nor do encoders on the way: they read
embeddings, of the captions of encoded clips from the clips themselves, and of all other prompts from here.

    clips/texts-FINGERPRINT-DEVICE/COUNT-DIGEST/    what one start of a run embedded: a folder as of encoded clips

All runs with the same text encoder on the same kind of device share a folder, and embed what none of them has embedded.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import fs
from rich.console import Console
from torch import Tensor

from rlvid import __version__
from rlvid.cluster.nodes import check_resources
from rlvid.config import RunConfig
from rlvid.config.model import ModelConfig
from rlvid.data.checksums import hash_weights
from rlvid.data.clips import EncodedClips, digest
from rlvid.data.encode import EncodeReport, encode_clips
from rlvid.data.encoders import Item
from rlvid.data.kept import encoded_once, one_at_a_time
from rlvid.data.shares import column
from rlvid.data.training_set import TrainingSet
from rlvid.models.base import Posterior, VideoModel
from rlvid.models.folders import is_text_apart, model_folder
from rlvid.models.text_limit import text_length
from rlvid.models.text_rows import pad_rows
from rlvid.storage import Mirror, is_uri, locate, reaching, run_uri


class StoredEmbedder:
    """Embeds the prompts of which a folder holds embeddings; a ``rlvid.models.text_rows.TextEmbedder``.

    Args:
        place: folder or URI, see ``kept_embeddings``.
        length: L.
    """

    encoder = None

    def __init__(self, place: str, length: int) -> None:
        self.length, self._place, self._places = length, place, _embedded(place)

    def embed(self, prompts: list[str]) -> Tensor:
        """Returns text_BLD, float32 on the CPU.

        Raises:
            ValueError: the folder lacks one of the prompts.
        """
        missing = next((prompt for prompt in prompts if prompt not in self._places), None)
        if missing is not None:
            raise ValueError(f"{self._place} holds no embedding of the prompt {missing[:60]!r}; start the run again")
        places = [self._places[prompt] for prompt in prompts]
        found = pa.concat_tables([folder.rows([position], ("text", "text_shape")) for folder, position in places])
        return pad_rows(column(found, "text", "text_shape"), self.length)


def _embedded(place: str) -> dict[str, tuple[EncodedClips, int]]:
    """Returns where the embedding of each prompt lies: in which folder of a place, and at which position.

    Raises:
        ValueError: a folder is damaged, or the store cannot be reached.
    """
    store, root = locate(place, "")
    with reaching(place):
        there = store.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    found = dict[str, tuple[EncodedClips, int]]()
    for name in sorted(info.path.split("/")[-2] for info in there if info.base_name == "meta.json"):
        if name.endswith(".unfinished"):  # a moment later it has another name
            continue
        folder = EncodedClips.open(run_uri(place, name) if is_uri(place) else f"{place}/{name}")
        for position, prompt in enumerate(folder.captions()):
            found.setdefault(prompt, (folder, position))
    return found


def embedder_of(path: str, place: str | None) -> StoredEmbedder | bool:
    """Returns the embedder of a model's prompts where they are kept in a place; true for the model's own."""
    return True if place is None else StoredEmbedder(place, text_length(model_folder(path)))


def kept_embeddings(
    config: RunConfig, clips: TrainingSet, shown: Sequence[str], drawn: Callable[[], Sequence[str]], console: Console
) -> str | None:
    """Returns the folder, or the URI, with the embeddings that a run needs beside those of its encoded clips.

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
    """Embeds the prompts that are not embedded yet; returns the folder or URI of all, as ``kept_embeddings`` does."""
    model, train = config.model, config.train
    if not is_text_apart(model.path):
        return None
    use_gpu = check_resources(config) if train.use_gpu is None else train.use_gpu
    made_with = digest(_made_with(model) | {"rlvid": __version__})
    pool = f"texts-{made_with}-{'cuda' if use_gpu else 'cpu'}"  # the last bits differ from device to device
    mirror = Mirror(config.output.storage, f"clips/{pool}")
    with one_at_a_time(mirror.folder):
        embedded = _embedded(mirror.place)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in embedded]
        if missing:
            make = partial(encode_prompts, missing, model, workers=train.workers, use_gpu=use_gpu)
            encoded_once(config, f"{pool}/{len(missing)}-{digest(missing)}", make, console, "prompts embedded")
    return mirror.place


def _made_with(model: ModelConfig) -> dict[str, Any]:
    """Returns all properties of a model on which embeddings depend; its size and length are none of them."""
    weights = hash_weights(model.path, ("text_encoder", "tokenizer"))
    return {"weights": weights, "precision": model.precision, "length": text_length(model_folder(model.path))}


def encode_prompts(prompts: list[str], model: ModelConfig, out: str | Path, **how: Any) -> EncodeReport:
    """Keeps the embedding of each prompt; ``how`` as for ``rlvid.data.encode.encode_folder``."""
    items = [{"index": i, "source": f"prompt {i}", "caption": prompt} for i, prompt in enumerate(prompts)]
    source, by = {"texts": digest(prompts)}, _made_with(model)
    return encode_clips(items, read_prompt, source, [], model, Path(out), by=by, **how)


def read_prompt(item: Item, model: VideoModel) -> tuple[str, Posterior]:
    """Returns the caption of an item, and latents of no numbers: there is no clip."""
    nothing = torch.zeros(1, 0, 0, 0, 0)
    return item["caption"], Posterior(nothing, nothing)
