"""A weighted sum of rewards that keeps the scores of its parts for the log; pessimistic where they are an ensemble.

==============  ==========================================================================
code            meaning
==============  ==========================================================================
``value``       v_i = weight_i (score_i - centre_i), of n parts
``total``       sum of v = n mean(v)
``deviation``   sqrt(mean((v_i - mean(v))^2)), the parts' disagreement
reward          n (mean(v) - k deviation); k is the pessimism (Coste et al. 2024 take mean - k variance or the minimum)
==============  ==========================================================================
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlvid.reward.video import label_of, mean_of_frames, whole_video


class MixtureReward(nn.Module):
    """sum over parts of weight x (score - centre), less pessimism x number of parts x their deviation.

    With two parts and a pessimism of 1 it is twice the smaller one.

    With a part that looks at whole videos the mixture does, too: all frames are decoded, and the others' scores are
    their means over all frames.

    Args:
        labels: names of the parts.
        parts: the rewards.
        weights: their factors.
        centres: the scores that count as 0; default: 0.
        pessimism: k; above 0 with two parts or more.

    Attributes:
        labels: names of the parts.
        label: what messages call it.
        latest: the parts' own scores in the last call, detached: (B, S), or (B,) of whole videos. Empty if it failed.
    """

    def __init__(
        self,
        labels: Sequence[str],
        parts: Sequence[nn.Module],
        weights: Sequence[float],
        centres: Sequence[float] | None = None,
        pessimism: float = 0.0,
    ) -> None:
        super().__init__()
        self.centres, self.pessimism = list(centres or [0.0] * len(parts)), pessimism
        self.labels, self.parts, self.weights = list(labels), nn.ModuleList(parts), list(weights)
        self.label = " + ".join(map(label_of, parts))
        self.whole_video = any(whole_video(part) for part in parts)
        self.latest: dict[str, Tensor] = {}

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_BS, or scores_B of whole videos."""
        self.latest = {}
        latest, values = {}, list[Tensor]()
        for label, part, weight, centre in zip(self.labels, self.parts, self.weights, self.centres, strict=True):
            scores = part(frames_BSCHW, prompts)
            if self.whole_video:
                scores = mean_of_frames(scores)
            elif scores.dim() == 1:  # one a video, beside parts with one a frame
                scores = scores[:, None].expand(frames_BSCHW.shape[:2])
            latest[label] = scores.detach()
            values.append(weight * (scores - centre if centre else scores))
        self.latest = latest
        total = sum(values, torch.zeros((), device=frames_BSCHW.device))
        return total - self.pessimism * len(values) * deviation(torch.stack(values)) if self.pessimism else total


def deviation(value_N: Tensor) -> Tensor:
    """Returns the standard deviation over the first dimension, of n and not n - 1; its gradient is 0 where it is 0."""
    # The norm's gradient is 0 at 0, and that of a square root is infinite.
    return torch.linalg.vector_norm(value_N - value_N.mean(0), dim=0) / len(value_N) ** 0.5
