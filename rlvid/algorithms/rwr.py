"""RWR, reward-weighted regression: train on one's own samples with weights that grow with the reward.

w_i = N softmax(beta r)_i over the batch, or n softmax over the n samples of each prompt; the mean weight is 1.
"""

import torch
from torch import Tensor

from rlvid.algorithms.supervised import Supervised
from rlvid.config.methods import RwrConfig


class Rwr(Supervised):
    """Exponential weights."""

    method: RwrConfig

    def weights(self, prompts: list[str], reward_N: Tensor) -> Tensor:
        """See ``Supervised.weights``."""
        return exponential_weights(
            prompts if self.method.per_prompt else [""] * len(prompts), reward_N, self.method.beta
        )


def exponential_weights(groups: list[str], reward_N: Tensor, beta: float) -> Tensor:
    """Softmax(beta r) times n within each group of n samples; a NaN weighs 0 and does not count."""
    weight_N = torch.zeros_like(reward_N)
    for group in dict.fromkeys(groups):
        inside_N = torch.tensor([g == group for g in groups]) & ~reward_N.isnan()
        weight_N[inside_N] = torch.softmax(beta * reward_N[inside_N], dim=0) * inside_N.sum()
    return weight_N
