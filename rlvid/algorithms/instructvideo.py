"""InstructVideo (Yuan et al., CVPR 2024): reward fine-tuning recast as editing.

=============  ==========================  ==================================================
code           paper                       meaning
=============  ==========================  ==================================================
``tau``        tau                         noise level at which editing starts
``weights``    exp(-lambda |i - F / 2|)/S  TAR's coefficient of a scored frame, equation 9
``loss``       1 - reward                  what is minimised, equation 10
=============  ==========================  ==================================================
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.base import Algorithm, Batch, Samples, Update, totals
from rlvid.config import InstructVideoConfig
from rlvid.diffusion.chain import denoise, offset_noise
from rlvid.diffusion.schedule import partial, timesteps
from rlvid.reward.preprocess import saturated_share
from rlvid.reward.video import FramePlan, plan_frames


class InstructVideo(Algorithm):
    """Corrupts a clip to noise level tau, denoises it, and back-propagates the reward through the last K steps."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        """One optimiser step, accumulated over micro-batches."""
        parts = list(batch.split(self.context.config.micro_batch))
        for index, part in enumerate(parts):
            update = self.loss(part)
            yield Update(
                update.loss * (len(part) / len(batch)), index + 1 == len(parts), update.metrics, update.samples
            )

    def loss(self, batch: Batch) -> Update:
        """Mean over videos of 1 - sum over s of weight_s score_s, for one micro-batch."""
        context, config = self.context, self.context.config
        method: InstructVideoConfig = config.method
        grid = partial(timesteps(config.sampling.steps), method.tau)
        with context.stopwatch.stage("chain"):
            latents = denoise(
                context.model,
                context.model.add_noise(batch.latents_BCFhw, self.noise(batch), grid[0]),
                batch.text_BLD,
                grid,
                guidance=config.sampling.guidance,
                eta=config.sampling.eta,
                gradient_steps=method.gradient_steps,
                noise=lambda index: self._draw("ddim", batch, index),
                final=config.sampling.final,
                recompute=config.train.checkpoint_activations,
                unconditional_gradient=method.unconditional_gradient,
            )
        plan = self.plan(batch)
        with context.stopwatch.stage("decode"):
            frames_BSCHW = context.model.decode_frames(latents, plan.frames_BS)
        with context.stopwatch.stage("reward"):
            scores_BS = context.reward(frames_BSCHW, batch.prompts)
            reward_B = plan.reward(scores_BS)
        metrics = totals(
            **{
                "reward/weighted": reward_B,
                "reward/trained": scores_BS,
                "frames/saturated_share": saturated_share(frames_BSCHW),
            }
        )
        held_out_B = None
        if context.held_out is not None:
            with context.stopwatch.stage("held-out"), torch.no_grad():
                held_out_BS = context.held_out(frames_BSCHW, batch.prompts)
            metrics |= totals(**{"reward/held_out": held_out_BS})
            held_out_B = plan.reward(held_out_BS).float().cpu()
        for place in range(plan.frames_BS.shape[1]):
            metrics |= totals(**{f"frames/weight_{place}": plan.weights_BS[:, place]})
        return Update(
            (1 - reward_B).mean(),
            True,
            metrics,
            self._samples(batch, frames_BSCHW, plan, scores_BS, reward_B, held_out_B),
        )

    def noise(self, batch: Batch) -> Tensor:
        """The corruption of each clip, with noise that is constant over a frame's pixels added to it."""
        shape = self.context.model.latent_shape
        offset = randomness.normal(shape[:2], self.context.config.seed, "offset", [(s,) for s in batch.serials])
        return offset_noise(
            self._draw("noise", batch, 0), offset.to(batch.latents_BCFhw), self.context.config.method.offset_noise
        )

    def plan(self, batch: Batch) -> FramePlan:
        """SegVR's frames and TAR's weights, chosen before decoding."""
        reward, positions = self.context.config.reward, [(s,) for s in batch.serials]
        uniform_BS = randomness.uniform((reward.segments,), self.context.config.seed, "segments", positions)
        plan = plan_frames(
            uniform_BS.to(batch.latents_BCFhw.device),
            self.context.model.frames,
            reward.attenuation,
            reward.weights,
            reward.skip_below,
        )
        return plan

    def _draw(self, purpose: str, batch: Batch, index: int) -> Tensor:
        shape = self.context.model.latent_shape
        positions = [(serial, index) for serial in batch.serials]
        return randomness.normal(shape, self.context.config.seed, purpose, positions).to(batch.latents_BCFhw)

    @staticmethod
    def _samples(
        batch: Batch, frames: Tensor, plan: FramePlan, scores: Tensor, reward: Tensor, held_out_B: Tensor | None
    ) -> Samples:
        return Samples(
            batch.serials,
            batch.prompts,
            frames.detach().clamp(0, 1).cpu(),
            plan.frames_BS.cpu(),
            scores.detach().float().cpu(),
            reward.detach().float().cpu(),
            held_out_B,
        )
