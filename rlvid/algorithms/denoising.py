"""Clean latents at a random noise level of the training schedule, and the error of the noise prediction there.

=============  =====================================================================
code           meaning
=============  =====================================================================
``timestep``   t, uniform over the training schedule, drawn for each sample
``latents``    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) z
``noise``      z, standard normal, drawn for each sample
=============  =====================================================================
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context


@dataclass(frozen=True)
class NoisyLatents:
    """Latents (B, C, F, h, w) at a timestep of each video (int64, (B,)), and the noise that is in them."""

    latents_BCFhw: Tensor
    timestep_B: Tensor
    noise_BCFhw: Tensor


def at_random_levels(context: Context, batch: Batch, clean_BCFhw: Tensor, purpose: str, index: int = 0) -> NoisyLatents:
    """Noises each video to a level of its own: a function of (seed, purpose, sample, index) and the clean latents."""
    positions = [(serial, index) for serial in batch.serials]
    uniform_B = randomness.uniform((), context.config.seed, f"{purpose}-timestep", positions)
    timestep_B = (uniform_B * len(context.model.abar)).long().to(clean_BCFhw.device)
    noise = context.normal(f"{purpose}-noise", batch, index)
    return NoisyLatents(context.model.add_noise(clean_BCFhw, noise, timestep_B), timestep_B, noise)


def noise_error(
    context: Context, batch: Batch, clean_BCFhw: Tensor, purpose: str, index: int = 0, guidance: float = 1.0
) -> Tensor:
    """Returns the mean (eps - eps_theta)^2 of each video at a random level: (B,)."""
    noisy = at_random_levels(context, batch, clean_BCFhw, purpose, index)
    with context.stopwatch.stage("replay"):
        prediction = context.model.predict(
            noisy.latents_BCFhw,
            noisy.timestep_B,
            batch.text_BLD,
            guidance,
            recompute=context.config.train.checkpoint_activations,
        )
    return (prediction.eps - noisy.noise_BCFhw).square().flatten(1).mean(1)


def base_distance(
    context: Context, batch: Batch, clean_BCFhw: Tensor, purpose: str, index: int = 0, *, unconditional_gradient: bool
) -> Tensor:
    """Returns the mean (eps_theta - eps_base)^2 of each video at a random level, under the run's guidance: (B,)."""
    noisy = at_random_levels(context, batch, clean_BCFhw, purpose, index)
    guidance, recompute = context.config.sampling.guidance, context.config.train.checkpoint_activations
    seen = (noisy.latents_BCFhw, noisy.timestep_B, batch.text_BLD, guidance)
    with context.stopwatch.stage("replay"):
        tuned = context.model.predict(*seen, unconditional_gradient=unconditional_gradient, recompute=recompute)
        with torch.no_grad(), context.model.base():
            base = context.model.predict(*seen)
    return (tuned.eps - base.eps).square().flatten(1).mean(1)
