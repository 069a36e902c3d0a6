"""Loads the model of a run with its trained weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlvid.config import RunConfig
from rlvid.models.base import VideoModel
from rlvid.models.lora import lora_scale
from rlvid.models.trained import blend, load_trainable, load_trained
from rlvid.runs.checkpoints import CheckpointRef
from rlvid.runs.find import find_run


@dataclass
class TunedModel:
    """A run's model that can be the base and the tuned model in turn.

    ``base`` holds the denoiser's first weights, on the CPU, where all of them were trained.
    """

    config: RunConfig
    checkpoint: CheckpointRef
    model: VideoModel
    base: dict[str, Tensor] | None = None

    def use(self, scale: float) -> VideoModel:
        """Returns the model at a scale of the learned change: 0 is the base, 1 the fine-tuned model."""
        if self.base is None:
            lora_scale(self.model.denoiser, scale)
        else:
            blend(self.model.denoiser, self.base, self.checkpoint.folder, scale)
        return self.model


def load_run(run: str | Path, step: int | None = None) -> TunedModel:
    """Loads a run's model with its trained weights; see ``find_run``.

    Raises:
        ValueError: no such run, or no such checkpoint in it; or what it holds does not fit the model.
    """
    return load_found(*find_run(run, step))


def load_found(config: RunConfig, found: CheckpointRef) -> TunedModel:
    """Loads the model of a checkpoint that ``find_run`` found.

    Raises:
        ValueError: what the checkpoint holds does not fit the model.
    """
    model = load_trainable(
        config.model, config.seed, config.model.path, device(), negative_prompt=config.sampling.negative_prompt
    )
    base = None
    if config.model.finetune == "full":
        base = {name: tensor.cpu().clone() for name, tensor in model.denoiser.state_dict().items()}
    load_trained(model.denoiser, config.model, found.folder)
    return TunedModel(config, found, model, base)


def device() -> torch.device:
    """Returns the device for evaluation: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scale_name(method: str, scale: float) -> str:
    """Returns the name of a model at a scale of the learned change, for tables."""
    return method if scale == 1 else f"{method} × {scale:g}"
