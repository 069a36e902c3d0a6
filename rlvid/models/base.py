"""The interface of a text-to-video model, so that the rest of the code is the same for all models.

A model's prediction, whatever it was trained to predict, is turned into (x0, eps) by its noise path. Under guidance g
the network's output is o_u + g (o_c - o_u), from its unconditional and its conditional branch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlvid.models.decoded import Decoded
from rlvid.models.guidance import Guidance, guidance_at
from rlvid.models.lora import lora_parameters, lora_scale
from rlvid.models.noise_path import NoisePath, Point, Prediction
from rlvid.models.recompute import recomputing


@dataclass(frozen=True)
class Posterior:
    """An autoencoder's posterior for frames: ``mean_BCFhw`` and ``std_BCFhw``, scaled like latents."""

    mean: Tensor
    std: Tensor

    def sample(self, noise_BCFhw: Tensor) -> Tensor:
        """Returns latents for given standard normal noise."""
        return self.mean + self.std * noise_BCFhw.to(self.mean)


class VideoModel(ABC):
    """A text-to-video diffusion model in latent space.

    Attributes:
        denoiser: the network that is trained; an engine that wraps it may stand in its place.
        path: the noise path that it was trained on.
        frames: F, frames of a video.
        height: of a frame in pixels.
        width: of a frame in pixels.
        fps: frames a second at which videos are shown.
        text_length: L, if an embedding ends in rows of zeros, which need not be stored; else None.
        negative_prompt: the prompt of the unconditional branch.
        negative_1LD: its embedding; computed when first needed.
    """

    denoiser: nn.Module
    path: NoisePath
    frames: int
    height: int
    width: int
    fps: int
    text_length: int | None = None
    negative_prompt: str = ""
    negative_1LD: Tensor | None = None

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, h, w) of one video's latents."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model's weights are."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Returns embeddings text_BLD of prompts."""

    @abstractmethod
    def encode_frames(self, frames_BFCHW: Tensor) -> Posterior:
        """Returns the posterior over the latents of frames in [0, 1]; no gradient."""

    @abstractmethod
    def decode_frames(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Tensor:
        """Decodes the chosen frames only: frames_BSCHW, float32, about [0, 1] but not clamped; differentiable.

        With ``recompute`` the decoder's activations are computed again in the backward pass and not kept.
        """

    def decode(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Decoded:
        """Decodes the chosen frames for a loss on them, as ``decode_frames``; see ``rlvid.models.decoded``."""
        return Decoded(self.decode_frames(latents_BCFhw, frames_BS, recompute=recompute))

    @abstractmethod
    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Brings the parts that are never trained to a precision, where they may have it."""

    @abstractmethod
    def output(self, latents_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Returns what the denoiser predicts, without guidance, in float32 at least."""

    def predict(
        self,
        latents_BCFhw: Tensor,
        point: Point,
        text_BLD: Tensor,
        guidance: Guidance,
        *,
        unconditional_gradient: bool = True,
        recompute: bool = False,
    ) -> Prediction:
        """Returns the guided prediction at a point of the noise path, or at one for each video; float32.

        At levels without guidance the conditional branch runs alone, for each video by itself. With both branches
        needed, they run in one batched call; without ``unconditional_gradient`` the unconditional branch runs on its
        own under ``no_grad``. With ``recompute`` the activations of the denoiser's layers are computed again in the
        backward pass and not kept.
        """
        timestep_B = self.path.timestep(point, latents_BCFhw.device).expand(len(latents_BCFhw))
        g = guidance_at(guidance, self.path, point)
        with recomputing(recompute):
            if isinstance(g, Tensor):
                output = self._guided_in_part(latents_BCFhw, timestep_B, text_BLD, g, unconditional_gradient)
            else:
                output = self._guided(latents_BCFhw, timestep_B, text_BLD, g, unconditional_gradient)
        latents_BCFhw = latents_BCFhw.to(output.dtype)
        return self.path.prediction(output, latents_BCFhw, self.path.level(point, latents_BCFhw))

    def _guided(
        self, latents_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor, guidance: float, unconditional_gradient: bool
    ) -> Tensor:
        if guidance == 1.0:
            return self.output(latents_BCFhw, timestep_B, text_BLD)
        negative_BLD = self.negative(text_BLD)
        if unconditional_gradient:
            both = self.output(
                latents_BCFhw.repeat(2, 1, 1, 1, 1), timestep_B.repeat(2), torch.cat([negative_BLD, text_BLD])
            )
            uncond, cond = both.chunk(2)
        else:
            with torch.no_grad():
                uncond = self.output(latents_BCFhw, timestep_B, negative_BLD)
            cond = self.output(latents_BCFhw, timestep_B, text_BLD)
        return uncond + guidance * (cond - uncond)

    def _guided_in_part(
        self, latents_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor, guidance_B: Tensor, gradient: bool
    ) -> Tensor:
        """Returns the output under a guidance of each video; 1 is without. The number of calls is always the same."""
        negative_BLD, guided_B = self.negative(text_BLD), guidance_B.to(latents_BCFhw.device) != 1
        if gradient:
            latents = torch.cat([latents_BCFhw[guided_B], latents_BCFhw])
            timestep = torch.cat([timestep_B[guided_B], timestep_B])
            both = self.output(latents, timestep, torch.cat([negative_BLD[guided_B], text_BLD]))
            uncond, cond = both.split([len(both) - len(guided_B), len(guided_B)])
        else:
            with torch.no_grad():
                uncond = self.output(latents_BCFhw, timestep_B, negative_BLD)[guided_B]
            cond = self.output(latents_BCFhw, timestep_B, text_BLD)
        g_N1111 = guidance_B.to(cond)[guided_B].reshape(-1, 1, 1, 1, 1)
        return cond.index_put((guided_B,), uncond + g_N1111 * (cond[guided_B] - uncond))

    def set_negative_prompt(self, prompt: str) -> None:
        """Sets the prompt of the unconditional branch."""
        if prompt != self.negative_prompt:
            self.negative_prompt, self.negative_1LD = prompt, None

    def negative(self, text_BLD: Tensor) -> Tensor:
        """Returns the embedding of the negative prompt for each row of ``text_BLD``, of its dtype and device."""
        if self.negative_1LD is None:
            self.negative_1LD = self.encode_prompts([self.negative_prompt])
        return self.negative_1LD.expand(len(text_BLD), -1, -1).to(text_BLD)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Switches the adapter off in the block, so that the denoiser is the base model."""
        assert lora_parameters(self.denoiser), "without an adapter, the base model's weights are gone"
        lora_scale(self.denoiser, 0.0)
        try:
            yield
        finally:
            lora_scale(self.denoiser, 1.0)

    def add_noise(self, latents_BCFhw: Tensor, noise_BCFhw: Tensor, point: Point) -> Tensor:
        """Returns alpha x0 + sigma noise, at one point of the path or at one for each video."""
        level = self.path.level(point, latents_BCFhw)
        return level.alpha * latents_BCFhw + level.sigma * noise_BCFhw.to(latents_BCFhw)
