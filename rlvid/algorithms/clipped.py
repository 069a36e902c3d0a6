"""PPO's clipped objective on the random steps of a chain: what DDPO and GRPO share.

==============  ===============================================================================
code            meaning
==============  ===============================================================================
``ratio_B``     rho = p_theta(x' | x, c) / p_old, from log-probabilities that are means over elements
``clipped``     max(-A rho, -A clip(rho, 1 - range, 1 + range)) (Schulman et al. 2017, equation 7)
==============  ===============================================================================
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlvid.algorithms.base import Algorithm, Batch, Update, totals
from rlvid.algorithms.rollout import Replay, Rollout, Transition, clip_range, replay
from rlvid.algorithms.scoring import BatchRewards, all_rewards, attach
from rlvid.config.methods.policy_gradient import ClippedPolicy

Metrics = dict[str, tuple[float, float]]


class ClippedObjective(Algorithm):
    """Rolls out, turns rewards into advantages, then takes ``inner_epochs`` optimiser steps on steps of the chains."""

    method: ClippedPolicy

    @abstractmethod
    def collect(self, batch: Batch) -> tuple[list[Rollout], list[BatchRewards]]:
        """Returns the rollouts of the batch's micro-batches, which hold the steps of ``order``, and their rewards."""

    @abstractmethod
    def order(self, batch: Batch, epoch: int) -> Tensor:
        """Returns the steps of each video that an inner epoch trains on, in their order: (turns, B), int64."""

    @abstractmethod
    def standardise(self, prompts: list[str], rewards: list[float], rounding: float) -> Tensor:
        """Returns advantage_N of all workers' videos, 0 where a reward is NaN; rewards equal up to ``rounding`` tie."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Accumulates over steps of the chain and micro-batches; one optimiser step an inner epoch."""
        rollouts, scores = self.collect(batch)
        advantages = self.advantages(batch, scores).split([len(r.batch) for r in rollouts])
        yield from attach(self.train(rollouts, advantages, len(batch)), scores)

    def train(self, rollouts: list[Rollout], advantages: Sequence[Tensor], share: int) -> Iterator[Update]:
        """Yields the losses of ``inner_epochs`` optimiser steps; ``share`` is how many videos the worker made."""
        for epoch in range(self.method.inner_epochs):
            for place, (rollout, advantage_B) in enumerate(zip(rollouts, advantages, strict=True)):
                order_TB = self.order(rollout.batch, epoch)
                for turn, index_B in enumerate(order_TB):
                    loss, metrics = self.loss(rollout, advantage_B, index_B)
                    if epoch == 0:  # before any step is taken, the ratio differs from 1 by rounding alone
                        metrics["policy/first_ratio_error"] = metrics["policy/ratio_error"]
                    last = place + 1 == len(rollouts) and turn + 1 == len(order_TB)
                    yield Update(loss * (len(rollout.batch) / share / len(order_TB)), last, metrics)

    def advantages(self, batch: Batch, scores: list[BatchRewards]) -> Tensor:
        """Returns advantage_B of this worker's videos, from the rewards of all workers' videos."""
        workers = self.context.workers
        advantage_N = self.standardise(*all_rewards(workers, batch, scores))
        return advantage_N[workers.rank :: workers.size].to(scores[0].reward_B)

    def loss(self, rollout: Rollout, advantage_B: Tensor, index_B: Tensor) -> tuple[Tensor, Metrics]:
        """Returns the objective of one step of each video."""
        taken = rollout.at(index_B)
        with self.context.stopwatch.stage("replay"):
            now = replay(self.context, taken)
        log_ratio_B = now.log_probability_B - taken.log_probability_B
        ratio_B, reach = log_ratio_B.exp(), clip_range(self.context, self.method)
        metrics = totals(
            **{
                "policy/approx_kl": 0.5 * log_ratio_B.square(),
                "policy/clip_fraction": ((ratio_B - 1).abs() > reach).float(),
                "policy/ratio_error": (ratio_B - 1).abs(),
                "policy/advantage": advantage_B.abs(),
            }
        )
        return self.objective(clipped(advantage_B, ratio_B, reach), taken, now, metrics), metrics

    def objective(self, loss_B: Tensor, taken: Transition, now: Replay, metrics: Metrics) -> Tensor:
        """Returns the loss of a step from the clipped one of each video; may add to ``metrics``."""
        return loss_B.mean()


def clipped(advantage_B: Tensor, ratio_B: Tensor, reach: float) -> Tensor:
    """Returns max(-A rho, -A clip(rho, 1 - reach, 1 + reach)): (B,)."""
    return torch.maximum(-advantage_B * ratio_B, -advantage_B * ratio_B.clamp(1 - reach, 1 + reach))
