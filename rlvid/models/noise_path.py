"""The noise path of a model, x_t = alpha x0 + sigma eps: variance-preserving diffusion, or rectified flow.

=====================  ============================  =================================
code                   ``VariancePreserving``        ``RectifiedFlow``
=====================  ============================  =================================
``Level.alpha``        sqrt(abar)                    1 - s
``Level.sigma``        sqrt(1 - abar)                s
``point``              t, a timestep (integer)       s
``timestep``           t                             1000 s, not rounded
``output``             eps                           v = eps - x0
``Prediction.x0``      (x_t - sigma eps) / alpha     x_t - sigma v
``Prediction.eps``     eps                           x_t + alpha v
=====================  ============================  =================================

All that differs between the two families is here and in their models. Chains, methods and rewards are written once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Point = float | Tensor
"""A place on the path: a number, or one for each video (B,). Larger is noisier."""


@dataclass(frozen=True)
class Level:
    """The signal ``alpha`` and the noise ``sigma`` of latents, in [0, 1]; they broadcast over the latents."""

    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Prediction:
    """A denoiser's prediction for noisy latents: ``x0_BCFhw`` and ``eps_BCFhw``, both float32."""

    x0: Tensor
    eps: Tensor

    def take(self, rows: Any) -> "Prediction":
        """Returns the prediction of these rows, an index of their tensors."""
        return Prediction(self.x0[rows], self.eps[rows])


class NoisePath(ABC):
    """The way from clean latents to noise, and the meaning of a network's output on it.

    Attributes:
        train_steps: T; a network's timestep over T is the noise level of ``model.lora.levels``.
    """

    train_steps: int

    @abstractmethod
    def grid(self, steps: int) -> Sequence[float]:
        """Returns the points of a chain of D steps, from noisy to clean.

        Raises:
            ValueError: ``steps`` is out of range.
        """

    @abstractmethod
    def level(self, point: Point, like: Tensor) -> Level:
        """Returns the level of a point, shaped to broadcast over ``like`` (B, ...), of its dtype and device."""

    @abstractmethod
    def final(self, end: str, like: Tensor) -> Level:
        """Returns the level at which a chain ends: (1, 0) for ``exact``; ``paper`` is for the first family alone."""

    def share(self, point: Point) -> Tensor:
        """Returns the share of noise, sigma / (alpha + sigma), at a point (1,) or at each video's (B,); float64."""
        device = point.device if isinstance(point, Tensor) else None
        level = self.level(point, torch.empty(1, dtype=torch.float64, device=device))
        return (level.sigma / (level.alpha + level.sigma)).flatten()

    @abstractmethod
    def at_share(self, share: float) -> float:
        """Returns the point at which sigma / (alpha + sigma) is ``share``, in (0, 1), or the nearest timestep."""

    @abstractmethod
    def draw(self, uniform_B: Tensor) -> Tensor:
        """Returns the points (B,) at which a model is trained, from uniform numbers in [0, 1)."""

    @abstractmethod
    def timestep(self, point: Point, device: torch.device) -> Tensor:
        """Returns what the network is fed as its timestep: () or (B,)."""

    @abstractmethod
    def prediction(self, output_BCFhw: Tensor, latents_BCFhw: Tensor, level: Level) -> Prediction:
        """Returns clean latents and noise from a network's output for latents of a level."""

    @abstractmethod
    def predicted(self, prediction: Prediction) -> Tensor:
        """Returns a prediction as the network gives it (B, C, F, h, w): distances and losses are taken on it."""

    @abstractmethod
    def slopes(self, level: Level) -> Level:
        """Returns d x0 / d output as ``alpha``, and d eps / d output as ``sigma``."""


class VariancePreserving(NoisePath):
    """The path of DDPM and DDIM (Ho et al. 2020; Song et al. 2021), for networks that predict eps.

    Args:
        abar_T: alpha-bar, the cumulative product of alphas at the T timesteps of training; kept in float32.
    """

    def __init__(self, abar_T: Tensor) -> None:
        self.abar, self.train_steps = abar_T.float(), len(abar_T)

    def grid(self, steps: int) -> Sequence[int]:
        """Returns DDIM's timesteps in leading spacing: 951, 901, ..., 51, 1 for 20 steps.

        Raises:
            ValueError: ``steps`` outside 1 .. T / 2: with more, the grid stays too far below full noise.
        """
        if not 1 <= steps <= self.train_steps // 2:
            raise ValueError(f"sampling.steps = {steps}; allowed: 1 to {self.train_steps // 2}")
        stride = self.train_steps // steps
        return [index * stride + 1 for index in reversed(range(steps))]

    def level(self, point: Point, like: Tensor) -> Level:
        """See ``NoisePath.level``; the roots are taken in the dtype of ``like``."""
        abar = self.abar.to(like.device)[torch.as_tensor(point, device=like.device)]
        abar = abar.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
        return Level(abar.sqrt(), (1 - abar).sqrt())

    def final(self, end: str, like: Tensor) -> Level:
        """See ``NoisePath.final``; ``paper`` ends at the level of timestep 0, as InstructVideo's code does."""
        return _clean(like) if end == "exact" else self.level(0, like)

    def at_share(self, share: float) -> int:
        """See ``NoisePath.at_share``."""
        alpha_T, sigma_T = self.abar.double().sqrt(), (1 - self.abar.double()).sqrt()
        return int((sigma_T / (alpha_T + sigma_T) - share).abs().argmin())

    def draw(self, uniform_B: Tensor) -> Tensor:
        """Returns uniform timesteps, int64."""
        return (uniform_B * self.train_steps).long()

    def timestep(self, point: Point, device: torch.device) -> Tensor:
        """Returns the timestep itself, int64."""
        return torch.as_tensor(point, device=device)

    def prediction(self, output_BCFhw: Tensor, latents_BCFhw: Tensor, level: Level) -> Prediction:
        """See ``NoisePath.prediction``."""
        return Prediction((latents_BCFhw - level.sigma * output_BCFhw) / level.alpha, output_BCFhw)

    def predicted(self, prediction: Prediction) -> Tensor:
        """Returns eps."""
        return prediction.eps

    def slopes(self, level: Level) -> Level:
        """See ``NoisePath.slopes``."""
        return Level(-level.sigma / level.alpha, torch.ones_like(level.sigma))


class RectifiedFlow(NoisePath):
    """The straight path of flow matching (Liu et al. 2023), for networks that predict v = eps - x0.

    Args:
        shift: above 1 moves grid and training towards noise, s = shift u / (1 + (shift - 1) u) (Esser et al. 2024).
            Wan2.1 has 3 to 12.

    Raises:
        ValueError: ``shift`` is not above 0.
    """

    train_steps = 1000

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise ValueError(f"shift = {shift}; allowed: numbers above 0, such as 3")
        self.shift = shift

    def grid(self, steps: int) -> Sequence[float]:
        """Returns Wan's own levels: the shifted u = 1, 1 - 1 / D, ..., 1 / D. diffusers' default grid shifts twice.

        Raises:
            ValueError: ``steps`` below 1.
        """
        if steps < 1:
            raise ValueError(f"sampling.steps = {steps}; allowed: 1 or more")
        uniform_D = 1 - torch.arange(steps, dtype=torch.float64) / steps
        return self._shifted(uniform_D).tolist()

    def level(self, point: Point, like: Tensor) -> Level:
        """See ``NoisePath.level``; s is rounded to float32, as a number and as a tensor alike."""
        s = self._sigma(point, like.device).to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
        return Level(1 - s, s)

    def final(self, end: str, like: Tensor) -> Level:
        """See ``NoisePath.final``.

        Raises:
            ValueError: ``end`` is not ``exact``.
        """
        if end != "exact":
            raise ValueError(f"sampling.final_level = {end!r}: flow models end without noise; allowed: 'exact'")
        return _clean(like)

    def at_share(self, share: float) -> float:
        """Returns the share itself, for alpha + sigma = 1."""
        return share

    def draw(self, uniform_B: Tensor) -> Tensor:
        """Returns uniform numbers after the shift, float32."""
        return self._shifted(uniform_B)

    def timestep(self, point: Point, device: torch.device) -> Tensor:
        """Returns 1000 s, float32."""
        return self.train_steps * self._sigma(point, device)

    def prediction(self, output_BCFhw: Tensor, latents_BCFhw: Tensor, level: Level) -> Prediction:
        """See ``NoisePath.prediction``."""
        return Prediction(latents_BCFhw - level.sigma * output_BCFhw, latents_BCFhw + level.alpha * output_BCFhw)

    def predicted(self, prediction: Prediction) -> Tensor:
        """Returns v. At high noise two eps differ by nothing: |eps - eps'| = alpha |v - v'|."""
        return prediction.eps - prediction.x0

    def slopes(self, level: Level) -> Level:
        """See ``NoisePath.slopes``."""
        return Level(-level.sigma, level.alpha)

    def _shifted(self, uniform: Tensor) -> Tensor:
        return self.shift * uniform / (1 + (self.shift - 1) * uniform)

    @staticmethod
    def _sigma(point: Point, device: torch.device) -> Tensor:
        return torch.as_tensor(point, dtype=torch.float32, device=device)


def _clean(like: Tensor) -> Level:
    one = torch.ones((), dtype=like.dtype, device=like.device)
    return Level(one, torch.zeros_like(one))
