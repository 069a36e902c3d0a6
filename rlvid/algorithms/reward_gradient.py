"""The common part of methods that back-propagate the reward: one optimiser step per batch, and the loss 1 - reward."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from rlvid.algorithms.base import Algorithm, Batch, Context, Update, totals
from rlvid.algorithms.scoring import score
from rlvid.config import methods as settings
from rlvid.diffusion.chain import Step, denoise


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

    def loss_of(self, batch: Batch, latents_BCFhw: Tensor) -> Update:
        """Returns the loss of given samples; videos on which the reward failed count as 0."""
        scored = score(self.context, batch, latents_BCFhw)
        loss = torch.where(scored.valid_B, 1 - scored.reward_B, 0.0).mean()
        metrics = scored.metrics
        if self._penalties:
            penalty = torch.stack(self._penalties).mean()
            self._penalties.clear()
            metrics |= totals(**{"policy/kl": penalty})
            loss = loss + self.method.kl * penalty
        return Update(loss, True, metrics, scored.samples)

    def chain(self, batch: Batch, latents_BCFhw: Tensor, grid: list[int], gradient_steps: int) -> Tensor:
        """Returns the run's DDIM chain from noisy latents, of which the last steps carry gradient."""
        context, config = self.context, self.context.config
        return denoise(
            context.model,
            latents_BCFhw,
            batch.text_BLD,
            grid,
            guidance=config.sampling.guidance,
            eta=config.eta,
            gradient_steps=gradient_steps,
            noise=lambda index: context.normal("ddim", batch, index),
            final=config.sampling.final_level,
            recompute=config.train.checkpoint_activations,
            unconditional_gradient=self.method.unconditional_gradient,
            observe=lambda step: self.penalise(step, batch.text_BLD),
        )

    def penalise(self, step: Step, text_BLD: Tensor) -> None:
        """Notes the distance of a gradient step's noise prediction to that of the base model at the same place."""
        if self.method.kl > 0 and step.prediction.eps.requires_grad:
            guidance = self.context.config.sampling.guidance
            with torch.no_grad(), self.context.model.base():
                base = self.context.model.predict(step.before.detach(), step.timestep, text_BLD, guidance)
            self._penalties.append((step.prediction.eps - base.eps).square().mean())
