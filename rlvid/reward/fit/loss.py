"""Losses of a reward that is fitted to preferences.

=================  ============================================================================================
code               meaning
=================  ============================================================================================
``difference``     d = s_a - s_b, the difference of the scores of a pair
``preference``     p, the probability that ``a`` is preferred: 1, 0, 0.5 for a tie, or a mean over votes
loss               -p log sigma(d) - (1 - p) log sigma(-d) (Bradley and Terry 1952, with soft labels)
=================  ============================================================================================

With p = 1 this is HPSv2's objective, the cross entropy of a softmax over the two scores (Wu et al. 2023, section 4.1).
The minimum lies at d = log(p / (1 - p)).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def preference_loss(difference_PA: Tensor, preference_PA: Tensor) -> Tensor:
    """Returns the loss of each pair and axis: (P, A); 0 without a gradient where an axis was not asked.

    Args:
        difference_PA: d.
        preference_PA: p in [0, 1]; NaN where nobody was asked.
    """
    asked_PA = ~preference_PA.isnan()
    difference_PA = torch.where(asked_PA, difference_PA, 0.0)
    target_PA = torch.where(asked_PA, preference_PA, 0.5).to(difference_PA)
    loss_PA = F.binary_cross_entropy_with_logits(difference_PA, target_PA, reduction="none")
    return torch.where(asked_PA, loss_PA, 0.0)


def contrastive_loss(logits_NN: Tensor, prompt_N: Tensor) -> Tensor:
    """Returns CLIP's loss of each item: (N,), the mean of its two cross entropies (Radford et al. 2021, figure 3).

    Args:
        logits_NN: scaled cosines of image i and text j; item i fits text i.
        prompt_N: equal numbers mark equal prompts, which are no negatives of each other.
    """
    same_NN = prompt_N[:, None] == prompt_N[None, :]
    other_NN = same_NN & ~torch.eye(len(prompt_N), dtype=torch.bool, device=same_NN.device)
    logits_NN = logits_NN.masked_fill(other_NN, -torch.inf)
    target_N = torch.arange(len(prompt_N), device=logits_NN.device)
    both = (F.cross_entropy(each, target_N, reduction="none") for each in (logits_NN, logits_NN.T))
    return sum(both, torch.zeros(len(prompt_N)).to(logits_NN)) / 2
