"""GRPO on diffusion chains (Flow-GRPO, Liu et al. 2025; DanceGRPO, Xue et al. 2025), with a window of random steps.

==================  =========================================================================
code                meaning
==================  =========================================================================
``advantage_N``     (r - mean of the prompt's videos) / (deviation + 1e-6), theirs or the batch's (``method.deviation``)
``window``          steps that are random and trained on, the rest is deterministic (MixGRPO, Li et al. 2025);
                    one step, the same for all videos of a prompt, is Flash-GRPO
``weight_B``        1 / |d mean / d output| in units of the step's noise, with mean 1 over the steps that windows lie in
``distance_B``      KL(p_theta || p_base) = |mean - mean_base|^2 / (2 spread^2), a mean over elements
==================  =========================================================================
"""

import torch
from torch import Tensor

from rlvid.algorithms.advantages import group_advantages
from rlvid.algorithms.base import Batch, totals
from rlvid.algorithms.clipped import ClippedObjective, Metrics
from rlvid.algorithms.rollout import Replay, Rollout, Transition, reach_of_steps, replay, roll_out_and_score, windows
from rlvid.algorithms.scoring import BatchRewards
from rlvid.config.methods.policy_gradient import GrpoConfig


class Grpo(ClippedObjective):
    """The videos of one prompt are compared with each other; a window of each chain's steps is random."""

    method: GrpoConfig

    def collect(self, batch: Batch) -> tuple[list[Rollout], list[BatchRewards]]:
        """See ``ClippedObjective.collect``."""
        return roll_out_and_score(self.context, batch)

    def order(self, batch: Batch, epoch: int) -> Tensor:
        """See ``ClippedObjective.order``."""
        return torch.tensor([list(steps) for steps in windows(self.context, batch)]).T

    def standardise(self, prompts: list[str], rewards: list[float], rounding: float) -> Tensor:
        """See ``ClippedObjective.standardise``."""
        group, method = self.context.config.train.group_size, self.method
        return group_advantages(rewards, group, method.advantage_clip, method.deviation, rounding)

    def objective(self, loss_B: Tensor, taken: Transition, now: Replay, metrics: Metrics) -> Tensor:
        """See ``ClippedObjective.objective``."""
        if self.method.step_weight == "inverse":
            loss_B = loss_B * self.weights(taken)
        if self.method.kl > 0:
            with torch.no_grad(), self.context.stopwatch.stage("replay"), self.context.model.base():
                base = replay(self.context, taken)
            away = (now.mean_BCFhw - base.mean_BCFhw) / now.kernel.spread
            distance_B = 0.5 * away.square().flatten(1).mean(1)
            metrics |= totals(**{"policy/kl": distance_B})
            loss_B = loss_B + self.method.kl * distance_B
        return loss_B.mean()

    def weights(self, taken: Transition) -> Tensor:
        """Returns weight_B of the steps: the inverse of their reach, with mean 1 over the steps of windows."""
        allowed = self.method.window_steps(self.context.config.sampling.steps)
        inverse_T = 1 / reach_of_steps(self.context)
        return (inverse_T / inverse_T[list(allowed)].mean()).to(taken.before_BCFhw)[taken.index_B]
