"""The motion of a video, and a part of a reward that holds it at the base model's.

============  ==========================================================================
code          meaning
============  ==========================================================================
``motion``    m = mean |y_(f+1) - y_f| over frames, channels and pixels
``floor``     m_0, the motion of the base model's videos
score         min(m / m_0, 1) - 1: 0 at m_0 and above, -1 for a frozen video
============  ==========================================================================

Rewards of single frames still videos. This part pulls against them below the floor alone, so motion is held and not
maximised.
"""

import torch
from torch import Tensor, nn


def motion(frames_BFCHW: Tensor) -> Tensor:
    """Returns the mean absolute difference of consecutive frames: (B,), in pixel values of [0, 1].

    Raises:
        ValueError: fewer than two frames.
    """
    if frames_BFCHW.shape[1] < 2:
        raise ValueError(f"motion: a clip has {frames_BFCHW.shape[1]} frame(s); needs 2 or more")
    return frames_BFCHW.diff(dim=1).abs().flatten(1).mean(1)


class MotionReward(nn.Module):
    """A hinge on the motion of a whole video; prompts play no part.

    Args:
        floor: motion from which on the score is 0; above 0.
    """

    whole_video = True

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, frames_BFCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_B in [-1, 0], float32 or more precise, of frames clamped to [0, 1] first."""
        frames_BFCHW = frames_BFCHW.to(torch.promote_types(torch.float32, frames_BFCHW.dtype))
        return (motion(frames_BFCHW.clamp(0, 1)) / self.floor).clamp(max=1) - 1
