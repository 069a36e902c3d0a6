"""RAFT (Dong et al. 2023), reward-ranked fine-tuning: keep the best of one's own samples and train on them.

``local`` keeps the best of each prompt's samples, ``global`` the best share of the batch. A kept sample weighs
N / kept, so the loss is the mean over what was kept, on whichever workers it lies.
"""

import torch
from torch import Tensor

from rlvid.algorithms.supervised import Supervised
from rlvid.config.methods import RaftConfig


class Raft(Supervised):
    """Weights of zero and N / kept."""

    method: RaftConfig

    def weights(self, prompts: list[str], reward_N: Tensor) -> Tensor:
        """See ``Supervised.weights``."""
        if self.method.keep == "local":
            return kept_weights(best_of_each(prompts, reward_N))
        return kept_weights(best_share(reward_N, self.method.share))


def best_of_each(prompts: list[str], reward_N: Tensor) -> Tensor:
    """Whether a sample is the best of its prompt (bool, (N,)); the first of equals, and none of a prompt of NaNs."""
    kept_N = torch.zeros(len(prompts), dtype=torch.bool)
    score_N = reward_N.nan_to_num(nan=-torch.inf)
    for prompt in dict.fromkeys(prompts):
        mine = [i for i, p in enumerate(prompts) if p == prompt]
        best = max(mine, key=lambda i: float(score_N[i]))
        kept_N[best] = bool(score_N[best] > -torch.inf)
    return kept_N


def best_share(reward_N: Tensor, share: float) -> Tensor:
    """Whether a sample is among the best int(share N) (bool, (N,)); the first of equals, never a NaN."""
    order_N = reward_N.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    kept_N = torch.zeros(len(reward_N), dtype=torch.bool)
    kept_N[order_N[: int(round(share * len(reward_N), 6))]] = True
    return kept_N & ~reward_N.isnan()


def kept_weights(kept_N: Tensor) -> Tensor:
    """N / kept where a sample is kept, else 0."""
    return kept_N.float() * (len(kept_N) / kept_N.sum().clamp_min(1))
