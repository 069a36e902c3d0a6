"""A stochastic DDIM chain as a policy: what it did, how probable that was, and how probable it is now (DDPO, eq. 4)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlvid.algorithms.base import Batch, Context
from rlvid.config.methods import PolicyGradient
from rlvid.diffusion.chain import Step, denoise
from rlvid.diffusion.ddim import log_probability, sigma, step_mean
from rlvid.diffusion.schedule import timesteps
from rlvid.models.base import Prediction


@dataclass(frozen=True)
class Rollout:
    """The T = D - 1 random steps of a micro-batch (the last step of a chain adds no noise), and where they led.

    ``before_TBCFhw`` and ``after_TBCFhw`` are the latents of each step, ``log_probability_TB`` is the mean over their
    elements, ``latents_BCFhw`` the clean ones at the end.
    """

    batch: Batch
    before_TBCFhw: Tensor
    after_TBCFhw: Tensor
    log_probability_TB: Tensor
    latents_BCFhw: Tensor

    def __len__(self) -> int:
        return len(self.before_TBCFhw)


@torch.no_grad()
def roll_out(context: Context, batch: Batch) -> Rollout:
    """Samples from pure noise with the run's eta, and keeps every random step."""
    config, taken = context.config, []

    def keep(step: Step) -> None:
        if step.index + 1 < config.sampling.steps:
            taken.append((step.before, step.after, log_probability(step.after, step.mean, step.spread)))

    with context.stopwatch.stage("chain"):
        latents = denoise(
            context.model,
            context.normal("start", batch),
            batch.text_BLD,
            timesteps(config.sampling.steps),
            guidance=config.sampling.guidance,
            eta=config.eta,
            noise=lambda index: context.normal("ddim", batch, index),
            final=config.sampling.final,
            observe=keep,
        )
    before, after, probability = (torch.stack(each) for each in zip(*taken, strict=True))
    return Rollout(batch, before, after, probability, latents)


def replay(context: Context, rollout: Rollout, index_B: Tensor) -> tuple[Tensor, Prediction]:
    """How probable one step of each video is under the present weights, with gradient.

    Args:
        context: of the method.
        rollout: of a micro-batch.
        index_B: int64, which of its T steps to take for each video.

    Returns:
        log_probability_B, and the guided prediction that it comes from.
    """
    config, model = context.config, context.model
    grid = torch.tensor(timesteps(config.sampling.steps), device=index_B.device)
    row_B = torch.arange(len(index_B), device=index_B.device)
    before, after = rollout.before_TBCFhw[index_B, row_B], rollout.after_TBCFhw[index_B, row_B]

    def predict() -> Prediction:
        return model.predict(before, grid[index_B], rollout.batch.text_BLD, config.sampling.guidance)

    prediction = recomputed(context, predict)
    abar, abar_prev = model.abar_at(grid[index_B], before), model.abar_at(grid[index_B + 1], before)
    spread = sigma(abar, abar_prev, config.eta)
    return log_probability(after, step_mean(prediction, abar_prev, spread), spread), prediction


def recomputed(context: Context, predict: Callable[[], Prediction]) -> Prediction:
    """``predict()``, under activation checkpointing where the run asks for it."""
    if context.config.train.checkpoint_activations:
        return checkpoint(predict, use_reentrant=False, preserve_rng_state=False)
    return predict()


def clip_range(context: Context, method: PolicyGradient) -> float:
    """How far the probability ratio may move from 1.

    Log-probabilities are means over the latents' elements, so the spread of their difference falls with the square
    root of that number; a relative range is in units of it.
    """
    return (
        method.clip_range / math.prod(context.model.latent_shape) ** 0.5 if method.clip_relative else method.clip_range
    )
