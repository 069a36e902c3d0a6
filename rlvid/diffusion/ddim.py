"""One step of DDIM (Song et al. 2021, equation 12) and its log-probability (DDPO, Black et al. 2024, section 4.3).

==============  =============================================================================
code            meaning
==============  =============================================================================
``abar``        alpha-bar at the timestep of ``latents``
``abar_prev``   alpha-bar at the next, cleaner timestep
``sigma``       eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev)
``mean``        sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma^2) eps
``reach``       |d mean / d eps| / sigma, with x0 = (x - sqrt(1 - abar) eps) / sqrt(abar)
==============  =============================================================================
"""

import math

import torch
from torch import Tensor

from rlvid.models.base import Prediction


def sigma(abar: Tensor, abar_prev: Tensor, eta: float | Tensor) -> Tensor:
    """Returns the standard deviation of the noise that a step adds; any broadcastable shapes."""
    return eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).clamp_min(0).sqrt()


def step_mean(prediction: Prediction, abar_prev: Tensor, sigma: Tensor) -> Tensor:
    """Returns the mean of the next latents (B, C, F, h, w)."""
    direction = (1 - abar_prev - sigma**2).clamp_min(0).sqrt()
    return abar_prev.sqrt() * prediction.x0 + direction * prediction.eps


def reach(abar: Tensor, abar_prev: Tensor, sigma: Tensor) -> Tensor:
    """Returns how far a step's mean moves with the predicted noise, in units of the step's own noise.

    A policy gradient is proportional to it (Flash-GRPO). With DDIM's eta it is largest at the ends of a chain.
    """
    moved = (1 - abar_prev - sigma**2).clamp_min(0).sqrt() - (abar_prev * (1 - abar) / abar).sqrt()
    return moved.abs() / sigma


def log_probability(sample: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Computes the log-density of ``sample`` (B, ...) under N(mean, sigma^2), averaged over all but the batch: (B,).

    The sample is a constant here: gradient flows through the mean alone.
    """
    sample, mean = sample.detach().float(), mean.float()
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=mean.device)
    density = -((sample - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)
