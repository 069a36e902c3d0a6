"""From decoded pixels to a reward model's input, differentiably."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images_NCHW: Tensor) -> Tensor:
    """Subtracts CLIP's mean and divides by its standard deviation; input in [0, 1]."""
    mean = images_NCHW.new_tensor(CLIP_MEAN)[:, None, None]
    std = images_NCHW.new_tensor(CLIP_STD)[:, None, None]
    return (images_NCHW - mean) / std


@dataclass(frozen=True)
class Preprocess:
    """Clamps to [0, 1], resizes the shorter side to ``size`` and crops the centre square, with torchvision's rounding.

    The clamp has no gradient where a pixel is saturated; ``saturated_share`` tells how often that is.
    """

    size: int
    mode: str = "bilinear"
    antialias: bool = True

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) of any size to (N, C, size, size)."""
        images = images_NCHW.clamp(0, 1)
        height, width = images.shape[-2:]
        if min(height, width) != self.size:
            short = min(height, width)
            target = (int(self.size * height / short), int(self.size * width / short))
            images = F.interpolate(images, target, mode=self.mode, antialias=self.antialias, align_corners=False)
            height, width = target
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return images[..., top : top + self.size, left : left + self.size]


@torch.no_grad()
def saturated_share(frames: Tensor) -> Tensor:
    """Share of pixels outside [0, 1], where the reward's gradient is zero: a scalar."""
    return ((frames < 0) | (frames > 1)).float().mean()
