"""DDPO (Black et al., ICLR 2024): the chain as a policy, trained with PPO's clipped objective.

==============  ===============================================================================
code            paper
==============  ===============================================================================
``ratio_B``     rho = p_theta(x_{t-1} | x_t, c) / p_old, from mean log-probabilities
``loss``        mean of max(-A rho, -A clip(rho, 1 - range, 1 + range)) over videos and steps
==============  ===============================================================================
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.advantages import PromptStatistics
from rlvid.algorithms.base import Algorithm, Batch, Context, Update, totals
from rlvid.algorithms.rollout import Rollout, clip_range, replay, roll_out_and_score
from rlvid.algorithms.scoring import BatchRewards, all_rewards, attach
from rlvid.config.methods import DdpoConfig


class Ddpo(Algorithm):
    """Rolls out, turns rewards into per-prompt advantages, then takes ``inner_epochs`` optimiser steps."""

    method: DdpoConfig

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.statistics = PromptStatistics(self.method.buffer, self.method.min_count)

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Accumulates over timesteps and micro-batches; one optimiser step an inner epoch."""
        rollouts, scores = roll_out_and_score(self.context, batch)
        advantages = self.advantages(batch, scores).split([len(r.batch) for r in rollouts])
        yield from attach(self.train(rollouts, advantages, len(batch)), scores)

    def train(self, rollouts: list[Rollout], advantages: Sequence[Tensor], share: int) -> Iterator[Update]:
        """Yields the losses of ``inner_epochs`` optimiser steps; ``share`` is how many videos the worker made."""
        steps = len(rollouts[0])
        trained = max(1, round(self.method.timestep_fraction * steps))
        for epoch in range(self.method.inner_epochs):
            for place, (rollout, advantage_B) in enumerate(zip(rollouts, advantages, strict=True)):
                order_TB = self.order(rollout.batch, steps, epoch)
                for turn in range(trained):
                    loss, metrics = self.loss(rollout, advantage_B, order_TB[turn])
                    if epoch == 0:  # before any step is taken, the ratio differs from 1 by rounding alone
                        metrics["policy/first_ratio_error"] = metrics["policy/ratio_error"]
                    last = place + 1 == len(rollouts) and turn + 1 == trained
                    yield Update(loss * (len(rollout.batch) / share / trained), last, metrics)

    def advantages(self, batch: Batch, scores: list[BatchRewards]) -> Tensor:
        """Returns advantage_B of this worker's videos, from the rewards of all workers' videos."""
        workers = self.context.workers
        prompts, rewards, rounding = all_rewards(workers, batch, scores)
        advantage_N = self.statistics.advantages(prompts, rewards, self.method.advantage_clip, rounding)
        return advantage_N[workers.rank :: workers.size].to(scores[0].reward_B)

    def order(self, batch: Batch, steps: int, epoch: int) -> Tensor:
        """Returns each video's steps in an order of its own, (T, B)."""
        seed = self.context.config.seed
        orders = [randomness.permutation(steps, seed, "timesteps", serial, epoch) for serial in batch.serials]
        return torch.stack(orders, dim=1).to(batch.text_BLD.device)

    def loss(self, rollout: Rollout, advantage_B: Tensor, index_B: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Returns the clipped objective of one step of each video."""
        taken = rollout.at(index_B)
        with self.context.stopwatch.stage("replay"):
            now_B, _ = replay(self.context, taken)
        ratio_B, reach = (now_B - taken.log_probability_B).exp(), clip_range(self.context, self.method)
        clipped_B = ratio_B.clamp(1 - reach, 1 + reach)
        loss = torch.maximum(-advantage_B * ratio_B, -advantage_B * clipped_B).mean()
        metrics = {
            "policy/approx_kl": 0.5 * (now_B - taken.log_probability_B).square(),
            "policy/clip_fraction": ((ratio_B - 1).abs() > reach).float(),
            "policy/ratio_error": (ratio_B - 1).abs(),
            "policy/advantage": advantage_B.abs(),
        }
        return loss, totals(**metrics)

    def state_dict(self) -> dict[str, Any]:
        """Per-prompt rewards."""
        return {"rewards": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the per-prompt rewards."""
        self.statistics.load_state_dict(state["rewards"])
