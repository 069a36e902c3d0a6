"""Temporally Attenuated Reward, TAR (InstructVideo, section 3.3): frames far from the centre weigh less."""

import math

import torch
from torch import Tensor


def tar_weights(frames_BS: Tensor, frames: int, attenuation: float, normalised: bool = False) -> Tensor:
    """exp(-lambda |index - F // 2|) for each scored frame: weights_BS, float32 in [0, 1].

    Args:
        frames_BS: indices of the scored frames, int64.
        frames: F.
        attenuation: lambda; 0 weighs all alike, ``inf`` leaves the central frame alone with weight 1.
        normalised: divide by the sum over a video's scored frames, in a form in which not all weights underflow.
    """
    distance_BS = (frames_BS - frames // 2).abs().float()
    if math.isinf(attenuation):
        return (distance_BS == 0).float()
    return torch.softmax(-attenuation * distance_BS, 1) if normalised else torch.exp(-attenuation * distance_BS)
