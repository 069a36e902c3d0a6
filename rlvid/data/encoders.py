"""Encodes batches of clips: the posterior of a video's latents, and the embedding of its caption; no Ray.

Every clip goes through the model by itself, so that the result depends neither on the batch nor on the number of
workers.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import torch
from torch import Tensor

from rlvid.collection import collection_paused
from rlvid.config.model import ModelConfig
from rlvid.data.clips import ROWS
from rlvid.data.row_files import keep_rows
from rlvid.data.videos import VideoError, read_video
from rlvid.models.base import Posterior, VideoModel
from rlvid.models.text_rows import TextEmbedder, cut_rows

Item = dict[str, Any]  # index, source (the path of a video, or a name), caption
Embedder = Callable[[], TextEmbedder | bool]
Reader = Callable[[Item, VideoModel], tuple[str, Tensor | Posterior]]  # caption, and pixels or latents


def read_item(item: Item, model: VideoModel) -> tuple[str, Tensor]:
    """Returns caption and frames_FCHW of a video file, as the model needs them."""
    sides = (model.height, model.width)
    return item["caption"], read_video(item["source"], frames=model.frames, size=sides, fps=model.fps)


def encode_items(model: VideoModel, items: list[Item], read: Reader = read_item, threads: int = 1) -> pa.Table:
    """Encodes a batch, as an actor does, without Ray.

    Args:
        model: encodes frames and prompts.
        items: rows with ``index``, ``source`` and ``caption``.
        read: gives caption and frames_FCHW of an item, or the posterior of its latents (1, C, F, h, w); or raises
            ``VideoError``.
        threads: that read videos side by side.

    Returns:
        A table of schema ``ROWS``, one row an item, in their order; a clip that cannot be read has an ``error``.
    """

    def attempt(item: Item) -> tuple[str, Tensor | Posterior] | VideoError:
        try:
            return read(item, model)
        except VideoError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(attempt, items))
    rows = []
    for item, clip in zip(items, found, strict=True):
        row = {name: item[name] for name in ("index", "source", "caption")}
        if isinstance(clip, VideoError):
            rows.append({**row, "error": str(clip)})
            continue
        caption, seen = clip
        posterior = seen if isinstance(seen, Posterior) else model.encode_frames(seen[None])
        text_LD = model.encode_prompts([caption])[0]
        text_LD = text_LD if model.text_length is None else cut_rows(text_LD)
        rows.append(
            row
            | {"caption": caption, "latent_shape": list(posterior.mean[0].shape), "text_shape": list(text_LD.shape)}
            | {"mean": _bytes(posterior.mean), "std": _bytes(posterior.std), "text": _bytes(text_LD)}
        )
    return pa.Table.from_pylist(rows, ROWS)


class ClipEncoder:
    """The Ray actor: loads the model once, then encodes batch after batch.

    Args:
        config: of the model.
        read: see ``encode_items``.
        device: where the model runs.
        workers: actors in all; those of one machine share its cores.
        denoiser: whether ``read`` needs the model's denoiser, by far its largest part.
        work: folder of an encoding, in which the actor keeps its rows; without one it returns them.
        texts: makes what embeds prompts; without it the model's own text encoder does.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Reader,
        device: str,
        workers: int,
        denoiser: bool = False,
        work: Path | None = None,
        texts: Embedder | None = None,
    ) -> None:
        with collection_paused():
            from rlvid.models.load import load_video_model  # in the actors alone: it takes seconds

        self._read, self._work, self._by = read, work, f"-{uuid4().hex[:8]}"
        threads = max(1, min(8, (os.cpu_count() or 1) // workers))
        torch.set_num_threads(threads)  # Ray says 1 to actors that reserve less than a core
        self._readers = 1 if denoiser else threads
        text = True if texts is None else texts()
        self._model = load_video_model(config, text=text, denoiser=denoiser, device=device)
        if not denoiser:
            self._model.denoiser = torch.nn.Identity()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encodes a batch of items; returns rows of schema ``ROWS``, or what ``keep_rows`` returns."""
        rows = encode_items(self._model, batch.to_pylist(), self._read, self._readers)
        if self._work is None:
            return rows
        try:
            return keep_rows(self._work, rows, self._by)
        except OSError:  # the process that gathers the rows tries too, and says why it cannot
            return rows

    def blank(self, caption: str) -> pa.Table:
        """Returns a row of schema ``ROWS`` that stands where a video cannot be read: latents of zeros."""
        zeros = torch.zeros(1, *self._model.latent_shape)
        item = {"index": 0, "source": "", "caption": caption}
        return encode_items(self._model, [item], lambda item, model: (caption, Posterior(zeros, zeros)))


def _bytes(values: Tensor) -> bytes:
    return values.float().cpu().contiguous().numpy().astype("<f4").tobytes()
