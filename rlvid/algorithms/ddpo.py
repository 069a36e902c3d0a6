"""DDPO (Black et al., ICLR 2024): the chain as a policy, trained with PPO's clipped objective.

Advantages come from each prompt's latest rewards (``rlvid/algorithms/advantages.py``), the objective from
``rlvid/algorithms/clipped.py``; a rollout is trained on at a share of its steps, in an order of each video's own.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.advantages import PromptStatistics
from rlvid.algorithms.base import Batch, Context
from rlvid.algorithms.clipped import ClippedObjective
from rlvid.algorithms.rollout import Rollout, Steps, roll_out_and_score, windows
from rlvid.algorithms.scoring import BatchRewards
from rlvid.config.methods.policy_gradient import DdpoConfig


class Ddpo(ClippedObjective):
    """A share of a chain's random steps, drawn anew for each inner epoch, is trained on."""

    method: DdpoConfig

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.statistics = PromptStatistics(self.method.buffer, self.method.min_count)

    def collect(self, batch: Batch) -> tuple[list[Rollout], list[BatchRewards]]:
        """See ``ClippedObjective.collect``."""
        return roll_out_and_score(self.context, batch, self.trained)

    def trained(self, batch: Batch) -> Steps:
        """Returns the steps of each video that any inner epoch trains on."""
        orders = [self.order(batch, epoch) for epoch in range(self.method.inner_epochs)]
        return [set(own) for own in torch.cat(orders).T.tolist()]

    def order(self, batch: Batch, epoch: int) -> Tensor:
        """See ``ClippedObjective.order``."""
        steps, seed = self.context.config.sampling.steps, self.context.config.seed
        order = partial(randomness.permutation, self.method.width(steps), seed, "timesteps")
        orders = torch.stack([order(serial, epoch) for serial in batch.serials], dim=1)
        first_B = torch.tensor([own[0] for own in windows(self.context, batch)])
        return first_B + orders[: self.method.trained_steps(steps)]

    def standardise(self, prompts: list[str], rewards: list[float], rounding: float) -> Tensor:
        """See ``ClippedObjective.standardise``."""
        return self.statistics.advantages(prompts, rewards, self.method.advantage_clip, rounding)

    def state_dict(self) -> dict[str, Any]:
        """Per-prompt rewards."""
        return {"rewards": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the per-prompt rewards."""
        self.statistics.load_state_dict(state["rewards"])
