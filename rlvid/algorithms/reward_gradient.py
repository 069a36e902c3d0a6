"""The common part of methods that back-propagate the reward: one optimiser step per batch, and the loss 1 - reward.

The penalty is the squared distance of the network's output (eps or v) to that of the base model. It is taken at the
gradient steps of the chain, or at a random level of the whole path (``method.kl_at``).
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlvid.algorithms.base import Algorithm, Batch, Context, Update, totals
from rlvid.algorithms.denoising import base_distance
from rlvid.algorithms.scoring import plan, score_frames
from rlvid.config.methods import reward_gradient as settings
from rlvid.config.model import LOSS_SCALE
from rlvid.diffusion.chain import Step, denoise
from rlvid.diffusion.schedule import with_prefix

SHARE_EVERY = 25
"""Training steps from one measurement of the gradient that a decoder's window keeps to the next."""


@dataclass(frozen=True)
class Penalty:
    """A term of the loss beside the reward, weighed; ``name`` and ``values`` are those of its metric."""

    name: str
    loss: Tensor
    values: Tensor


class RewardGradient(Algorithm):
    """Minimises the mean over videos of 1 - reward, plus an optional penalty for distance from the base model."""

    method: settings.RewardGradient

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._penalties: list[Tensor] = []

    @abstractmethod
    def sample(self, batch: Batch) -> Tensor:
        """Returns clean latents of a micro-batch, with the method's graph."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Yields the losses of one optimiser step, accumulated over micro-batches."""
        parts = list(batch.split(self.context.config.micro_batch))
        for index, part in enumerate(parts):
            update = self.loss(part)
            yield Update(
                update.loss * (len(part) / len(batch)), index + 1 == len(parts), update.metrics, update.samples
            )

    def loss(self, batch: Batch) -> Update:
        """Returns the loss of one micro-batch on its samples."""
        with self.context.stopwatch.stage("chain"):
            latents_BCFhw = self.sample(batch)
        return self.loss_of(batch, latents_BCFhw)

    def loss_of(self, batch: Batch, latents_BCFhw: Tensor, repeat: int = 0) -> Update:
        """Returns the loss of given samples; videos on which the reward failed count as 0.

        ``repeat`` counts the samples of a video within a batch.
        """
        penalties = list(self.penalties(batch, latents_BCFhw, repeat))  # first: the reward's activations come after
        context = self.context
        chosen = plan(context, batch)
        with context.stopwatch.stage("decode"):
            recompute = context.config.train.checkpoint_activations
            decoded = context.model.decode(latents_BCFhw, chosen.frames_BS, recompute=recompute)
        scored = score_frames(context, batch, latents_BCFhw, chosen, decoded.frames)
        loss = torch.where(scored.valid_B, 1 - scored.reward_B, 0.0).mean()
        with context.stopwatch.stage("decode"):
            scale = LOSS_SCALE[context.config.model.precision]
            loss, share_N = decoded.pull_back(loss, scale=scale, measure=batch.step % SHARE_EVERY == 0)
        metrics = scored.metrics
        if share_N is not None:
            metrics |= totals(**{"decode/gradient_share": share_N})
        for penalty in penalties:
            metrics |= totals(**{penalty.name: penalty.values})
            loss = loss + penalty.loss
        return Update(loss, True, metrics, scored.samples)

    def penalties(self, batch: Batch, latents_BCFhw: Tensor, repeat: int) -> Iterator[Penalty]:
        """Yields what is added to the loss of given samples."""
        if self._penalties:
            penalty = torch.stack(self._penalties).mean()
            self._penalties.clear()
            yield Penalty("policy/kl", self.method.kl * penalty, penalty)
        if self.method.kl > 0 and self.method.kl_at == "path":
            gradient, clean = self.method.unconditional_gradient, latents_BCFhw.detach()
            distance_B = base_distance(self.context, batch, clean, "kl", repeat, unconditional_gradient=gradient)
            yield Penalty("policy/kl", self.method.kl * distance_B.mean(), distance_B)

    def chain(self, batch: Batch, latents_BCFhw: Tensor, grid: Sequence[float], gradient_steps: int) -> Tensor:
        """Runs a chain from noisy latents, of which the last steps carry gradient, with the run's cheaper prefix."""
        context, config = self.context, self.context.config
        sampling = config.sampling
        return denoise(
            context.model,
            latents_BCFhw,
            batch.text_BLD,
            with_prefix(grid, gradient_steps, sampling.prefix_steps),
            guidance=context.guidance,
            eta=config.eta,
            kernel=context.kernel,
            gradient_steps=gradient_steps,
            reuse=sampling.reuse,
            noise=lambda index: context.normal("ddim", batch, index),
            final=sampling.final_level,
            recompute=config.train.checkpoint_activations,
            unconditional_gradient=self.method.unconditional_gradient,
            observe=lambda step: self.penalise(step, batch.text_BLD),
        )

    def penalise(self, step: Step, text_BLD: Tensor) -> None:
        """Notes the distance of a gradient step's prediction to that of the base model at the same place."""
        if self.method.kl > 0 and self.method.kl_at == "steps" and step.prediction.eps.requires_grad:
            model = self.context.model
            with torch.no_grad(), model.base():
                base = model.predict(step.before.detach(), step.point, text_BLD, self.context.guidance)
            away = model.path.predicted(step.prediction) - model.path.predicted(base)
            self._penalties.append(away.square().mean())
