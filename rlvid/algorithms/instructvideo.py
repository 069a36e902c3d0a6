"""InstructVideo (Yuan et al., CVPR 2024): reward fine-tuning recast as editing.

=============  ==========================  ==================================================
code           paper                       meaning
=============  ==========================  ==================================================
``tau``        tau                         where editing starts; or ``start``, a level
``weights``    exp(-lambda |i - F / 2|)/S  TAR's coefficient of a scored frame, equation 9
``loss``       1 - reward                  what is minimised, equation 10
``error_B``    |eps - eps_theta|^2         or of v, on the source clips, with ``method.denoising``; not of the paper
=============  ==========================  ==================================================
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.base import Batch
from rlvid.algorithms.denoising import noise_error
from rlvid.algorithms.reward_gradient import Penalty, RewardGradient
from rlvid.config.methods.reward_gradient import InstructVideoConfig
from rlvid.diffusion.chain import offset_noise
from rlvid.diffusion.schedule import editing_chain


class InstructVideo(RewardGradient):
    """Corrupts a clip to a noise level, denoises it, and back-propagates the reward through the last K steps."""

    method: InstructVideoConfig

    def sample(self, batch: Batch) -> Tensor:
        """Returns the edited clips."""
        grid = editing_chain(self.method, self.context.model.path, self.context.grid)
        assert batch.latents_BCFhw is not None, "the config lets no run without clips come here"
        noisy = self.context.model.add_noise(batch.latents_BCFhw, self.noise(batch), grid[0])
        return self.chain(batch, noisy, grid, self.method.gradient_steps)

    def penalties(self, batch: Batch, latents_BCFhw: Tensor, repeat: int) -> Iterator[Penalty]:
        """See ``RewardGradient.penalties``; a clip that stands in for a lost one counts as 0."""
        yield from super().penalties(batch, latents_BCFhw, repeat)
        if self.method.denoising > 0:
            assert batch.latents_BCFhw is not None, "the config lets no run without clips come here"
            error_B = noise_error(self.context, batch, batch.latents_BCFhw, "denoising")
            loss = torch.where(batch.readable_B, error_B, 0.0).mean()
            yield Penalty("policy/noise_error", self.method.denoising * loss, error_B[batch.readable_B])

    def noise(self, batch: Batch) -> Tensor:
        """Returns the corruption of each clip, with noise that is constant over a frame's pixels added to it."""
        shape, seed = self.context.model.latent_shape, self.context.config.seed
        offset = randomness.normal(shape[:2], seed, "offset", [(serial,) for serial in batch.serials])
        return offset_noise(
            self.context.normal("noise", batch), offset.to(self.context.model.device), self.method.offset_noise
        )
