"""A weighted sum of rewards that keeps the scores of its parts for the log."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlvid.reward.video import label_of, mean_of_frames, whole_video


class MixtureReward(nn.Module):
    """sum over parts of weight x score.

    With a part that looks at whole videos the mixture does, too: all frames are decoded, and the others' scores are
    their means over all frames.

    Args:
        labels: names of the parts.
        parts: the rewards.
        weights: their factors.

    Attributes:
        labels: names of the parts.
        label: what messages call it.
        latest: the parts' own scores in the last call, detached: (B, S), or (B,) of whole videos. Empty if it failed.
    """

    def __init__(self, labels: Sequence[str], parts: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.labels, self.parts, self.weights = list(labels), nn.ModuleList(parts), list(weights)
        self.label = " + ".join(map(label_of, parts))
        self.whole_video = any(whole_video(part) for part in parts)
        self.latest: dict[str, Tensor] = {}

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_BS, or scores_B of whole videos."""
        self.latest = {}
        latest, total = {}, torch.zeros((), device=frames_BSCHW.device)
        for label, part, weight in zip(self.labels, self.parts, self.weights, strict=True):
            scores = part(frames_BSCHW, prompts)
            if self.whole_video:
                scores = mean_of_frames(scores)
            elif scores.dim() == 1:  # one a video, beside parts with one a frame
                scores = scores[:, None].expand(frames_BSCHW.shape[:2])
            latest[label] = scores.detach()
            total = total + weight * scores
        self.latest = latest
        return total
