"""SegVR and TAR around an image reward: the frames to decode, and the reward of a video."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlvid.reward.attenuation import tar_weights
from rlvid.reward.segments import choose_frames

ImageReward = Callable[[Tensor, list[str]], Tensor]
"""``(frames_BSCHW, prompts) -> scores_BS``: differentiable in the frames, which are pixels in [0, 1]."""


def whole_video(reward: ImageReward) -> bool:
    """Returns whether a reward looks at all frames of a video at once and gives one score a video."""
    return bool(getattr(reward, "whole_video", False))


def label_of(reward: ImageReward) -> str:
    """Returns the name of a reward in messages: FILE.py:FUNCTION for a user's own, else its name."""
    return str(getattr(reward, "label", type(reward).__name__))


def check_shape(scores: Tensor, shape: Sequence[int], label: str) -> Tensor:
    """Returns the scores, whose shape is (B, S) or (B,).

    Args:
        scores: of a reward.
        shape: (B, S), videos and frames that it looked at.
        label: what to call it.

    Raises:
        ValueError: their shape is another.
    """
    if tuple(scores.shape) not in (tuple(shape), tuple(shape[:1])):
        raise ValueError(
            f"the reward {label} gave scores of shape {tuple(scores.shape)} for {shape[0]} videos of {shape[1]} "
            f"frames; expected {tuple(shape)} (one a frame) or {tuple(shape[:1])} (one a video)"
        )
    return scores


def mean_of_frames(scores: Tensor) -> Tensor:
    """Returns the mean score of each video (B,), of scores (B, S), or (B,) from a reward of whole videos."""
    return scores if scores.dim() == 1 else scores.double().mean(1).to(torch.promote_types(scores.dtype, torch.float32))


@dataclass(frozen=True)
class FramePlan:
    """Frames to decode and score: ``frames_BS`` (int64) and ``weights_BS`` (float32), the weights ready to sum.

    ``normalised`` weights sum to one, which ``reward`` makes exact.
    """

    frames_BS: Tensor
    weights_BS: Tensor
    normalised: bool = False

    def reward(self, scores_BS: Tensor) -> Tensor:
        """reward_B = sum over s of weight_s score_s, rounded once: frames that score alike make equal rewards.

        float32, or float64 where the scores are.
        """
        weights_BS = self.weights_BS.to(scores_BS.device, torch.float64)
        if self.normalised:
            weights_BS = weights_BS / weights_BS.sum(1, keepdim=True)
        reward_B = (weights_BS * scores_BS.double()).sum(1)
        return reward_B.to(torch.promote_types(scores_BS.dtype, torch.float32))


def plan_frames(
    uniform_BS: Tensor, frames: int, attenuation: float, weights: str = "paper", skip_below: float = 0.0
) -> FramePlan:
    """Chooses and weighs frames before anything is decoded.

    Args:
        uniform_BS: one draw in [0, 1) for each video and segment.
        frames: F.
        attenuation: TAR's lambda. With ``inf`` the plan is the central frame alone, of weight 1 in either mode.
        weights: ``paper`` divides TAR's weights by S; ``normalised`` makes them sum to one.
        skip_below: segments whose expected share of the summed weight is smaller are left out of the plan; the
            heaviest one always stays.

    Returns:
        A plan of S frames a video, or fewer with ``skip_below``.
    """
    if math.isinf(attenuation):
        centre_B1 = torch.full((len(uniform_BS), 1), frames // 2, dtype=torch.int64, device=uniform_BS.device)
        return FramePlan(centre_B1, torch.ones_like(centre_B1, dtype=torch.float32))
    frames_BS = choose_frames(uniform_BS, frames)
    shares_S = expected_shares(uniform_BS.shape[1], frames, attenuation).to(frames_BS.device)
    frames_BS = frames_BS[:, shares_S >= min(skip_below, shares_S.max().item())]
    normalised = weights == "normalised"
    weights_BS = tar_weights(frames_BS, frames, attenuation, normalised)
    return FramePlan(frames_BS, weights_BS if normalised else weights_BS / uniform_BS.shape[1], normalised)


def expected_shares(segments: int, frames: int, attenuation: float) -> Tensor:
    """Returns the share of the summed TAR weight that each segment has on average: (S,), float32, sums to one."""
    length = frames // segments
    index_SL = torch.arange(segments * length).reshape(segments, length)
    weight_S = tar_weights(index_SL, frames, attenuation).mean(1)
    return weight_S / weight_S.sum()
