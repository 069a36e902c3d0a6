"""Classifier-free guidance, at all levels or in a limited interval of noise levels (Kynkäänniemi et al. 2024).

A noise level is the share of noise, sigma / (alpha + sigma): s on a rectified flow. The paper's sigma is sigma / alpha,
so the share is sigma / (1 + sigma) of it.
"""

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from rlvid.models.noise_path import NoisePath, Point

_ROUNDING = 1e-6
"""Points of a path are rounded to float32, and a level at an end of the interval must not leave it by that."""


@dataclass(frozen=True)
class LimitedGuidance:
    """Guidance ``scale`` at the levels low < level <= high; elsewhere 1, for which the conditional branch is enough."""

    scale: float
    low: float
    high: float

    def at(self, path: NoisePath, point: Point) -> float | Tensor:
        """Returns the guidance at a point: a number, or for points of each video (B,) as many numbers, float32."""
        share_B = path.share(point)
        inside_B = (share_B > self.low + _ROUNDING) & (share_B <= self.high + _ROUNDING)
        if isinstance(point, Tensor) and point.dim():
            return torch.where(inside_B, self.scale, 1.0)
        return self.scale if bool(inside_B) else 1.0


Guidance = float | LimitedGuidance
"""Guidance g: a number, or a number in an interval alone."""


@overload
def guidance_at(guidance: Guidance, path: NoisePath, point: float) -> float: ...
@overload
def guidance_at(guidance: Guidance, path: NoisePath, point: Point) -> float | Tensor: ...
def guidance_at(guidance: Guidance, path: NoisePath, point: Point) -> float | Tensor:
    """Returns the guidance at a point as a number, or as one for each video (B,)."""
    return guidance.at(path, point) if isinstance(guidance, LimitedGuidance) else guidance
