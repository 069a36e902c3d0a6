"""RAFT (Dong et al. 2023), reward-ranked fine-tuning: keeps the best of the own samples and trains on them.

``local`` keeps the best of each prompt's samples, ``global`` the best share of the batch. A kept sample weighs
N / kept, so the loss is the mean over what was kept, on whichever workers it lies.
"""

import torch
from torch import Tensor

from rlvid.algorithms.supervised import Supervised
from rlvid.config.methods.supervised import RaftConfig
from rlvid.shapes import ROUNDING


class Raft(Supervised):
    """Weights kept samples with N / kept, all others with 0."""

    method: RaftConfig

    def weights(self, prompts: list[str], reward_N: Tensor, rounding: float) -> Tensor:
        """See ``Supervised.weights``."""
        if self.method.keep == "local":
            return kept_weights(best_of_each(prompts, reward_N, rounding))
        return kept_weights(best_share(reward_N, self.method.share, rounding))


def best_of_each(prompts: list[str], reward_N: Tensor, rounding: float = ROUNDING) -> Tensor:
    """Returns whether a sample is its prompt's best (bool, (N,)); the first of equals, none of a prompt of NaNs."""
    kept_N = torch.zeros(len(prompts), dtype=torch.bool)
    for prompt in dict.fromkeys(prompts):
        mine = torch.tensor([i for i, p in enumerate(prompts) if p == prompt])
        kept_N[mine] = highest(reward_N[mine], 1, rounding)
    return kept_N


def best_share(reward_N: Tensor, share: float, rounding: float = ROUNDING) -> Tensor:
    """Returns whether a sample is among the best int(share N) (bool, (N,)); the first of equals, never a NaN."""
    return highest(reward_N, int(round(share * len(reward_N), 6)), rounding)


def highest(reward_N: Tensor, count: int, rounding: float) -> Tensor:
    """Returns whether a reward is among the ``count`` highest that are no NaN: (N,), bool.

    All that rounding may have put above or below the last one that is kept are its equals, of which the first are
    kept; else the number of workers, or the micro-batches, would decide.
    """
    score_N = reward_N.double().nan_to_num(nan=-torch.inf)
    count = min(count, int((score_N > -torch.inf).sum()))
    if count == 0:
        return torch.zeros_like(score_N, dtype=torch.bool)
    last = score_N.sort(descending=True).values[count - 1]
    equal_N = (score_N - last).abs() <= rounding * last.abs()
    above_N = (score_N > last) & ~equal_N
    return above_N | (equal_N & (equal_N.cumsum(0) <= count - above_N.sum()))


def kept_weights(kept_N: Tensor) -> Tensor:
    """Returns N / kept where a sample is kept, else 0."""
    return kept_N.float() * (len(kept_N) / kept_N.sum().clamp_min(1))
