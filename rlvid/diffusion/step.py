"""One step of a chain on any noise path, its random kernels, and its log-probability (DDPO, Black et al. 2024).

    x' = alpha' x0 + c eps + spread z

==============  ============================================================================================
code            meaning
==============  ============================================================================================
``now``         (alpha, sigma) of the latents before the step
``then``        (alpha', sigma') of the latents after it, cleaner
``spread``      standard deviation of the noise z that the step adds
``direction``   c, the coefficient of the predicted noise
``eta``         strength of the noise; with 0 every kernel is (0, sigma'): DDIM, and Euler's step on a flow
``reach``       |d mean / d output| / spread, with the network's output (eps or v)
==============  ============================================================================================
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlvid.models.noise_path import Level, NoisePath, Prediction


@dataclass(frozen=True)
class Kernel:
    """The randomness of a step: ``spread`` and ``direction``, which broadcast over the latents.

    ``constants`` says whether its log-probability is a normal density, or the squared distance without constants.
    """

    spread: Tensor
    direction: Tensor
    constants: bool = True


KernelOf = Callable[[Level, Level, float | Tensor], Kernel]
"""Makes the kernel of a step from its two levels and eta, a number or one for each video."""


def ddim(now: Level, then: Level, eta: float | Tensor) -> Kernel:
    """Returns DDIM's kernel (Song et al. 2021, equation 16): spread = eta sigma' sqrt(1 - SNR / SNR').

    SNR = alpha^2 / sigma^2, so it serves every path; on a variance-preserving one, eta = 1 is DDPM's ancestral step.

    Raises:
        ValueError: the spread is above sigma'.
    """
    ratio = now.alpha * then.sigma / (then.alpha * now.sigma)
    spread = eta * then.sigma * (1 - ratio**2).sqrt()
    return Kernel(spread, _left(then, spread))


def coefficient_preserving(now: Level, then: Level, eta: float | Tensor) -> Kernel:
    """Returns Flow-CPS's kernel (Wang and Yu 2025): spread = sigma' sin(eta pi / 2), whatever the level before.

    Its published log-probability is -(x' - mean)^2, without the constants of the normal density.

    Raises:
        ValueError: the spread is above sigma'.
    """
    spread = then.sigma * torch.sin(torch.as_tensor(eta).to(then.sigma) * (math.pi / 2))
    return Kernel(spread, _left(then, spread), constants=False)


def flow_sde(now: Level, then: Level, eta: float | Tensor) -> Kernel:
    """Returns Flow-GRPO's kernel (Liu et al. 2025), for rectified flow alone.

    spread = eta sqrt(s / (1 - s)) sqrt(s - s') and c = s' - spread^2 / (2 s), with s = sigma. At pure noise 1 - s is
    taken at s'.

    It is one Euler step of a stochastic equation, so the latents after it hold more noise than their level says:
    c^2 + spread^2 - s'^2 = spread^2 (1 - s' / s) + spread^4 / (4 s^2). A chain is still a policy with any eta; where
    the fresh noise alone is above the level, the network would see latents of no level that it was trained on.
    ``rlvid.diffusion.schedule.check_chain`` refuses such an eta.

    Raises:
        ValueError: the path is not straight.
    """
    if ((now.alpha + now.sigma - 1).abs() > 1e-3).any():
        raise ValueError(
            "sampling.kernel = 'flow-sde': this model is of no rectified flow, which the kernel is for; allowed: "
            "'ddim', 'cps'"
        )
    clean = torch.where(now.sigma == 1, then.alpha, now.alpha)
    spread = eta * (now.sigma / clean).sqrt() * (now.sigma - then.sigma).sqrt()
    return Kernel(spread, then.sigma - spread**2 / (2 * now.sigma))


KERNELS: dict[str, KernelOf] = {"ddim": ddim, "cps": coefficient_preserving, "flow-sde": flow_sde}
"""The values of ``sampling.kernel``."""


def _left(then: Level, spread: Tensor) -> Tensor:
    """Returns c = sqrt(sigma'^2 - spread^2): fresh and predicted noise make up that of the next level."""
    if (spread > then.sigma).any():
        raise ValueError(
            f"sampling.eta: a step would add noise of {float(spread.max()):.3g}, and the level after it holds "
            f"{float(then.sigma.max()):.3g}; allowed: 0 to 1"
        )
    return (then.sigma**2 - spread**2).sqrt()


def step_mean(prediction: Prediction, then: Level, kernel: Kernel) -> Tensor:
    """Returns the mean of the next latents (B, C, F, h, w)."""
    return then.alpha * prediction.x0 + kernel.direction * prediction.eps


def reach(path: NoisePath, now: Level, then: Level, kernel: Kernel) -> Tensor:
    """Returns how far a step's mean moves with the network's output, in units of the step's own noise.

    A policy gradient is proportional to it (Flash-GRPO). With DDIM's eta it is largest at the ends of a chain.
    """
    slopes = path.slopes(now)
    return (then.alpha * slopes.alpha + kernel.direction * slopes.sigma).abs() / kernel.spread


def log_probability(sample: Tensor, mean: Tensor, kernel: Kernel) -> Tensor:
    """Computes the log-density of ``sample`` (B, ...) under N(mean, spread^2), averaged over all but the batch: (B,).

    The sample is a constant here: gradient flows through the mean alone. See ``Kernel`` for its constants.
    """
    sample, mean = sample.detach().float(), mean.float()
    if not kernel.constants:
        return -((sample - mean) ** 2).flatten(1).mean(1)
    spread = kernel.spread.to(mean)
    density = -((sample - mean) ** 2) / (2 * spread**2) - spread.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)
