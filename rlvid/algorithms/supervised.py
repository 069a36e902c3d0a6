"""The common part of RWR and RAFT: sampling without gradient, then the weighted loss of pre-training on the samples."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from rlvid.algorithms.base import Algorithm, Batch, Update, totals
from rlvid.algorithms.denoising import noise_error
from rlvid.algorithms.rollout import sample
from rlvid.algorithms.scoring import BatchRewards, all_rewards, attach, score
from rlvid.config.methods import supervised as settings


class Supervised(Algorithm):
    """Samples a batch, weights it by its rewards, and takes ``inner_steps`` optimiser steps on it."""

    method: settings.Supervised

    @abstractmethod
    def weights(self, prompts: list[str], reward_N: Tensor, rounding: float) -> Tensor:
        """Returns weight_N of the global batch, with mean 1; NaN rewards, of videos that take no part, must weigh 0.

        Rewards whose relative difference is no more than ``rounding`` count as equal.
        """

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Collects, then trains; every optimiser step sees the whole batch, accumulated over micro-batches."""
        latents, scores = self.collect(batch)
        workers = self.context.workers
        prompts, rewards, rounding = all_rewards(workers, batch, scores)
        weight_N = self.weights(prompts, torch.tensor(rewards), rounding)
        rows = trained_rows(weight_N, workers.rank, workers.size)
        weight_B = weight_N[workers.rank :: workers.size].to(latents)
        yield from attach(self.train(batch.take(rows), latents[rows], weight_B[rows], len(batch)), scores)

    @torch.no_grad()
    def collect(self, batch: Batch) -> tuple[Tensor, list[BatchRewards]]:
        """Returns clean latents (B, C, F, h, w) from pure noise, and what each micro-batch was worth."""
        config = self.context.config
        latents = torch.cat([sample(self.context, part) for part in batch.split(config.rollout_batch)])
        parts = zip(batch.split(config.micro_batch), latents.split(config.micro_batch), strict=True)
        return latents, [score(self.context, part, clean) for part, clean in parts]

    def train(self, batch: Batch, clean_BCFhw: Tensor, weight_B: Tensor, share: int) -> Iterator[Update]:
        """Yields the losses of ``inner_steps`` optimiser steps; ``share`` is the worker's number of videos."""
        size = self.context.config.micro_batch
        for turn in range(self.method.inner_steps):
            for start in range(0, len(batch), size):
                stop = min(start + size, len(batch))
                part, weight_b = batch.take(range(start, stop)), weight_B[start:stop]
                error_b = self.error(part, clean_BCFhw[start:stop], turn)
                metrics = totals(**{"policy/noise_error": error_b, "policy/weight": weight_b})
                yield Update((weight_b * error_b).sum() / share, stop == len(batch), metrics)

    def error(self, batch: Batch, clean_BCFhw: Tensor, turn: int) -> Tensor:
        """See ``noise_error``; the level and the noise are new in each turn."""
        guidance = self.context.guidance if self.method.guided else 1.0
        return noise_error(self.context, batch, clean_BCFhw, "supervised", turn, guidance)


def trained_rows(weight_N: Tensor, rank: int, workers: int) -> list[int]:
    """Returns which of a worker's videos to train on: those with a weight above 0.

    All workers get the same number, filled up with videos of weight 0, for they must take part in the same number of
    backward passes.
    """
    count = max(1, *(int((weight_N[r::workers] != 0).sum()) for r in range(workers)))
    mine = weight_N[rank::workers]
    return sorted((mine == 0).int().argsort(stable=True)[:count].tolist())
