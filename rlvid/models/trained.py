"""The trained part of a denoiser: an adapter (``model.finetune: lora``) or all weights (``full``).

Trained weights are float32 whatever ``model.precision`` says. An adapter sits on frozen weights of that precision; a
whole denoiser computes in it under autocast, which casts each weight where it is used.

On disk, inside a checkpoint's folder: ``adapter/`` in PEFT's layout, or ``unet/`` or ``transformer/`` in
diffusers'.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlvid.config.model import ModelConfig
from rlvid.models.base import VideoModel
from rlvid.models.folders import UNET3D, WAN
from rlvid.models.levels import limit_levels
from rlvid.models.load import denoiser_outline, load_video_model
from rlvid.models.lora import check_lora, inject_lora, load_lora, lora_state, save_lora
from rlvid.models.text_rows import TextEmbedder
from rlvid.models.trained_files import WHOLE_FILES
from rlvid.models.unet3d import DTYPES
from rlvid.models.weights import check_finite, check_fit, headers, read_weights


def load_trainable(
    spec: ModelConfig,
    seed: int,
    path: str,
    device: str | torch.device = "cpu",
    *,
    negative_prompt: str = "",
    text: TextEmbedder | bool = True,
) -> VideoModel:
    """Loads a run's model for training, from ``path`` (``model.path``, made absolute where necessary).

    ``negative_prompt`` and ``text`` are those of ``rlvid.models.load.load_video_model``.

    Raises:
        ValueError: see ``rlvid.models.load.load_video_model`` and ``rlvid.models.lora.inject_lora``.
    """
    precision = spec.precision if spec.finetune == "lora" else "float32"
    exact = spec.model_copy(update={"path": path, "precision": precision})
    model = load_video_model(exact, negative_prompt=negative_prompt, text=text, device=device)
    if spec.finetune == "lora":
        inject_lora(model.denoiser, spec.lora.rank, spec.lora.targets, seed, spec.lora.scale)
        if spec.lora.levels is not None:
            limit_levels(model.denoiser, spec.lora.levels, model.path.train_steps)
        return model
    if spec.precision != "float32":
        model.cast_frozen(DTYPES[spec.precision])
    train_whole(model.denoiser, spec.precision, model.device.type)
    return model


def train_whole(denoiser: nn.Module, precision: str, device_type: str) -> None:
    """Makes all parameters trainable, and a float32 denoiser compute in ``precision``."""
    denoiser.requires_grad_(True)
    if precision != "float32":
        # Inside the module, for DeepSpeed switches an autocast around it off; no cache, for it would hold every weight
        # a second time, and each is used once.
        autocast = torch.autocast(device_type, DTYPES[precision], cache_enabled=False)
        denoiser.forward = autocast(denoiser.forward)
        for name, module in denoiser.named_modules():
            if name.endswith("time_embedder"):  # of Wan: 1000 s in half precision is some steps off
                module.forward = torch.autocast(device_type, enabled=False)(module.forward)


def trained_state(denoiser: nn.Module, spec: ModelConfig) -> dict[str, Tensor]:
    """Returns the trained weights on the CPU: the adapter under PEFT's names, or all weights under the module's."""
    if spec.finetune == "lora":
        return lora_state(denoiser)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in denoiser.state_dict().items()}


def save_trained(state: dict[str, Tensor], denoiser: nn.Module, spec: ModelConfig, folder: Path) -> None:
    """Writes ``trained_state`` into a checkpoint's folder."""
    if spec.finetune == "lora":
        save_lora(state, spec.lora.rank, spec.lora.targets, folder / "adapter", spec.lora.scale)
        return
    kept = next(each.denoiser for each in (UNET3D, WAN) if each.classes[each.denoiser][1] == type(denoiser).__name__)
    path = folder / WHOLE_FILES[kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})
    denoiser.save_config(path.parent)  # type: ignore[operator]  # a method of diffusers' models


def check_trained(spec: ModelConfig, folder: Path) -> None:
    """Checks that a checkpoint's trained weights exist and fit the model; reads no numbers.

    Raises:
        ValueError: as ``load_trained``, but for numbers that are not finite.
    """
    denoiser = denoiser_outline(spec.path)
    if spec.finetune == "lora":
        inject_lora(denoiser, spec.lora.rank, spec.lora.targets, seed=0)
        check_lora(denoiser, folder / "adapter")
    else:
        path = _whole_denoiser(folder)
        check_fit(denoiser.state_dict(), headers(path, str(folder)), str(path))


def _whole_denoiser(folder: Path) -> Path:
    path = next((folder / file for file in WHOLE_FILES.values() if (folder / file).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} holds no weights of a denoiser ({' or '.join(WHOLE_FILES.values())})")
    return path


def load_trained(denoiser: nn.Module, spec: ModelConfig, folder: Path) -> None:
    """Loads what ``save_trained`` wrote into a denoiser as ``load_trainable`` makes it.

    Raises:
        ValueError: it is missing, or of another layout; the first few names are given.
    """
    if spec.finetune == "lora":
        load_lora(denoiser, folder / "adapter")
    else:
        blend(denoiser, None, folder, 1.0)


@torch.no_grad()
def blend(denoiser: nn.Module, base: dict[str, Tensor] | None, folder: Path, scale: float) -> None:
    """Interpolates between the ``base`` (scale 0) and a checkpoint of full fine-tuning (scale 1), in place.

    Raises:
        ValueError: the checkpoint holds no whole denoiser, or one of another layout.
    """
    path = _whole_denoiser(folder)
    tuned, here = read_weights(path, str(folder)), denoiser.state_dict()
    check_fit(here, tuned, str(path))
    check_finite(tuned, str(path))
    for name, tensor in here.items():
        end = tuned[name].to(tensor)
        tensor.copy_(end if base is None else torch.lerp(base[name].to(tensor), end, scale))
