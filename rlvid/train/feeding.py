"""The feed of a run: made anew at each start of its workers, from the step at which they resume."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from rlvid.config import RunConfig
from rlvid.data.batches import Shares
from rlvid.data.clips import EncodedClips
from rlvid.data.feed import NAME, InOrder, feed
from rlvid.data.order import clip_indices
from rlvid.storage import is_uri, locate
from rlvid.train.record import RECORD, recorded_step


@dataclass(frozen=True)
class RunFeed:
    """Makes the feed of a run; Ray Train's controller calls it at each start of the workers.

    Attributes:
        config: of the run.
        clips: folder of its encoded clips, or its URI.
        fingerprint: of the clips.
        count: number of clips.
        run: the run's folder.
    """

    config: RunConfig
    clips: str
    fingerprint: str
    count: int
    run: Path

    @staticmethod
    def of(config: RunConfig, clips: str | Path, run: Path) -> "RunFeed":
        """Makes the feed of a run on a folder of clips."""
        opened = EncodedClips.open(clips)
        return RunFeed(config, opened.place, opened.meta["fingerprint"], len(opened), run)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The arguments of Ray Train's trainer that bring the clips to the workers."""
        return {"datasets": {NAME: self}, "dataset_config": InOrder()}

    def __call__(self) -> ray.data.Dataset:
        """Makes the dataset of all steps that are left."""
        return feed(self.shares(self._first_step()))

    def shares(self, first_step: int) -> Shares:
        """Returns the shares of all steps from one on."""
        train = self.config.train
        serials = np.arange(first_step * train.batch_size, train.steps * train.batch_size)
        clips = clip_indices(serials // train.group_size, self.count, self.config.seed)
        positions = clips.astype(np.min_scalar_type(self.count)).reshape(-1, train.batch_size)
        return Shares(self.clips, self.fingerprint, train.workers, first_step, positions)

    def _first_step(self) -> int:
        """Returns the step of the checkpoint that Ray Train resumes from; 0 without one."""
        storage = self.config.output.storage
        store, root = locate(storage if is_uri(storage) else str(self.run.parent), self.run.name)
        return recorded_step(store, f"{root}/{RECORD}")
