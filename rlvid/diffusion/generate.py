"""Generates videos from pure noise, the same for every model, so that models are compared sample by sample."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.diffusion.chain import denoise
from rlvid.models.base import VideoModel

AT_ONCE = 16
"""Most videos that are made at once, unless a caller says otherwise."""
_NUMBERS = 2**20
"""Most numbers of latents that are denoised at once: those of 16 videos of 16 frames of 256 x 256."""


def videos_at_once(latent_shape: Sequence[int], most: int) -> int:
    """Returns how many videos are made at once, 1 to ``most``: fewer of larger ones, so that memory is bounded."""
    return max(1, min(most, _NUMBERS // math.prod(latent_shape)))


@torch.no_grad()
def generate(
    model: VideoModel,
    prompts: list[str],
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 3.0,
    eta: float = 0.0,
    final: str = "exact",
    reuse: int = 1,
    batch: int = AT_ONCE,
    first_index: int = 0,
    noise_of: Sequence[tuple[int, int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generates one video a prompt and decodes all its frames.

    Sample i (``first_index`` + place among the prompts) starts from noise that is a function of (seed, i) alone: it is
    the same for every model, prompt and number of steps, and the video does not depend on ``batch`` but for rounding.

    Args:
        model: in evaluation mode, or dropout makes the result random.
        prompts: N prompts.
        seed: of the noise.
        steps: D, steps of the chain.
        guidance: classifier-free guidance g.
        eta: 0 is deterministic; above 0, step k of sample i adds noise that is a function of (seed, i, k) alone.
        final: ``exact`` or ``paper``, see ``rlvid.diffusion.chain.denoise``.
        reuse: as ``sampling.reuse``, see ``rlvid.diffusion.forecast``; 1 calls the denoiser at every step.
        batch: most videos that are made at once; of large videos fewer, see ``videos_at_once``.
        first_index: i of the first prompt.
        noise_of: (seed, i) of every sample, instead of the two above; so a prompt can be given several times.
        progress: called with (videos done, N) after each batch.

    Returns:
        frames_BFCHW, float32 in [0, 1], on the CPU. Values that are not finite become NaN, and never a colour.

    Raises:
        ValueError: no prompts, ``batch`` below 1, or ``steps`` out of range.
    """
    if not prompts:
        raise ValueError("generate: prompts is empty; give at least one")
    if batch < 1:
        raise ValueError(f"generate: batch = {batch}; allowed: 1 or more")
    grid, size = model.path.grid(steps), videos_at_once(model.latent_shape, batch)
    samples = list(noise_of or ((seed, first_index + place) for place in range(len(prompts))))
    parts = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        frames_BFCHW = _generate_batch(model, part, samples[start : start + size], grid, guidance, eta, final, reuse)
        parts.append(torch.where(frames_BFCHW.isfinite(), frames_BFCHW.clamp(0, 1), torch.nan).cpu())
        if progress is not None:
            progress(start + len(part), len(prompts))
    return torch.cat(parts)


def _generate_batch(
    model: VideoModel,
    prompts: list[str],
    samples: list[tuple[int, int]],
    grid: Sequence[float],
    guidance: float,
    eta: float,
    final: str,
    reuse: int,
) -> Tensor:
    def noise(step: int) -> Tensor:
        return _noise(model, "generate-step", samples, step)

    latents_BCFhw = denoise(
        model,
        _noise(model, "generate", samples).to(model.device),
        model.encode_prompts(prompts),
        grid,
        guidance=guidance,
        eta=eta,
        gradient_steps=0,
        noise=noise,
        final=final,
        reuse=reuse,
    )
    frames_BF = torch.arange(model.frames, device=model.device).expand(len(prompts), -1)
    return model.decode_frames(latents_BCFhw, frames_BF).float()


def _noise(model: VideoModel, purpose: str, samples: list[tuple[int, int]], *position: int) -> Tensor:
    each = [randomness.normal(model.latent_shape, seed, purpose, [(i, *position)]) for seed, i in samples]
    return torch.cat(each)
