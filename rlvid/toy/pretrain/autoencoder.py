"""Stage 1: the per-frame autoencoder, diffusers' ``AutoencoderKL`` with 8 x 8 x 4 latents for 32 x 32 frames."""

import torch
from diffusers import AutoencoderKL

from rlvid.toy.pretrain.common import draw_footage, fit, half


def build_autoencoder() -> AutoencoderKL:
    """Three levels of 24, 48 and 64 channels, 0.8 M parameters.

    The posterior starts narrow, or early steps see noise.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    assert vae.quant_conv is not None
    torch.nn.init.constant_(vae.quant_conv.bias[4:], -5.0)
    return vae


def fit_autoencoder(seed: int, steps: tuple[int, int, int], device: torch.device) -> AutoencoderKL:
    """Trains on L1 in [-1, 1] with a small KL term, then sets ``scaling_factor`` so that latents have unit variance.

    Three phases, each with a learning rate that warms up and decays: everything, on many degraded frames; the decoder
    alone, on latents with a trace of noise; everything again, on frames of which a quarter is degraded. ``steps`` holds
    the steps of each.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    vae = build_autoencoder().to(device).train()

    def frames(degraded: float) -> torch.Tensor:
        footage = draw_footage(32, generator, degraded)
        pick_B = torch.randint(8, (32,), generator=generator)
        return footage.frames_BFCHW[torch.arange(32), pick_B].to(device) * 2 - 1

    def whole(degraded: float) -> torch.Tensor:
        pixels = frames(degraded)
        with half(device):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        return (decoded.float() - pixels).abs().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    def decoder() -> torch.Tensor:
        pixels = frames(0.25)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            latents = latents + 0.03 * latents.std() * noise
        with half(device):
            decoded = vae.decode(latents).sample
        return (decoded.float() - pixels).abs().mean()

    fit([vae], lambda step: whole(0.4), steps=steps[0], peak=2e-3, decay=0.995, name="autoencoder")
    fit([vae.decoder], lambda step: decoder(), steps=steps[1], peak=1.5e-3, decay=0.995, name="decoder")
    fit([vae], lambda step: whole(0.25), steps=steps[2], peak=1.2e-3, decay=0.995, name="autoencoder")
    vae.eval().requires_grad_(False)
    footage = draw_footage(256, generator)
    latents = vae.encode(footage.frames_BFCHW[:, ::4].flatten(0, 1).to(device) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 4))
    return vae


@torch.no_grad()
def clean_error(vae: AutoencoderKL) -> float:
    """Returns the mean absolute error of reconstruction on clean frames in [-1, 1]."""
    footage = draw_footage(128, torch.Generator().manual_seed(7), degraded=0.0)
    frames = footage.clean_BFCHW[:, ::4].flatten(0, 1).to(vae.device) * 2 - 1
    return (vae.decode(vae.encode(frames).latent_dist.mean).sample - frames).abs().mean().item()
