"""Segmental Video Reward, SegVR (InstructVideo, section 3.3): one random frame represents each segment.

A reward of whole videos that was fitted to a few frames looks at the middle one of each segment.
"""

import torch
from torch import Tensor


def choose_frames(uniform_BS: Tensor, frames: int) -> Tensor:
    """Returns the indices of the scored frames.

    Args:
        uniform_BS: draws in [0, 1), one for each video and segment.
        frames: F; a segment has F // S frames, and a remainder at the end is never drawn, as in the paper's code.

    Returns:
        frames_BS: int64, ascending in each row.

    Raises:
        ValueError: more segments than frames.
    """
    segments = uniform_BS.shape[1]
    length = frames // segments
    if length < 1:
        raise ValueError(f"reward.segments = {segments} exceeds the {frames} frames of a video; allowed: 1 to {frames}")
    offset_BS = (uniform_BS * length).long().clamp_max(length - 1)
    return torch.arange(segments, device=uniform_BS.device) * length + offset_BS


def middle_frames(frames: int, count: int) -> list[int]:
    """Returns the index of the frame in the middle of each of ``count`` equal segments, from end to end.

    A video of fewer frames repeats some, as ``rlvid.data.videos.read_video`` does.

    Args:
        frames: F.
        count: of segments.
    """
    return [(2 * place + 1) * frames // (2 * count) for place in range(count)]
