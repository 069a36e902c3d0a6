"""Stage 1: the per-frame autoencoder, diffusers' ``AutoencoderKL`` with 8 x 8 x 4 latents for 32 x 32 frames."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL

from rlvid.toy.pretrain.common import draw_footage, fit


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


def fit_autoencoder(
    seed: int, steps: int, device: torch.device, each: Callable[[AutoencoderKL, int], None] | None = None
) -> AutoencoderKL:
    """Trains on L1 in [-1, 1] with a small KL term, then sets ``scaling_factor`` so that latents have unit variance."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    vae = build_autoencoder().to(device).train()

    def loss_of_step(step: int) -> torch.Tensor:
        footage = draw_footage(16, generator, degraded=0.4)
        pick_B2 = torch.randint(8, (16, 2), generator=generator)
        frames = footage.frames_BFCHW[torch.arange(16)[:, None], pick_B2].flatten(0, 1).to(device) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(frames).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        return (decoded.float() - frames).abs().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    fit(
        [vae],
        loss_of_step,
        steps=steps,
        peak=2e-3,
        decay=0.995,
        name="autoencoder",
        each=each and (lambda step: each(vae, step)),
    )
    vae.eval().requires_grad_(False)
    footage = draw_footage(256, generator)
    latents = vae.encode(footage.frames_BFCHW[:, ::4].flatten(0, 1).to(device) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 4))
    return vae


def refine_decoder(vae: AutoencoderKL, seed: int, steps: int) -> AutoencoderKL:
    """Trains the decoder further on latents that stay as they are, with a little noise on them as samples have."""
    generator = torch.Generator().manual_seed(seed)
    vae.decoder.requires_grad_(True).train()

    def loss_of_step(step: int) -> torch.Tensor:
        footage = draw_footage(16, generator, degraded=0.25)
        frames = footage.frames_BFCHW[:, int(torch.randint(4, (), generator=generator)) :: 4].flatten(0, 1)
        frames = frames.to(vae.device) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(frames).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            latents = latents + 0.03 / vae.config.scaling_factor * noise
        with torch.autocast(vae.device.type, torch.bfloat16):
            decoded = vae.decode(latents).sample
        return (decoded.float() - frames).abs().mean()

    fit([vae.decoder], loss_of_step, steps=steps, peak=1.5e-3, decay=0.995, name="decoder")
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def clean_error(vae: AutoencoderKL, seed: int = 7) -> float:
    """Mean absolute error of reconstruction on clean frames in [-1, 1]."""
    footage = draw_footage(128, torch.Generator().manual_seed(seed), degraded=0.0)
    frames = footage.clean_BFCHW[:, ::4].flatten(0, 1).to(vae.device) * 2 - 1
    return (vae.decode(vae.encode(frames).latent_dist.mean).sample - frames).abs().mean().item()
