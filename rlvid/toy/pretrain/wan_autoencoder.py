"""The causal autoencoder of the model of Wan's classes: diffusers' ``AutoencoderKLWan``.

It has Wan2.1's structure in small: 9 frames of 32 x 32 become 3 latent frames of 8 x 8 with 8 channels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from rlvid import randomness
from rlvid.toy.pretrain.common import draw_footage, fit

FRAMES, SIZE = 9, 32
QUALITY = {"washed-out": 0.3, "blurred": 0.2}
"""Shares of degraded clips that autoencoder and transformer learn from: the room for reward fine-tuning."""

STATISTICS = 16
"""Batches of 16 clips from which mean and standard deviation of the latents are taken."""


@dataclass(frozen=True)
class AutoencoderPhase:
    """So many steps on batches of windows of ``frames`` frames, out of clips of 9."""

    frames: int
    batch: int
    steps: int
    peak: float
    """Learning rate after warm-up."""
    decoder: bool = False
    """Whether the decoder is trained alone, on latents with a trace of noise."""


def autoencoder_phases(steps: Callable[[int], int]) -> list[AutoencoderPhase]:
    """Returns the plan: images, then short windows, then whole clips; most is learned where the work is least.

    Whole clips come twice, for a learning rate that rises again.
    """
    return [
        AutoencoderPhase(frames=1, batch=8, steps=steps(2400), peak=1.5e-3),
        AutoencoderPhase(frames=5, batch=4, steps=steps(1500), peak=1.2e-3),
        AutoencoderPhase(frames=9, batch=4, steps=steps(900), peak=1e-3),
        AutoencoderPhase(frames=9, batch=4, steps=steps(2400), peak=1e-3),
        AutoencoderPhase(frames=9, batch=4, steps=steps(300), peak=8e-4, decoder=True),
    ]


def build_wan_autoencoder() -> AutoencoderKLWan:
    """Builds the autoencoder, 0.64 M parameters, with weights that pass signals on.

    diffusers' own initial weights let the signal fade, so that the noise of the posterior drowns it and nothing is
    learned. Here convolutions keep the variance, residual branches begin small, and the posterior begins narrow. Biases
    are not 0: a grey pixel, which is 0, would become a vector of length 0, whose norm has no gradient.

    Convolutions begin with little weight on earlier frames, and those that change the number of frames take or repeat
    the last one. So what an autoencoder has learned of images holds for clips.
    """
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=8,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            assert module.bias is not None
            nn.init.normal_(module.bias, std=0.05)
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
                module.weight.data[:, :, :2].mul_(0.1)
                module.weight.data.mul_(math.sqrt(3))
    for module in vae.modules():
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = nn.init.zeros_(module.time_conv.weight)
            weight.data[:, :, -1, 0, 0] = torch.eye(module.dim).repeat(len(weight) // module.dim, 1)
        if isinstance(module, WanResidualBlock | WanAttentionBlock):
            last = module.conv2 if isinstance(module, WanResidualBlock) else module.proj
            last.weight.data.mul_(0.1)
    nn.init.constant_(vae.quant_conv.bias[8:], -5.0)
    return vae


def fit_wan_autoencoder(
    seed: int, phases: list[AutoencoderPhase], device: torch.device, work: Path | None = None
) -> AutoencoderKLWan:
    """Trains on L1 in [-1, 1] with a small KL term, then sets mean and standard deviation of each latent channel.

    Args:
        seed: of weights and clips.
        phases: in order.
        device: of the weights.
        work: folder of the states of unfinished phases; None keeps none.
    """
    torch.manual_seed(seed)
    vae = build_wan_autoencoder().to(device).train()
    with whole_clips(vae):
        for number, phase in enumerate(phases):
            fit(
                [vae.decoder, vae.post_quant_conv] if phase.decoder else [vae],
                _loss_of_step(vae, phase, seed, number),
                steps=phase.steps,
                peak=phase.peak,
                decay=0.995,
                name=f"wan autoencoder, phase {number + 1}, {phase.frames} frames",
                state=work / f"wan-autoencoder-{number + 1}.pt" if work else None,
            )
    vae.eval().requires_grad_(False)
    _set_statistics(vae, seed)
    return vae


def _loss_of_step(vae: AutoencoderKLWan, phase: AutoencoderPhase, seed: int, number: int) -> Callable[[int], Tensor]:
    def loss_of_step(step: int) -> Tensor:
        generator = randomness.generator(seed, "wan autoencoder", number, step)
        clips_BFCHW = draw_footage(phase.batch, generator, QUALITY, FRAMES).frames_BFCHW
        first_B = torch.randint(FRAMES - phase.frames + 1, (phase.batch, 1), generator=generator)
        window_BFCHW = clips_BFCHW[torch.arange(phase.batch)[:, None], first_B + torch.arange(phase.frames)]
        pixels = window_BFCHW.transpose(1, 2).to(vae.device) * 2 - 1
        noise = torch.randn(phase.batch, 8, 1 + (phase.frames - 1) // 4, 8, 8, generator=generator).to(vae.device)
        with torch.set_grad_enabled(not phase.decoder):
            posterior = encode_whole(vae, pixels)
            latents = posterior.mean + posterior.std * noise
            if phase.decoder:
                latents = posterior.mean + 0.05 * posterior.mean.std() * noise
        error = (decode_whole(vae, latents) - pixels).abs().mean()
        return error if phase.decoder else error + 1e-4 * posterior.kl().mean() / noise[0].numel()

    return loss_of_step


@contextmanager
def whole_clips(vae: AutoencoderKLWan) -> Iterator[None]:
    """Lets ``encode_whole`` and ``decode_whole`` see all frames at once, as training is faster; an image has no time.

    diffusers' own ``encode`` and ``decode`` run through chunks of one and four frames, with caches between them. The
    numbers are the same.
    """
    layers = [layer for layer in vae.modules() if isinstance(layer, WanResample | WanCausalConv3d)]
    for layer in layers:
        layer.forward = partial(_resample_whole if isinstance(layer, WanResample) else _convolve_whole, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def encode_whole(vae: AutoencoderKLWan, pixels_BCFHW: Tensor) -> DiagonalGaussianDistribution:
    """Returns the posterior of clips, as ``vae.encode`` does; within ``whole_clips``."""
    return DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(pixels_BCFHW)))


def decode_whole(vae: AutoencoderKLWan, latents_BCfhw: Tensor) -> Tensor:
    """Returns pixels (B, 3, F, H, W) as ``vae.decode`` does, but without its clamp; within ``whole_clips``.

    Pixels that the clamp changes would get no gradient.
    """
    return vae.decoder(vae.post_quant_conv(latents_BCfhw))


def _convolve_whole(layer: WanCausalConv3d, x_BCFHW: Tensor, cache_x: None = None) -> Tensor:
    """Convolves clips; of a single frame with the last weights in time alone, for the others meet zeros."""
    if x_BCFHW.shape[2] > 1:
        return WanCausalConv3d.forward(layer, x_BCFHW)
    frame = nn.functional.conv2d(x_BCFHW[:, :, 0], layer.weight[:, :, -1], layer.bias, padding=layer._padding[0])
    return frame[:, :, None]


def _resample_whole(layer: WanResample, x_BCFHW: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
    """Resamples all frames of clips; the first one is a frame of its own before and after."""
    x = x_BCFHW
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, x.shape[1]))
        x = torch.cat([x[:, :, :1], torch.stack(pairs.unbind(1), 3).flatten(2, 3)], 2)
    count = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, count)).transpose(1, 2)
    if layer.mode == "downsample3d" and count > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


def _set_statistics(vae: AutoencoderKLWan, seed: int) -> None:
    """Sets ``latents_mean`` and ``latents_std``, so that normalised latents of clips have unit variance."""
    parts = []
    for place in range(STATISTICS):
        generator = randomness.generator(seed, "wan statistics", place)
        clips = draw_footage(16, generator, QUALITY, FRAMES).frames_BFCHW
        parts.append(vae.encode(clips.transpose(1, 2).to(vae.device) * 2 - 1).latent_dist.mean)
    latents = torch.cat(parts)
    std_C, mean_C = torch.std_mean(latents, (0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in mean_C.tolist()],
        latents_std=[round(value, 4) for value in std_C.tolist()],
    )


@torch.no_grad()
def clean_wan_error(vae: AutoencoderKLWan) -> float:
    """Returns the mean absolute error of reconstruction on clean clips in [-1, 1]."""
    footage = draw_footage(64, torch.Generator().manual_seed(7), degraded=0.0, frames=FRAMES)
    errors = []
    for clips in footage.clean_BFCHW.transpose(1, 2).split(16):
        pixels = clips.to(vae.device) * 2 - 1
        errors.append((vae.decode(vae.encode(pixels).latent_dist.mean).sample - pixels).abs().mean())
    return torch.stack(errors).mean().item()
