"""The settings of encoding on the way; the feed's processes load them, and no models."""

from dataclasses import dataclass

from rlvid.config.model import ModelConfig


@dataclass(frozen=True)
class Encoding:
    """The settings of encoding on the way.

    Attributes:
        model: encodes, with an absolute path, its length, height and width.
        encoders: number of actors.
        gpus: part of a GPU that each takes; 0 encodes on the CPU.
        processes: encoders and workers, which share the cores of a machine.
        storage: folder or URI where encoded clips are kept; None keeps none.
        kept_in: the folder in it, of this model and of these ``texts``; one for each kind of device.
        texts: folder or URI of the captions' embeddings; None embeds them with the model's own text encoder.
    """

    model: ModelConfig
    encoders: int
    gpus: float
    processes: int
    storage: str | None
    kept_in: str
    texts: str | None = None
