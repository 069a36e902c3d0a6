"""Wan text-to-video models: ``WanTransformer3DModel``, a causal autoencoder, a UMT5 text encoder.

They are rectified flows. The network predicts the velocity of the straight path from clean latents to noise:

=============  ==============================================================
code           meaning
=============  ==============================================================
``point``      s, the noise level, in (0, 1]; see ``rlvid.models.noise_path.RectifiedFlow``
``velocity``   v = eps - x0; under guidance g, v_u + g (v_c - v_u)
timestep       the network's input, 1000 s, never rounded
=============  ==============================================================
"""

from functools import partial

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from rlvid.models.base import Posterior, VideoModel
from rlvid.models.causal_decode import CausalDecoder, DecodeSettings, latent_statistics
from rlvid.models.decoded import Decoded, DecodedApart
from rlvid.models.noise_path import Point, Prediction, RectifiedFlow
from rlvid.models.recompute import prepare, recomputing
from rlvid.models.wan_text import TextEmbedder


class WanModel(VideoModel):
    """A text-to-video model made of diffusers' Wan parts.

    Args:
        transformer: predicts the velocity of latents (B, C, f, h, w).
        vae: encodes and decodes videos.
        text: embeds prompts; None where embeddings are read from a cache.
        frames: F, one more than a multiple of the autoencoder's temporal stride.
        height: of a frame in pixels.
        width: of a frame in pixels.
        fps: frames a second.
        negative_prompt: the prompt of the unconditional branch.
        shift: of the noise levels of sampling and training.
        decode: how the decoder's gradient is computed.

    Attributes:
        negative_1LD: embedding of the negative prompt; computed when first needed, or set where there is no ``text``.

    Raises:
        ValueError: a shape that the model does not have, or a shift that is not above 0.
    """

    path: RectifiedFlow

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        text: TextEmbedder | None,
        *,
        frames: int,
        height: int,
        width: int,
        fps: int = 16,
        negative_prompt: str = "",
        shift: float = 3.0,
        decode: DecodeSettings | None = None,
    ) -> None:
        self.path = RectifiedFlow(shift)
        self.stride: int = vae.config.scale_factor_temporal
        self._factor: int = vae.config.scale_factor_spatial
        check_shape(transformer, vae, frames, height, width)
        self.denoiser: nn.Module = transformer
        self.vae, self.text = vae, text
        for part in (transformer, vae):
            part.eval().requires_grad_(False)
        prepare(transformer, (WanTransformerBlock,))
        self._decoder = CausalDecoder(vae, decode)
        self._dtype = transformer.patch_embedding.weight.dtype
        self._channels: int = transformer.config.in_channels
        self.frames, self.height, self.width, self.fps = frames, height, width, fps
        self.negative_prompt = negative_prompt
        self.negative_1LD: Tensor | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, f, h, w), with f = 1 + (F - 1) / stride."""
        frames = 1 + (self.frames - 1) // self.stride
        return self._channels, frames, self.height // self._factor, self.width // self._factor

    @property
    def device(self) -> torch.device:
        """Where the autoencoder's weights are."""
        return self.vae.device

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """text_BLD of prompts, zeros behind the last token; see ``rlvid.models.wan_text.cut_rows``."""
        if self.text is None:
            raise ValueError("the text encoder is not loaded, so prompts cannot be embedded; load the model with it")
        return self.text.embed(prompts)

    @torch.no_grad()
    def encode_frames(self, frames_BFCHW: Tensor) -> Posterior:
        """Returns the posterior of whole videos, normalised by channel, float32.

        Raises:
            ValueError: the number of frames is not one more than a multiple of the stride; diffusers would drop some.
        """
        _check_frames(frames_BFCHW.shape[1], self.stride)
        pixels = frames_BFCHW.transpose(1, 2).to(self.vae.device, self.vae.dtype) * 2 - 1
        posterior = self.vae.encode(pixels).latent_dist
        mean_C111, std_C111 = latent_statistics(self.vae, self.vae.device)
        return Posterior((posterior.mean.to(mean_C111) - mean_C111) / std_C111, posterior.std.to(std_C111) / std_C111)

    def decode_frames(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Tensor:
        """frames_BSCHW of the chosen frames; latents after each video's last one are not decoded."""
        return self._decoder.decode(latents_BCFhw, frames_BS, recompute=recompute)

    def decode(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Decoded:
        """Decodes apart from the graph of the latents, where there is one; see ``VideoModel.decode``."""
        if not (latents_BCFhw.requires_grad and torch.is_grad_enabled()):
            return super().decode(latents_BCFhw, frames_BS, recompute=recompute)
        window = self._decoder.settings.window

        def share(gradient_BSCHW: Tensor) -> Tensor:
            assert window is not None
            cosine_B, _ = self._decoder.gradient_share(latents_BCFhw, frames_BS, gradient_BSCHW, window)
            return cosine_B[cosine_B.isfinite()]

        decode = partial(self.decode_frames, frames_BS=frames_BS, recompute=recompute)
        return DecodedApart(latents_BCFhw, decode, None if window is None else share)

    def predict(
        self,
        latents_BCFhw: Tensor,
        point: Point,
        text_BLD: Tensor,
        guidance: float,
        *,
        unconditional_gradient: bool = True,
        recompute: bool = False,
    ) -> Prediction:
        """Returns the guided prediction, float32; see ``VideoModel.predict``."""
        timestep_B = self.path.timestep(point, latents_BCFhw.device).expand(len(latents_BCFhw))
        with recomputing(recompute):
            velocity = self._guided(latents_BCFhw, timestep_B, text_BLD, guidance, unconditional_gradient)
        latents = latents_BCFhw.to(velocity.dtype)
        return self.path.prediction(velocity, latents, self.path.level(point, latents))

    def _guided(
        self, latents_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor, guidance: float, unconditional_gradient: bool
    ) -> Tensor:
        if guidance == 1.0:
            return self._velocity(latents_BCFhw, timestep_B, text_BLD)
        negative_BLD = self._negative(text_BLD)
        if unconditional_gradient:
            both = self._velocity(
                latents_BCFhw.repeat(2, 1, 1, 1, 1), timestep_B.repeat(2), torch.cat([negative_BLD, text_BLD])
            )
            uncond, cond = both.chunk(2)
        else:
            with torch.no_grad():
                uncond = self._velocity(latents_BCFhw, timestep_B, negative_BLD)
            cond = self._velocity(latents_BCFhw, timestep_B, text_BLD)
        return uncond + guidance * (cond - uncond)

    def _velocity(self, latents_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
        return self.denoiser(
            latents_BCFhw.to(self._dtype),
            timestep_B,
            encoder_hidden_states=text_BLD.to(self._dtype),
            return_dict=False,
        )[0].to(torch.promote_types(torch.float32, self._dtype))

    def _negative(self, text_BLD: Tensor) -> Tensor:
        if self.negative_1LD is None:
            if self.text is None:
                raise ValueError(
                    "guidance needs the embedding of the negative prompt, and the text encoder is not loaded; set "
                    "negative_1LD, or guidance = 1"
                )
            self.negative_1LD = self.encode_prompts([self.negative_prompt])
        return self.negative_1LD.expand(len(text_BLD), -1, -1).to(text_BLD)


def check_shape(
    transformer: WanTransformer3DModel, vae: AutoencoderKLWan, frames: int, height: int, width: int
) -> None:
    """Checks a video's shape, also against networks on the meta device; diffusers would cut it without an error.

    Raises:
        ValueError: the frames are not one more than a multiple of the autoencoder's stride in time, or a side in pixels
            is not a multiple of a token's.
    """
    _check_frames(frames, vae.config.scale_factor_temporal)
    multiple = vae.config.scale_factor_spatial * transformer.config.patch_size[1]
    for name, side in {"height": height, "width": width}.items():
        if side < multiple or side % multiple:
            near = max(side // multiple, 1) * multiple
            raise ValueError(
                f"model.{name} = {side}; allowed for this model: multiples of {multiple}, such as {near} or "
                f"{near + multiple}"
            )


def _check_frames(frames: int, stride: int) -> None:
    if frames < 1 or (frames - 1) % stride:
        near = max(frames - 1, 0) // stride * stride + 1
        raise ValueError(
            f"model.frames = {frames}; allowed for this model: {stride} n + 1, such as {near} or {near + stride}"
        )
