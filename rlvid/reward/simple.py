"""Rewards without a model, for tests and first trials: brightness, and compression (few bits in JPEG) of a frame."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_QUANTA = (  # JPEG's example table for luma (ITU-T T.81, table K.1), quality 50
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def luma(frames_BSCHW: Tensor) -> Tensor:
    """Luma (B, S, H, W) of frames, clamped to [0, 1] first; float32."""
    weights = torch.tensor(_LUMA, device=frames_BSCHW.device)
    return torch.einsum("bschw,c->bshw", frames_BSCHW.clamp(0, 1).float(), weights)


class BrightnessReward(nn.Module):
    """The mean luma of a frame, in [0, 1]; prompts play no part."""

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_BS, float32."""
        return luma(frames_BSCHW).mean((2, 3))


class CompressionReward(nn.Module):
    """The compressibility of a frame in JPEG, differentiably: minus the bits per pixel that its luma needs.

    Every 8 x 8 block is transformed by the DCT and divided by JPEG's table; a coefficient c counts log2(1 + |c|) bits
    where JPEG would round it. A frame of one colour scores highest, 0 but for its DC coefficient, which is left out.
    """

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_BS, float32, at most 0; prompts play no part."""
        values_NHW = luma(frames_BSCHW).flatten(0, 1) * 255
        right, down = (-side % 8 for side in (values_NHW.shape[2], values_NHW.shape[1]))
        values_NHW = F.pad(values_NHW[:, None], (0, right, 0, down), mode="replicate")[:, 0]
        blocks = values_NHW.unfold(1, 8, 8).unfold(2, 8, 8)
        basis, quanta = _dct(values_NHW.device), torch.tensor(_QUANTA, device=values_NHW.device)
        bits = torch.log2(1 + (basis @ blocks @ basis.T / quanta).abs())
        bits = bits.flatten(3)[..., 1:].sum((1, 2, 3)) / values_NHW[0].numel()
        return -bits.unflatten(0, frames_BSCHW.shape[:2])


def _dct(device: torch.device) -> Tensor:
    """Returns the orthonormal DCT-II of eight samples: (8, 8), rows are frequencies."""
    place = torch.arange(8, device=device)
    waves = torch.cos(math.pi / 8 * (place + 0.5) * place[:, None]) / 2
    waves[0] /= math.sqrt(2)
    return waves
