"""Grades clips of the built-in world against their prompts, by what the oracle reads: the world's gold reward."""

import math

import torch
from torch import Tensor, nn

from rlvid.world.captions import read_caption
from rlvid.world.oracle import read


def grade(frames_BFCHW: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Grades B clips against their prompts.

    Args:
        frames_BFCHW: as for ``rlvid.world.oracle.read``.
        prompts: B captions of the built-in world.

    Returns:
        Float32 tensors (B,): ``subject``, ``colour``, ``background``, ``motion`` (1 right, 0 wrong); ``sharpness`` and
        ``fidelity`` in [0, 1], see ``Reading``, whatever the prompt; and ``score`` in [0, 1], the gold reward: the
        mean of the four hits times the fidelity, so that neither pays without the other. Hits and score are NaN
        where ``read_caption`` cannot read the prompt.

    Raises:
        ValueError: as ``read``, or a number of prompts other than B.
    """
    if len(prompts) != len(frames_BFCHW):
        raise ValueError(f"prompts: expected one for each of {len(frames_BFCHW)} clips, got {len(prompts)}")
    reading = read(frames_BFCHW)
    pairs = list(zip(map(read_caption, prompts), reading.labels, strict=True))
    grades = {
        name: torch.tensor([math.nan if w is None else float(getattr(w, name) == getattr(r, name)) for w, r in pairs])
        for name in ("subject", "colour", "background", "motion")
    }
    score_B = torch.stack(list(grades.values())).mean(0) * reading.fidelity_B
    return grades | {"sharpness": reading.sharpness_B, "fidelity": reading.fidelity_B, "score": score_B}


class OracleReward(nn.Module):
    """``grade``'s score as a reward of whole videos: (B, F, 3, H, W) in [0, 1] to (B,), without gradient.

    NaN, which leaves a video out, where the oracle cannot read the prompt.
    """

    whole_video = True

    def forward(self, frames_BFCHW: Tensor, prompts: list[str]) -> Tensor:
        """score_B on the device of the frames."""
        return grade(frames_BFCHW.clamp(0, 1), prompts)["score"].to(frames_BFCHW.device)
