"""Loads the model of a run with its trained weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlvid.config import RunConfig
from rlvid.models.base import VideoModel
from rlvid.models.load import check_model
from rlvid.models.lora import lora_scale
from rlvid.models.text_apart import embed_apart
from rlvid.models.text_rows import TextEmbedder
from rlvid.models.trained import blend, check_trained, load_trainable, load_trained
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


def load_run(run: str | Path, step: int | None = None, prompts: Sequence[str] | None = None) -> TunedModel:
    """Loads a run's model with its trained weights; see ``find_run``.

    With ``prompts``, the model embeds these alone, besides its negative prompt: a text encoder that is too large to
    stand beside the denoiser embeds them before the denoiser is loaded.

    Raises:
        ValueError: no such run, or no such checkpoint in it; or what it holds does not fit the model.
    """
    config, found = find_run(run, step)
    if prompts is None:
        return load_found(config, found)
    check_model(config.model.path)  # before minutes are spent on the text encoder
    check_trained(config.model, found.folder)
    return load_found(config, found, texts_of(config, prompts))


def texts_of(config: RunConfig, prompts: Sequence[str]) -> TextEmbedder | bool:
    """Embeds prompts and the run's negative prompt; see ``rlvid.models.text_apart.embed_apart``."""
    return embed_apart(config.model, [config.sampling.negative_prompt, *prompts], device=device())


def load_base(config: RunConfig, text: TextEmbedder | bool = True) -> VideoModel:
    """Loads the base model of a run's settings, as ``TunedModel.use(0)`` returns it; ``text`` as for ``load_found``.

    Raises:
        ValueError: the model cannot be loaded.
    """
    model = _untrained(config, text)
    lora_scale(model.denoiser, 0)
    return model


def load_found(config: RunConfig, found: CheckpointRef, text: TextEmbedder | bool = True) -> TunedModel:
    """Loads the model of a checkpoint that ``find_run`` found; ``text`` as for ``load_video_model``.

    Raises:
        ValueError: what the checkpoint holds does not fit the model.
    """
    model, base = _untrained(config, text), None
    if config.model.finetune == "full":
        base = {name: tensor.cpu().clone() for name, tensor in model.denoiser.state_dict().items()}
    load_trained(model.denoiser, config.model, found.folder)
    return TunedModel(config, found, model, base)


def _untrained(config: RunConfig, text: TextEmbedder | bool) -> VideoModel:
    return load_trainable(
        config.model, config.seed, config.model.path, device(),
        negative_prompt=config.sampling.negative_prompt, text=text,
    )  # fmt: skip


def device() -> torch.device:
    """Returns the device for evaluation: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scale_name(method: str, scale: float) -> str:
    """Returns the name of a model at a scale of the learned change, for tables."""
    return method if scale == 1 else f"{method} × {scale:g}"
