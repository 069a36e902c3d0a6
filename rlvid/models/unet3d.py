"""ModelScopeT2V and models of its structure: ``UNet3DConditionModel``, a per-frame autoencoder, a CLIP text encoder.

The built-in model is of the same classes and loads through the same lines.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, Transformer2DModel, UNet3DConditionModel
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPTokenizer

from rlvid.config.model import ModelConfig
from rlvid.models.base import Posterior, VideoModel
from rlvid.models.folders import RANDOM, model_folder
from rlvid.models.noise_path import NoisePath, VariancePreserving
from rlvid.models.recompute import prepare
from rlvid.models.stored import stored_parts
from rlvid.models.video_shape import resolved_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The values of ``model.precision``."""

LAYERS = (ResnetBlock2D, TemporalConvLayer, Transformer2DModel, TransformerTemporalModel)
"""The layers of the denoiser's blocks; each is recomputed by itself."""


class UNet3DModel(VideoModel):
    """A text-to-video model made of diffusers' parts.

    Args:
        unet: predicts the noise of latents (B, C, F, h, w).
        vae: encodes and decodes frames one by one.
        text_encoder: its last hidden state conditions the denoiser.
        tokenizer: pads to its ``model_max_length``.
        scheduler: gives alpha-bar of the noise path; must be one of noise prediction.
        frames: F.
        height: of a frame in pixels.
        width: of a frame in pixels.
        fps: frames a second.
        decode_chunk: most frames that go through the decoder at once; bounds its memory.
        negative_prompt: the prompt of the unconditional branch.
    """

    def __init__(
        self,
        unet: UNet3DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        *,
        frames: int,
        height: int,
        width: int,
        fps: int = 8,
        decode_chunk: int = 64,
        negative_prompt: str = "",
    ) -> None:
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"scheduler: prediction_type {scheduler.config.prediction_type!r} is not supported; allowed: 'epsilon'"
            )
        self.denoiser: nn.Module = unet
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        for part in (unet, vae, text_encoder):
            part.eval().requires_grad_(False)
        prepare(unet, LAYERS)
        self.path: NoisePath = VariancePreserving(scheduler.alphas_cumprod)
        self.frames, self.fps, self.decode_chunk = frames, fps, decode_chunk
        self._factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.height, self.width, self.negative_prompt = height, width, negative_prompt
        self._channels = unet.config.in_channels

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, h, w)."""
        return self._channels, self.frames, self.height // self._factor, self.width // self._factor

    @property
    def device(self) -> torch.device:
        """Where the autoencoder's weights are."""
        return next(self.vae.parameters()).device  # diffusers' own looks at every layer, each time

    @property
    def _dtype(self) -> torch.dtype:
        """The frozen parts' precision."""
        return next(self.vae.parameters()).dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """text_BLD of prompts, cut to the tokenizer's length."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return self.text_encoder(tokens.to(self.device)).last_hidden_state

    @torch.no_grad()
    def encode_frames(self, frames_BFCHW: Tensor) -> Posterior:
        """Returns the posterior of each frame by itself, scaled by the autoencoder's ``scaling_factor``."""
        batch = len(frames_BFCHW)
        pixels = frames_BFCHW.flatten(0, 1).to(self.device, self._dtype) * 2 - 1
        parts = [self.vae.encode(chunk).latent_dist for chunk in pixels.split(self.decode_chunk)]
        scale = self.vae.config.scaling_factor

        def gather(values: list[Tensor]) -> Tensor:
            joined = torch.cat(values)
            joined = joined.to(torch.promote_types(torch.float32, joined.dtype)) * scale
            return joined.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()

        return Posterior(gather([p.mean for p in parts]), gather([p.std for p in parts]))

    def decode_frames(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Tensor:
        """frames_BSCHW of the chosen frames, ``decode_chunk`` at a time; the other latents are never decoded."""
        rows_B1 = torch.arange(len(latents_BCFhw), device=latents_BCFhw.device)[:, None]
        chosen_BSChw = latents_BCFhw.transpose(1, 2)[rows_B1, frames_BS.to(latents_BCFhw.device)]
        latents_Nchw = (chosen_BSChw.flatten(0, 1) / self.vae.config.scaling_factor).to(self._dtype)
        recompute &= latents_Nchw.requires_grad and torch.is_grad_enabled()
        pixels = torch.cat([self._decode(chunk, recompute) for chunk in latents_Nchw.split(self.decode_chunk)])
        pixels = pixels.to(torch.promote_types(torch.float32, pixels.dtype))
        return (pixels / 2 + 0.5).unflatten(0, tuple(frames_BS.shape))

    def _decode(self, latents_Nchw: Tensor, recompute: bool) -> Tensor:
        def decode(latents_Nchw: Tensor) -> Tensor:
            return self.vae.decode(latents_Nchw).sample

        if recompute:
            return checkpoint(decode, latents_Nchw, use_reentrant=False, preserve_rng_state=False)
        return decode(latents_Nchw)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Casts autoencoder and text encoder."""
        for frozen in (self.vae, self.text_encoder):
            nn.Module.to(frozen, dtype)  # diffusers' own warns of nothing

    def output(self, latents_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Returns the predicted noise; see ``VideoModel.output``."""
        dtype = self._dtype
        return self.denoiser(
            latents_BCFhw.to(dtype), timestep_B, encoder_hidden_states=text_BLD.to(dtype), return_dict=False
        )[0].to(torch.promote_types(torch.float32, dtype))


def load_unet3d(spec: ModelConfig, *, negative_prompt: str = "", device: str | torch.device = "cpu") -> UNet3DModel:
    """Loads the model of ``spec``; ``random`` has weights that are always the same.

    Args:
        spec: path, shape and precision.
        negative_prompt: the prompt of the unconditional branch.
        device: of the weights.

    Raises:
        ValueError: the folder or one of its parts is missing or damaged, or it holds another class of model.
    """
    folder, shape = model_folder(spec.path), resolved_shape(spec)
    if spec.path == RANDOM:
        from rlvid.models.untrained import random_parts

        parts = random_parts(folder, DTYPES[spec.precision], device)
    else:
        parts = stored_parts(spec.path, DTYPES[spec.precision], device)
    return UNet3DModel(
        **parts, frames=shape.frames, height=shape.height, width=shape.width, decode_chunk=spec.decode_chunk,
        negative_prompt=negative_prompt,
    )  # fmt: skip


def load_model(path: str, *, device: str | torch.device = "cpu", **settings: Any) -> UNet3DModel:
    """Loads a 3D U-Net by its path; ``settings`` are those of ``ModelConfig``, and errors those of ``load_unet3d``."""
    return load_unet3d(ModelConfig(path=path, **settings), device=device)
