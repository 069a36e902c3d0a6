"""The job of a training worker: the values that the driver sends to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvid.config import RunConfig
from rlvid.config.reward import RewardConfig
from rlvid.models.folders import movable
from rlvid.storage import is_uri


@dataclass(frozen=True)
class Job:
    """The values that each worker of a run gets. Paths are absolute: Ray Train's workers run in another folder."""

    config: RunConfig
    model: str
    """Path of the model."""
    reward: RewardConfig
    """The run's reward, with absolute paths."""
    run: Path
    """The run's folder."""
    use_gpu: bool
    progress: Any
    """The actor ``rlvid.train.progress.ProgressActor``."""
    archivist: Any = None
    """The actor ``rlvid.train.archivist.Archivist``; None if the run archives nothing."""
    prompts: tuple[str, ...] = ()
    """Prompts of the videos for TensorBoard."""
    encodes: bool = False
    """Whether videos are encoded on the way."""
    stop: bool = False
    """Whether the guard ended the run before."""
    measured_ceiling: float | None = None
    """The reward that ``reward.ceiling`` stands for where it is a quantile."""
    texts: str | None = None
    """Where embeddings of prompts are kept, if workers load no text encoder."""
    watched: bool = False
    """Whether Ray Train announces that a node is about to be taken away."""

    @classmethod
    def of(cls, config: RunConfig, **further: Any) -> "Job":
        """Makes the job of a run, with the model and the reward of its settings; ``further``: the other fields."""
        return cls(config, movable(config.model.path), config.reward.resolved(), **further)

    @property
    def storage(self) -> str | None:
        """URI of the object store that the run is kept in, if it is kept in one."""
        return self.config.output.storage if is_uri(self.config.output.storage) else None
