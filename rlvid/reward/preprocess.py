"""Prepares frames for a reward model, differentiably: the preprocessing of published rewards, by name."""

from dataclasses import dataclass, replace
from typing import Literal

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
    """Resizes images of any size to a model's square input.

    ============  =================================================================================================
    fit           what happens to images that are not square
    ============  =================================================================================================
    ``crop``      the shorter side becomes ``size``, the centre square is kept
    ``pad``       the longer side becomes ``size``, black is added around the middle
    ``squash``    both sides become ``size``
    ``shortest``  the shorter side becomes ``size``, and nothing is cut: only square images fit the model
    ============  =================================================================================================

    With ``clamp``, pixels are first clamped to [0, 1], as they are when a frame is saved. That has no gradient where a
    pixel is saturated; ``saturated_share`` tells how often that is. Nothing is clamped after resizing, so bicubic
    overshoot passes, as it does in the published code on tensors. ``rounding`` says where the square stands when the
    margin is odd: torchvision rounds half a pixel to even, transformers (``hf``) down.
    """

    size: int
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    fit: Literal["crop", "pad", "squash", "shortest"] = "crop"
    clamp: bool = True
    rounding: Literal["torchvision", "hf"] = "torchvision"

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) of any size to (N, C, size, size).

        Raises:
            ValueError: the policy is ``shortest`` and the images are not square.
        """
        images = images_NCHW.clamp(0, 1) if self.clamp else images_NCHW
        height, width = images.shape[-2:]
        if self.fit == "shortest" and height != width:
            raise ValueError(
                f"reward.preprocess: frames of {width} x {height} are not square, which the policy 'shortest' (preset "
                "instructvideo) needs; choose another preset"
            )
        target = self._target(height, width)
        if target != (height, width):
            images = F.interpolate(images, target, mode=self.mode, antialias=self.antialias, align_corners=False)
        if self.fit == "pad":
            return self._padded(images)
        return self._cropped(images)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "pad":
            scale = self.size / max(height, width)
            return round(height * scale), round(width * scale)
        short = min(height, width)
        if short == self.size:
            return height, width
        return int(self.size * height / short), int(self.size * width / short)

    def _cropped(self, images: Tensor) -> Tensor:
        margins = [(side - self.size) / 2 for side in images.shape[-2:]]
        top, left = (round(margin) if self.rounding == "torchvision" else int(margin) for margin in margins)
        return images[..., top : top + self.size, left : left + self.size]

    def _padded(self, images: Tensor) -> Tensor:
        down, right = (self.size - side for side in images.shape[-2:])
        return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def preset(name: str, size: int = 224) -> Preprocess:
    """Returns the preprocessing of a published code base.

    ``hpsv2``: the official package. ``instructvideo``: the paper's code; the torchvision of its time did not
    antialias tensors. ``videox_fun``: VideoX-Fun's HPS reward. ``imagereward``: the official package, as ReFL uses it
    on tensors. ``clip``, ``pickscore``: transformers' ``CLIPImageProcessor``. All of them get clamped frames.

    Raises:
        ValueError: no such preset.
    """
    if name not in _PRESETS:
        raise ValueError(f"reward.preprocess = {name!r} does not exist; allowed: {', '.join(_PRESETS)}")
    return replace(_PRESETS[name], size=size)


_HF = Preprocess(224, "bicubic", rounding="hf")
_PRESETS = {
    "hpsv2": Preprocess(224, "bicubic", fit="pad"),
    "instructvideo": Preprocess(224, "bilinear", antialias=False, fit="shortest"),
    "videox_fun": Preprocess(224, "bicubic", fit="squash"),
    "imagereward": Preprocess(224, "bicubic"),
    "clip": _HF,
    "pickscore": _HF,
}


@torch.no_grad()
def saturated_share(frames: Tensor) -> Tensor:
    """Returns the share of pixels outside [0, 1], where the reward's gradient is zero: a scalar."""
    return ((frames < 0) | (frames > 1)).float().mean()
