"""The feed of a run: made anew at each start of its workers, from the step at which they resume."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import ray.data

from rlvid import __version__
from rlvid.config import RunConfig
from rlvid.data.batches import Shares
from rlvid.data.clips import DamagedPart, digest
from rlvid.data.encoding import Encoding
from rlvid.data.feed import MAX_BYTES, NAME, InOrder, feed
from rlvid.data.order import clip_indices, mixed_indices
from rlvid.data.training_set import TrainingSet
from rlvid.storage import is_uri, locate, split_uri
from rlvid.train.record import RECORD, recorded_step

_ENCODED_BYTES = 512 * 2**20
"""Bytes of shares that may wait where videos are encoded: several, so that encoders work side by side."""


@dataclass(frozen=True)
class RunFeed:
    """Makes the feed of a run; Ray Train's controller calls it at each start of the workers.

    Attributes:
        config: of the run.
        clips: its training set.
        run: the run's folder.
        encoding: how videos are encoded on the way, if there are any.
    """

    config: RunConfig
    clips: TrainingSet
    run: Path
    encoding: Encoding | None = None

    @staticmethod
    def of(config: RunConfig, clips: TrainingSet, run: Path, texts: str | None = None) -> "RunFeed":
        """Makes the feed of a run in the driver, where its paths are those that the user wrote.

        ``texts`` is where embeddings of the captions of videos are kept, see ``rlvid.data.embeddings``.
        """
        return RunFeed(config, clips, run, _encoding(config, run, texts) if "videos" in clips.kinds else None)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The arguments of Ray Train's trainer that bring the clips to the workers."""
        return {"datasets": {NAME: self}, "dataset_config": InOrder(_ENCODED_BYTES if self.encoding else MAX_BYTES)}

    def __call__(self) -> ray.data.Dataset:
        """Makes the dataset of all steps that are left."""
        shares = feed(self.shares(self._first_step()))
        if self.encoding is None:
            return shares
        from rlvid.data.on_the_way import encoded  # PyAV, which other runs do not need

        return encoded(shares, self.encoding)

    def shares(self, first_step: int) -> Shares:
        """Returns the shares of all steps from one on."""
        train, clips, seed = self.config.train, self.clips, self.config.seed
        draws = np.arange(first_step * train.batch_size, train.steps * train.batch_size) // train.group_size
        if clips.weights is None:
            rows = clip_indices(draws, clips.count, seed)
        else:
            rows = mixed_indices(draws, clips.counts, clips.weights, seed)
        positions = rows.astype(np.min_scalar_type(clips.count)).reshape(-1, train.batch_size)
        return Shares(clips, train.workers, first_step, positions)

    def video_captions(self) -> list[str]:
        """Returns the captions of the videos that the run's steps draw, also those before a checkpoint.

        Of a damaged list it returns all captions that can be read, since the feed reads other rows in their place.
        """
        drawn, captions, start = np.unique(self.shares(0).positions_SB), list[str](), 0
        for source in self.clips.sources:
            mine = drawn[(drawn >= start) & (drawn < start + source.count)] - start
            start += source.count
            if source.kind == "videos" and len(mine):
                rows = source.open()
                try:
                    captions += rows.rows(mine.tolist(), ["caption"]).column("caption").to_pylist()
                except DamagedPart:
                    captions += rows.readable_captions()
        return captions

    def _first_step(self) -> int:
        """Returns the step of the checkpoint that Ray Train resumes from; 0 without one."""
        storage = self.config.output.storage
        store, root = locate(storage if is_uri(storage) else str(self.run.parent), self.run.name)
        return recorded_step(store, f"{root}/{RECORD}")


def _encoding(config: RunConfig, run: Path, texts: str | None) -> Encoding:
    from rlvid.data.encode import exact_model, model_fingerprint  # in the driver alone

    data, storage = config.data, config.output.storage
    made_with = [model_fingerprint(config.model), __version__]
    if texts is not None:  # clips hold embeddings too, perhaps of another device than the encoders'
        made_with.append(PurePosixPath(split_uri(texts)[1] if is_uri(texts) else texts).name)
    return Encoding(
        model=exact_model(config.model),
        encoders=data.encoders,
        gpus=data.encoder_gpus,
        processes=config.train.workers + data.encoders,
        storage=(storage if is_uri(storage) else str(run.parent)) if data.cache else None,
        kept_in=f"clips/cache-{digest(made_with)}",
        texts=texts,
    )
