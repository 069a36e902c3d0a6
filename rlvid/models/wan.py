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
from rlvid.models.noise_path import RectifiedFlow
from rlvid.models.recompute import prepare
from rlvid.models.text_rows import TEXT_LENGTH, TextEmbedder
from rlvid.models.video_shape import check_wan_frames, check_wan_shape


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
        check_wan_shape(transformer.config, vae.config, frames, height, width)
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
        self.text_length = TEXT_LENGTH if text is None else text.length

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, f, h, w), with f = 1 + (F - 1) / stride."""
        frames = 1 + (self.frames - 1) // self.stride
        return self._channels, frames, self.height // self._factor, self.width // self._factor

    @property
    def device(self) -> torch.device:
        """Where the autoencoder's weights are."""
        return next(self.vae.parameters()).device  # diffusers' own looks at every layer, each time

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """text_BLD of prompts, zeros behind the last token; see ``rlvid.models.text_rows``."""
        if self.text is None:
            raise ValueError(
                "the text encoder is not loaded, so prompts cannot be embedded; load the model with it, or set "
                "negative_1LD where guidance alone needs it"
            )
        return self.text.embed(prompts).to(self.device)

    @torch.no_grad()
    def encode_frames(self, frames_BFCHW: Tensor) -> Posterior:
        """Returns the posterior of whole videos, normalised by channel, float32.

        Raises:
            ValueError: the number of frames is not one more than a multiple of the stride; diffusers would drop some.
        """
        check_wan_frames(frames_BFCHW.shape[1], self.stride)
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
        settings = self._decoder.settings
        window = settings.window if settings.share else None

        def share(gradient_BSCHW: Tensor) -> Tensor:
            assert window is not None
            cosine_B, _ = self._decoder.gradient_share(latents_BCFhw, frames_BS, gradient_BSCHW, window)
            return cosine_B[cosine_B.isfinite()]

        decode = partial(self.decode_frames, frames_BS=frames_BS, recompute=recompute)
        return DecodedApart(latents_BCFhw, decode, None if window is None else share)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Casts the text encoder, if there is one; the autoencoder stays float32."""
        if self.text is not None and self.text.encoder is not None:
            self.text.encoder.to(dtype)

    def output(self, latents_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Returns the predicted velocity; see ``VideoModel.output``."""
        return self.denoiser(
            latents_BCFhw.to(self._dtype),
            timestep_B,
            encoder_hidden_states=text_BLD.to(self._dtype),
            return_dict=False,
        )[0].to(torch.promote_types(torch.float32, self._dtype))
