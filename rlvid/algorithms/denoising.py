"""Clean latents at a random point of the noise path, and the error of the model's prediction there.

=============  =====================================================================
code           meaning
=============  =====================================================================
``point``      as in the model's training (``NoisePath.draw``), drawn for each sample
``latents``    x_t = alpha x0 + sigma z
``noise``      z, standard normal, drawn for each sample
``output``     eps or v, what the network predicts (``NoisePath.predicted``)
=============  =====================================================================
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context
from rlvid.models.guidance import Guidance
from rlvid.models.noise_path import Prediction


@dataclass(frozen=True)
class NoisyLatents:
    """Latents (B, C, F, h, w) at a point of the path for each video (B,), and the noise that is in them."""

    latents_BCFhw: Tensor
    point_B: Tensor
    noise_BCFhw: Tensor


def at_random_levels(context: Context, batch: Batch, clean_BCFhw: Tensor, purpose: str, index: int = 0) -> NoisyLatents:
    """Noises each video to a level of its own: a function of (seed, purpose, sample, index) and the clean latents."""
    positions = [(serial, index) for serial in batch.serials]
    uniform_B = randomness.uniform((), context.config.seed, f"{purpose}-timestep", positions)
    point_B = context.model.path.draw(uniform_B).to(clean_BCFhw.device)
    noise = context.normal(f"{purpose}-noise", batch, index)
    return NoisyLatents(context.model.add_noise(clean_BCFhw, noise, point_B), point_B, noise)


def noise_error(
    context: Context, batch: Batch, clean_BCFhw: Tensor, purpose: str, index: int = 0, guidance: Guidance = 1.0
) -> Tensor:
    """Returns the mean (output - output_theta)^2 of each video at a random level: (B,)."""
    noisy = at_random_levels(context, batch, clean_BCFhw, purpose, index)
    with context.stopwatch.stage("replay"):
        prediction = context.model.predict(
            noisy.latents_BCFhw,
            noisy.point_B,
            batch.text_BLD,
            guidance,
            recompute=context.config.train.checkpoint_activations,
        )
    predicted, truth = context.model.path.predicted, Prediction(clean_BCFhw, noisy.noise_BCFhw)
    return (predicted(prediction) - predicted(truth)).square().flatten(1).mean(1)


def base_distance(
    context: Context, batch: Batch, clean_BCFhw: Tensor, purpose: str, index: int = 0, *, unconditional_gradient: bool
) -> Tensor:
    """Returns the mean (output_theta - output_base)^2 of each video at a random level, under guidance: (B,)."""
    noisy = at_random_levels(context, batch, clean_BCFhw, purpose, index)
    recompute = context.config.train.checkpoint_activations
    seen = (noisy.latents_BCFhw, noisy.point_B, batch.text_BLD, context.guidance)
    with context.stopwatch.stage("replay"):
        tuned = context.model.predict(*seen, unconditional_gradient=unconditional_gradient, recompute=recompute)
        with torch.no_grad(), context.model.base():
            base = context.model.predict(*seen)
    predicted = context.model.path.predicted
    return (predicted(tuned) - predicted(base)).square().flatten(1).mean(1)
