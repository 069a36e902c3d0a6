"""A stochastic chain as a policy: its steps, and their probabilities then and now (DDPO, equation 4)."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context
from rlvid.algorithms.scoring import BatchRewards, score
from rlvid.config.methods.policy_gradient import PolicyGradient
from rlvid.diffusion.chain import Step, denoise, distinct
from rlvid.diffusion.step import Kernel, log_probability, reach, step_mean
from rlvid.models.noise_path import Prediction

Steps = Sequence[Collection[int]]
"""Some steps of the chain, for each video of a batch; 0 is the noisiest."""


@dataclass(frozen=True)
class Transition:
    """One random step of each video: its place in the chain, the latents and points around it, its probability.

    Points are of the noise path. ``alike_B`` is for each video the first one that has the same prompt and latents
    before the step.
    """

    index_B: Tensor
    alike_B: Tensor
    text_BLD: Tensor
    before_BCFhw: Tensor
    after_BCFhw: Tensor
    point_B: Tensor
    next_point_B: Tensor
    log_probability_B: Tensor


@dataclass(frozen=True)
class Rollout:
    """The random steps of a micro-batch that are trained on, and the clean latents at the end of its chains.

    Attributes:
        point_D: of the noise path, the whole chain's.
        states: for each video the latents (C, F, h, w), float32, before its kept steps and after them, by the index of
            the step that they are before. Neighbouring steps share a state.
        alike_TB: int64 on the CPU: for each step and video the first video with the same prompt and latents before it.
        log_probability_TB: means over the latents' elements, for T = D - 1 steps (the last one of a chain adds no
            noise); NaN where a step was deterministic.
        latents_BCFhw: the clean latents at the end.
    """

    batch: Batch
    point_D: Tensor
    states: list[dict[int, Tensor]]
    alike_TB: Tensor
    log_probability_TB: Tensor
    latents_BCFhw: Tensor

    def __len__(self) -> int:
        return len(self.log_probability_TB)

    def at(self, index_B: Tensor) -> Transition:
        """Returns the ``index_B``-th step (int64, 0 to T - 1) of each video; KeyError for one that was not kept."""
        device, places, own_B = self.latents_BCFhw.device, list(enumerate(index_B.tolist())), index_B.cpu()
        row_B = torch.arange(len(places))
        alike_B = self.alike_TB[own_B, row_B]
        alike_B = torch.where(own_B[alike_B] == own_B, alike_B, row_B)  # that video may be at another step
        index_B = index_B.to(device)
        return Transition(
            index_B,
            alike_B,
            self.batch.text_BLD,
            torch.stack([self.states[row][index] for row, index in places]),
            torch.stack([self.states[row][index + 1] for row, index in places]),
            self.point_D[index_B],
            self.point_D[index_B + 1],
            self.log_probability_TB[index_B, torch.arange(len(places), device=device)],
        )

    def split(self, size: int) -> "Iterator[Rollout]":
        """Consecutive parts of at most ``size`` videos."""
        for first, part in zip(range(0, len(self.batch), size), self.batch.split(size), strict=True):
            rows = slice(first, first + size)
            alike_TB = _first_alike(self.alike_TB[:, rows])
            yield Rollout(
                part,
                self.point_D,
                self.states[rows],
                alike_TB,
                self.log_probability_TB[:, rows],
                self.latents_BCFhw[rows],
            )


@dataclass(frozen=True)
class Replay:
    """A step of each video under the present weights: its log-probability, mean and kernel, and the prediction."""

    log_probability_B: Tensor
    mean_BCFhw: Tensor
    kernel: Kernel
    prediction: Prediction


def _first_alike(label_TB: Tensor) -> Tensor:
    """Returns for each step and video the first video with the same label: (T, B), int64."""
    return (label_TB[:, :, None] == label_TB[:, None, :]).int().argmax(2)


def alike_before(serials: Sequence[int], random: Steps | None, starts: int, steps: int) -> Tensor:
    """Returns for each step and video the first video with the same latents before it: (steps, B), int64.

    Neighbours that start from the same noise are alike until the first of them was given noise of its own.
    """
    groups = [serial // starts for serial in serials]
    if starts == 1 or random is None:
        return torch.arange(len(groups)).expand(steps, -1)
    until = {group: steps for group in groups}
    for group, own in zip(groups, random, strict=True):
        until[group] = min(until[group], *own)
    rows = [[groups.index(g) if step <= until[g] else row for row, g in enumerate(groups)] for step in range(steps)]
    return torch.tensor(rows)


def policy(context: Context) -> PolicyGradient:
    """Returns the method's settings of which steps are random."""
    assert isinstance(context.config.method, PolicyGradient)
    return context.config.method


def windows(context: Context, batch: Batch) -> list[range]:
    """Returns the random steps of each video's chain: neighbouring ones, drawn for each prompt of each batch."""
    config, group, method = context.config, context.config.train.group_size, policy(context)
    allowed, width = method.window_steps(config.sampling.steps), method.width(config.sampling.steps)
    uniform_B = randomness.uniform((), config.seed, "window", [(serial // group,) for serial in batch.serials])
    first_B = (uniform_B.double() * (len(allowed) - width + 1)).long().tolist()
    return [allowed[first : first + width] for first in first_B]


def sample(
    context: Context,
    batch: Batch,
    observe: Callable[[Step], None] | None = None,
    *,
    random: Steps | None = None,
    starts: int = 1,
) -> Tensor:
    """Returns clean latents (B, C, F, h, w) of the run's whole chain, from pure noise.

    Args:
        context: the model and the settings.
        batch: prompts and serials.
        observe: called with each step.
        random: the steps of each video that add noise; default: all but the last.
        starts: how many neighbouring serials start from the same noise.
    """
    config, start = context.config, replace(batch, serials=[serial - serial % starts for serial in batch.serials])
    grid, eta = context.grid, config.eta
    with context.stopwatch.stage("chain"):
        return denoise(
            context.model,
            context.normal("start", start),
            batch.text_BLD,
            grid,
            guidance=context.guidance,
            eta=eta if random is None else eta * torch.tensor([[i in own for own in random] for i in range(len(grid))]),
            kernel=context.kernel,
            noise=partial(context.normal, "ddim", batch),
            final=config.sampling.final_level,
            alike=alike_before(batch.serials, random, starts, len(grid)),
            observe=observe,
        )


@torch.no_grad()
def roll_out(context: Context, batch: Batch, kept: Steps | None = None) -> Rollout:
    """Samples with the run's eta, where the method's settings say that steps are random; keeps steps of the chains.

    Args:
        context: the model and the settings.
        batch: prompts and serials.
        kept: the steps of each video to keep; default: all random ones.
    """
    grid, own, method = context.grid, windows(context, batch), policy(context)
    starts, kept = context.config.videos_per_start, kept or own
    random = None if method.all_random and starts == 1 else own
    states, probability = [dict[int, Tensor]() for _ in own], list[Tensor]()

    def keep(step: Step) -> None:
        for row, steps in enumerate(kept):
            if step.index in steps or step.index - 1 in steps:
                states[row][step.index] = step.before[row].clone()
        if step.index + 1 < len(grid):
            value_B = log_probability(step.after, step.mean, step.kernel)
            random_B = step.kernel.spread.flatten() > 0
            probability.append(torch.where(value_B.isfinite() & random_B, value_B, torch.nan))

    latents = sample(context, batch, keep, random=random, starts=starts)
    alike = alike_before(batch.serials, random, starts, len(grid) - 1)
    point_D = torch.tensor(grid, device=latents.device)
    return Rollout(batch, point_D, states, alike, torch.stack(probability), latents)


def roll_out_and_score(
    context: Context, batch: Batch, kept: Callable[[Batch], Steps] | None = None
) -> tuple[list[Rollout], list[BatchRewards]]:
    """Returns the rollouts of the batch's micro-batches, and their rewards; ``kept`` gives the steps of a batch."""
    rollouts = [
        part
        for videos in batch.split(context.config.rollout_batch)
        for part in roll_out(context, videos, kept and kept(videos)).split(context.config.micro_batch)
    ]
    with torch.no_grad():
        return rollouts, [score(context, rollout.batch, rollout.latents_BCFhw) for rollout in rollouts]


def replay(context: Context, taken: Transition) -> Replay:
    """Returns a step of each video under the present weights, with gradient; videos that are alike are seen once."""
    model, before = context.model, taken.before_BCFhw
    recompute = context.config.train.checkpoint_activations
    rows, place_B = distinct(taken.alike_B)
    prediction = model.predict(
        before[rows], taken.point_B[rows], taken.text_BLD[rows], context.guidance, recompute=recompute
    ).take(place_B)
    now, then = model.path.level(taken.point_B, before), model.path.level(taken.next_point_B, before)
    kernel = context.kernel(now, then, context.config.eta)
    mean = step_mean(prediction, then, kernel)
    return Replay(log_probability(taken.after_BCFhw, mean, kernel), mean, kernel, prediction)


def reach_of_steps(context: Context) -> Tensor:
    """Returns ``step.reach`` of the chain's T = D - 1 random steps: (T,), float32."""
    path, point_D = context.model.path, torch.tensor(context.grid)
    now, then = (path.level(point_T, torch.empty(len(point_T))) for point_T in (point_D[:-1], point_D[1:]))
    return reach(path, now, then, context.kernel(now, then, context.config.eta))


def clip_range(context: Context, method: PolicyGradient) -> float:
    """Returns how far the probability ratio may move from 1.

    Log-probabilities are means over the latents' elements, so the spread of their difference falls with the square
    root of that number; a relative range is in units of it.
    """
    return (
        method.clip_range / math.prod(context.model.latent_shape) ** 0.5 if method.clip_relative else method.clip_range
    )
