"""The interface of a text-to-video model, so that the rest of the code is the same for all models.

A model's prediction, whatever it was trained to predict, is normalised to (x0, eps) here:

=============  ===========================================================
code           meaning
=============  ===========================================================
``abar``       cumulative product of alphas at a timestep
``x0``         predicted clean latents, (x_t - sqrt(1 - abar) eps) / sqrt(abar)
``eps``        predicted noise, eps_u + g (eps_c - eps_u) under guidance g
=============  ===========================================================
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlvid.models.lora import lora_parameters, lora_scale


@dataclass(frozen=True)
class Prediction:
    """A denoiser's prediction for noisy latents: ``x0_BCFhw`` and ``eps_BCFhw``, both float32."""

    x0: Tensor
    eps: Tensor

    def take(self, rows: Any) -> "Prediction":
        """Returns the prediction of these rows, an index of their tensors."""
        return Prediction(self.x0[rows], self.eps[rows])


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
        abar: cumulative alphas of the noise schedule, (1000,), float32.
        frames: F, frames of a video.
        size: height and width of a frame in pixels.
        fps: frames a second at which videos are shown.
    """

    denoiser: nn.Module
    abar: Tensor
    frames: int
    size: int
    fps: int

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

    @abstractmethod
    def predict(
        self,
        latents_BCFhw: Tensor,
        timestep: int | Tensor,
        text_BLD: Tensor,
        guidance: float,
        *,
        unconditional_gradient: bool = True,
        recompute: bool = False,
    ) -> Prediction:
        """Returns the guided prediction at one timestep (int) or at one for each video (int64, (B,)).

        With both branches needed, they run in one batched call; without ``unconditional_gradient`` the
        unconditional branch runs on its own under ``no_grad``. With ``recompute`` the activations of the denoiser's
        layers are computed again in the backward pass and not kept.
        """

    @contextmanager
    def base(self) -> Iterator[None]:
        """Switches the adapter off in the block, so that the denoiser is the base model."""
        assert lora_parameters(self.denoiser), "without an adapter, the base model's weights are gone"
        lora_scale(self.denoiser, 0.0)
        try:
            yield
        finally:
            lora_scale(self.denoiser, 1.0)

    def add_noise(self, latents_BCFhw: Tensor, noise_BCFhw: Tensor, timestep: int | Tensor) -> Tensor:
        """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
        abar = self.abar_at(timestep, latents_BCFhw)
        return abar.sqrt() * latents_BCFhw + (1 - abar).sqrt() * noise_BCFhw.to(latents_BCFhw)

    def abar_at(self, timestep: int | Tensor, like: Tensor) -> Tensor:
        """Returns abar at a timestep, shaped to broadcast over ``like`` (B, ...), in its dtype and on its device."""
        value = self.abar.to(like.device)[torch.as_tensor(timestep, device=like.device)]
        return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
