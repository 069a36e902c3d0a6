"""RWR, reward-weighted regression: trains on own samples, with weights that grow with the reward.

w_i = N softmax(beta r)_i over the batch, or n softmax over the n samples of each prompt; the mean weight is 1.
"""

import torch
from torch import Tensor

from rlvid.algorithms.supervised import Supervised
from rlvid.config.methods.supervised import RwrConfig
from rlvid.shapes import ROUNDING


class Rwr(Supervised):
    """Weights own samples exponentially by their rewards."""

    method: RwrConfig

    def weights(self, prompts: list[str], reward_N: Tensor, rounding: float) -> Tensor:
        """See ``Supervised.weights``."""
        groups = prompts if self.method.per_prompt else [""] * len(prompts)
        return exponential_weights(groups, reward_N, self.method.beta, rounding)


def exponential_weights(groups: list[str], reward_N: Tensor, beta: float, rounding: float = ROUNDING) -> Tensor:
    """Softmax(beta r) times n within each group of n samples; a NaN weighs 0 and does not count.

    Rewards that rounding may have put below the group's highest weigh as much as it does, whatever ``beta``.
    """
    weight_N = torch.zeros_like(reward_N)
    for group in dict.fromkeys(groups):
        inside_N = torch.tensor([g == group for g in groups]) & ~reward_N.isnan()
        if inside_N.any():
            reward_n = reward_N[inside_N].double()
            below_n = reward_n.max() - reward_n
            below_n[below_n <= rounding * reward_n.max().abs()] = 0
            weight_N[inside_N] = (torch.softmax(-beta * below_n, dim=0) * len(below_n)).to(weight_N)
    return weight_N
