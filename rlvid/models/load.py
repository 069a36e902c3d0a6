"""Loads a text-to-video model of either family, or describes it without weights, by the settings of a run.

The family follows from the folder of ``model.path``; see ``rlvid.models.folders.family``. Modules of the other family
are not imported.
"""

import torch
from diffusers import DDIMScheduler, UNet3DConditionModel
from torch import nn

from rlvid.config.model import ModelConfig
from rlvid.models.base import VideoModel
from rlvid.models.flow_shift import stored_shift
from rlvid.models.folders import WAN, family, read_config, structure_folder
from rlvid.models.noise_path import NoisePath, RectifiedFlow, VariancePreserving
from rlvid.models.part_settings import build
from rlvid.models.text_rows import TextEmbedder


def load_video_model(
    spec: ModelConfig,
    *,
    negative_prompt: str = "",
    text: TextEmbedder | bool = True,
    denoiser: bool = True,
    device: str | torch.device = "cpu",
) -> VideoModel:
    """Loads the model of ``spec``.

    Args:
        spec: path, shape, precision; ``finetune`` and ``lora`` are not used.
        negative_prompt: the prompt of the unconditional branch.
        text: embeds prompts in place of a Wan model's own encoder, which false leaves out.
        denoiser: whether a Wan model's transformer is needed; without it, it stays on the meta device.
        device: of the weights.

    Raises:
        ValueError: see ``rlvid.models.unet3d.load_unet3d`` and ``rlvid.models.wan_parts.load_wan``.
    """
    if family(spec.path) is WAN:
        from rlvid.models.wan_parts import load_wan

        return load_wan(spec, text=text, denoiser=denoiser, negative_prompt=negative_prompt, device=device)
    from rlvid.models.unet3d import load_unet3d

    return load_unet3d(spec, negative_prompt=negative_prompt, device=device)


def check_model(path: str) -> None:
    """Checks that the weights of ``model.path`` are all there and fit its structure; reads no numbers.

    Raises:
        ValueError: as ``model_folder``; or weights are missing, damaged, of another structure, or no weights.
    """
    if family(path) is WAN:
        from rlvid.models.wan_parts import check_wan

        return check_wan(path)
    from rlvid.models.stored import check_unet3d

    return check_unet3d(path)


def denoiser_outline(path: str) -> nn.Module:
    """Returns the denoiser without weights, on the meta device: its layers and shapes, in a second or two at full size.

    Raises:
        ValueError: as ``structure_folder``.
    """
    folder, of = structure_folder(path), family(path)
    if of is WAN:
        from rlvid.models.wan_parts import outline

        return outline(folder)[0]
    settings = read_config(folder, of.denoiser)
    network: nn.Module = build(UNet3DConditionModel.from_config, settings, folder / of.denoiser / "config.json")
    return network


def path_outline(spec: ModelConfig) -> NoisePath:
    """Returns the noise path of a model, from its configurations; reads no weights.

    Raises:
        ValueError: as ``structure_folder`` and ``stored_shift``.
    """
    shift = resolved_shift(spec)
    if shift is not None:
        return RectifiedFlow(shift)
    return VariancePreserving(DDIMScheduler.from_pretrained(structure_folder(spec.path) / "scheduler").alphas_cumprod)


def resolved_shift(spec: ModelConfig) -> float | None:
    """Returns the shift of a flow model's noise levels, the run's or else its scheduler's; None for a 3D U-Net.

    Raises:
        ValueError: as ``structure_folder`` and ``stored_shift``.
    """
    folder = structure_folder(spec.path)
    return (spec.shift or stored_shift(folder)) if family(spec.path) is WAN else None
