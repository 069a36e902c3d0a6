"""DRaFT (Clark et al., ICLR 2024): the reward's gradient through the last steps of the whole chain.

``Draft`` is DRaFT-K: from pure noise, all but the last K steps without a graph. ``DraftLV`` adds fresh noise to the
finished sample n times, at the level of the last step or of ``method.start``, and averages the gradient of the n
one-step predictions.
"""

from collections.abc import Iterator

from torch import Tensor

from rlvid.algorithms.base import Batch, Update
from rlvid.algorithms.reward_gradient import RewardGradient
from rlvid.config.methods.reward_gradient import DraftConfig, DraftLVConfig
from rlvid.diffusion.schedule import learning_points


class Draft(RewardGradient):
    """DRaFT-K; K = D back-propagates through the whole chain."""

    method: DraftConfig

    def sample(self, batch: Batch) -> Tensor:
        """Samples from pure noise, of which the last K steps carry gradient."""
        grid = self.context.grid
        last = self.method.gradient_steps or len(grid)
        return self.chain(batch, self.context.normal("start", batch), grid, last)


class DraftLV(RewardGradient):
    """DRaFT-LV: x_1 = alpha_1 x0 + sigma_1 z for n noises z, x0 held fixed; level 1 is the last step's or ``start``."""

    method: DraftLVConfig

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Yields the losses of one optimiser step; each micro-batch is sampled once and gives n losses."""
        repeats = self.method.repeats
        parts = list(batch.split(self.context.config.micro_batch))
        for index, part in enumerate(parts):
            with self.context.stopwatch.stage("chain"):
                clean = self.sample(part)
            for repeat in range(repeats):
                with self.context.stopwatch.stage("chain"):
                    samples_BCFhw = self.once_more(part, clean, repeat)
                update = self.loss_of(part, samples_BCFhw, repeat)
                last = index + 1 == len(parts) and repeat + 1 == repeats
                loss = update.loss * (len(part) / len(batch) / repeats)
                yield Update(loss, last, update.metrics, update.samples if repeat == 0 else None)

    def sample(self, batch: Batch) -> Tensor:
        """Samples from pure noise, without a graph."""
        grid = self.context.grid
        return self.chain(batch, self.context.normal("start", batch), grid, 0)

    def once_more(self, batch: Batch, clean_BCFhw: Tensor, repeat: int) -> Tensor:
        """Returns the finished samples, noised to the level and brought back by one step with gradient."""
        model, noise = self.context.model, self.context.normal("low-variance", batch, repeat)
        level = learning_points(self.method, model.path, self.context.grid)
        return self.chain(batch, model.add_noise(clean_BCFhw, noise, level[0]), level, 1)
