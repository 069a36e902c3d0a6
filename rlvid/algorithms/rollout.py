"""A stochastic DDIM chain as a policy: its steps, and their probabilities then and now (DDPO, equation 4)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlvid.algorithms.base import Batch, Context
from rlvid.algorithms.scoring import BatchRewards, score
from rlvid.config.methods import PolicyGradient
from rlvid.diffusion.chain import Step, denoise
from rlvid.diffusion.ddim import log_probability, sigma, step_mean
from rlvid.diffusion.schedule import timesteps
from rlvid.models.base import Prediction


@dataclass(frozen=True)
class Transition:
    """One random step of each video: the latents before and after it, its timestep, its log-probability."""

    text_BLD: Tensor
    before_BCFhw: Tensor
    after_BCFhw: Tensor
    timestep_B: Tensor
    next_timestep_B: Tensor
    log_probability_B: Tensor


@dataclass(frozen=True)
class Rollout:
    """The T = D - 1 random steps of a micro-batch (the last step of a chain adds no noise), and where they led.

    ``before_TBCFhw`` and ``after_TBCFhw`` are the latents of each step, ``log_probability_TB`` is the mean over their
    elements, ``latents_BCFhw`` the clean ones at the end; ``timestep_D`` is the whole chain's.
    """

    batch: Batch
    timestep_D: Tensor
    before_TBCFhw: Tensor
    after_TBCFhw: Tensor
    log_probability_TB: Tensor
    latents_BCFhw: Tensor

    def __len__(self) -> int:
        return len(self.before_TBCFhw)

    def at(self, index_B: Tensor) -> Transition:
        """Returns the ``index_B``-th step (int64, 0 to T - 1) of each video."""
        row_B = torch.arange(len(index_B), device=index_B.device)
        return Transition(
            self.batch.text_BLD,
            self.before_TBCFhw[index_B, row_B],
            self.after_TBCFhw[index_B, row_B],
            self.timestep_D[index_B],
            self.timestep_D[index_B + 1],
            self.log_probability_TB[index_B, row_B],
        )


def sample(context: Context, batch: Batch, observe: Callable[[Step], None] | None = None) -> Tensor:
    """Returns clean latents (B, C, F, h, w) of the run's whole chain, from pure noise."""
    config = context.config
    with context.stopwatch.stage("chain"):
        return denoise(
            context.model,
            context.normal("start", batch),
            batch.text_BLD,
            timesteps(config.sampling.steps),
            guidance=config.sampling.guidance,
            eta=config.eta,
            noise=partial(context.normal, "ddim", batch),
            final=config.sampling.final_level,
            observe=observe,
        )


@torch.no_grad()
def roll_out(context: Context, batch: Batch) -> Rollout:
    """Samples with the run's eta and keeps every random step."""
    grid, taken = timesteps(context.config.sampling.steps), []

    def keep(step: Step) -> None:
        if step.index + 1 < len(grid):
            taken.append((step.before, step.after, log_probability(step.after, step.mean, step.spread)))

    latents = sample(context, batch, keep)
    before, after, probability = (torch.stack(each) for each in zip(*taken, strict=True))
    return Rollout(batch, torch.tensor(grid, device=latents.device), before, after, probability, latents)


@torch.no_grad()
def roll_out_and_score(context: Context, batch: Batch) -> tuple[list[Rollout], list[BatchRewards]]:
    """Returns the rollouts of the batch's micro-batches, and their rewards."""
    rollouts = [roll_out(context, part) for part in batch.split(context.config.micro_batch)]
    return rollouts, [score(context, rollout.batch, rollout.latents_BCFhw) for rollout in rollouts]


def replay(context: Context, taken: Transition) -> tuple[Tensor, Prediction]:
    """Computes the log-probability of a step of each video under the present weights, with gradient.

    Returns:
        log_probability_B, and the guided prediction that it comes from.
    """
    model, before, guidance = context.model, taken.before_BCFhw, context.config.sampling.guidance
    recompute = context.config.train.checkpoint_activations
    prediction = model.predict(before, taken.timestep_B, taken.text_BLD, guidance, recompute=recompute)
    abar, abar_prev = model.abar_at(taken.timestep_B, before), model.abar_at(taken.next_timestep_B, before)
    spread = sigma(abar, abar_prev, context.config.eta)
    return log_probability(taken.after_BCFhw, step_mean(prediction, abar_prev, spread), spread), prediction


def clip_range(context: Context, method: PolicyGradient) -> float:
    """Returns how far the probability ratio may move from 1.

    Log-probabilities are means over the latents' elements, so the spread of their difference falls with the square
    root of that number; a relative range is in units of it.
    """
    return (
        method.clip_range / math.prod(context.model.latent_shape) ** 0.5 if method.clip_relative else method.clip_range
    )
