"""AlignProp (Prabhudesai et al. 2023): the reward's gradient through a chain that is cut at a random step.

The cut k is drawn once a batch, the same for all videos and workers: steps before k run without a graph, the rest are
back-propagated. ``gaussian`` draws int(N(mean D, (spread D)^2)) until it lies in [1, D); ``uniform`` draws from [0, D).
"""

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.base import Batch
from rlvid.algorithms.reward_gradient import RewardGradient
from rlvid.config.methods.reward_gradient import AlignPropConfig


class AlignProp(RewardGradient):
    """Samples from pure noise; the steps from the cut on carry gradient."""

    method: AlignPropConfig

    def sample(self, batch: Batch) -> Tensor:
        """Returns clean latents of a micro-batch."""
        grid = self.context.grid
        carried = len(grid) - draw_cut(self.method, len(grid), self.context.config.seed, batch.step)
        return self.chain(batch, self.context.normal("start", batch), grid, carried)


def draw_cut(method: AlignPropConfig, steps: int, seed: int, step: int) -> int:
    """Returns the cut of training step ``step``: how many of the chain's ``steps`` carry no gradient."""
    if method.cut is not None:
        return method.cut
    generator = randomness.generator(seed, "cut", step)
    if method.truncation == "uniform":
        return int(torch.randint(steps, (), generator=generator))
    for _ in range(10_000):  # a hundred times as many as the config allows to be needed on average
        cut = int(method.mean * steps + method.spread * steps * float(torch.randn((), generator=generator)))
        if 1 <= cut < steps:
            return cut
    raise AssertionError("the config has refused a mean and a spread that give no cut")
