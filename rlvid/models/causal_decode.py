"""Decodes chosen frames of a causal video autoencoder: the exact gradient, with the memory of one chunk.

For diffusers' ``AutoencoderKLWan``, of Wan2.1 and of Wan2.2. Its decoder takes latent frames from first to last. A
chunk is one latent frame: x_c gives the first frame of a video (c = 0), or the next four. It reads the features that
earlier chunks left before each temporal convolution, its cache, so a frame depends on all latents up to its own:

    y_c, m_(c+1) = D(x_c, m_c)                                              forward
    dL/dx_c, dL/dm_c = J_c^T (dL/dy_c, dL/dm_(c+1))                         backward, from the last chunk to the first

=================  ============================================================================
code               meaning
=================  ============================================================================
``features``       x, latents in the autoencoder's own scale, after its ``post_quant_conv``
``cache``          m_c, a list: a tensor, None (nothing yet) or "Rep" (diffusers' mark) each
``borders``        the caches m_c that the forward pass kept, one for each chunk
``pixels``         y, in the decoder's range [-1, 1], not clamped
``carry``          dL/dm_(c+1)
``window``         W, chunks through which a frame's gradient flows; None: all, the exact gradient
=================  ============================================================================

The forward pass runs without a graph and keeps ``borders``. The backward pass computes one chunk again at a time, with
a graph, and pulls both of its cotangents back.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlvid.models.chunk_plan import ChunkPlan, positions
from rlvid.models.decoder_cache import Border, Cache, prepare_blocks, restored, take, tensors
from rlvid.models.recompute import recomputing


@dataclass(frozen=True)
class DecodeSettings:
    """How the gradient through the decoder is computed.

    Attributes:
        window: W, chunks through which the gradient of a frame flows at least; None is the exact gradient. What is
            left out is measured by ``CausalDecoder.gradient_share``.
        cache_dtype: of the kept caches; None keeps them as they are, ``torch.bfloat16`` halves them and rounds the
            gradient. Pixels do not change.
        offload: keeps caches in the CPU's memory.
        share: whether training measures what a window leaves out.
        recompute_blocks: within a chunk, computes each residual block again in the backward pass.
    """

    window: int | None = None
    cache_dtype: torch.dtype | None = None
    offload: bool = False
    share: bool = True
    recompute_blocks: bool = True

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window}; allowed: 1 or more chunks, or null for the exact gradient")


class CausalDecoder:
    """Decodes frames of an autoencoder that is frozen: its weights get no gradient.

    Args:
        vae: its residual blocks are prepared for recomputation; weights and results do not change.
        settings: of the gradient.
    """

    def __init__(self, vae: AutoencoderKLWan, settings: DecodeSettings | None = None) -> None:
        self.vae, self.settings = vae, settings or DecodeSettings()
        self.stride: int = vae.config.scale_factor_temporal
        prepare_blocks(vae.decoder)

    def decode(self, latents_BCfhw: Tensor, frames_BS: Tensor, *, recompute: bool) -> Tensor:
        """Decodes the chosen frames of each video, and no chunk after its last one.

        Args:
            latents_BCfhw: normalised per channel.
            frames_BS: int64, indices of frames from 0 on.
            recompute: keep no activations; else the graph of all chunks is kept, unless there is a window.

        Returns:
            frames_BSCHW, float32 or more precise, about [0, 1] but not clamped; differentiable in the latents.
        """
        plan = ChunkPlan.of(frames_BS, self.stride)
        assert plan.count <= latents_BCfhw.shape[2], "frames beyond the last latent"
        features = self.features(latents_BCfhw[:, :, : plan.count])
        with_graph = features.requires_grad and torch.is_grad_enabled()
        if with_graph and (recompute or self.settings.window is not None):
            pixels = _Sweep.apply(features, self, plan)
        else:
            pixels, _ = self.stream(features, plan)
        return pixels.to(torch.promote_types(torch.float32, pixels.dtype)) / 2 + 0.5

    def features(self, latents_BCfhw: Tensor) -> Tensor:
        """Returns the decoder's input: latents in the autoencoder's scale, after the convolution of single frames."""
        mean_C111, std_C111 = latent_statistics(self.vae, latents_BCfhw.device)
        scaled = latents_BCfhw.to(mean_C111.dtype) * std_C111 + mean_C111
        return self.vae.post_quant_conv(scaled.to(self.vae.dtype))

    def chunk(self, features_NC1hw: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Decodes one latent frame, the first one where there is no cache; nothing that it is given changes.

        Returns:
            pixels (N, 3, 1 or 4, H, W), and the cache for the next chunk.
        """
        after = [None] * self.vae._cached_conv_counts["decoder"] if cache is None else list(cache)
        pixels = self.vae.decoder(features_NC1hw, feat_cache=after, feat_idx=[0], first_chunk=cache is None)
        if self.vae.config.patch_size is not None:
            pixels = unpatchify(pixels, self.vae.config.patch_size)
        return pixels, after

    def stream(
        self, features_BCfhw: Tensor, plan: ChunkPlan, keep: bool = False, window: int | None = None
    ) -> tuple[Tensor, list[Border]]:
        """Decodes the planned frames, chunk after chunk.

        Args:
            features_BCfhw: see ``features``.
            plan: the frames.
            keep: keep the caches that ``pull_back`` needs with the ``window``.
            window: W.

        Returns:
            pixels_BSCHW, and borders.
        """
        pieces, places, borders = [], [], list[Border]()
        cache: Cache | None = None
        rows = plan.rows(0)
        for c in range(plan.count):
            active = plan.rows(c)
            cache, rows = take(cache, positions(active, rows)), active
            if keep:
                held = plan.recomputed(c, window)
                borders.append((held, self._stored(take(cache, positions(held, rows)))))
            pixels, cache = self.chunk(features_BCfhw[rows, :, c : c + 1], cache)
            row_N, slot_N, place_N = plan.scored(c)
            pieces.append(pixels[positions(row_N, rows), :, place_N])
            places.append(row_N * plan.slots + slot_N)
        order = torch.cat(places).argsort()
        return torch.cat(pieces)[order].unflatten(0, (-1, plan.slots)), borders

    def pull_back(
        self,
        features_BCfhw: Tensor,
        borders: list[Border],
        plan: ChunkPlan,
        gradient_BSCHW: Tensor,
        window: int | None = None,
    ) -> Tensor:
        """Computes the gradient of the features from the gradient of the pixels, one chunk's graph at a time.

        With a window, the cache that enters chunk c is a constant where no frame of chunks c .. c + W - 2 is scored.

        Args:
            features_BCfhw: as ``stream`` had them, with ``plan``.
            borders: what ``stream`` kept, with this window or a larger one.
            plan: the frames.
            gradient_BSCHW: of the pixels.
            window: W.

        Returns:
            Gradient of the features, (B, C, f, h, w).
        """
        gradient_BCfhw = torch.zeros_like(features_BCfhw)
        carry: list[Tensor | None] = []
        for c in reversed(range(plan.count)):
            row_N, slot_N, place_N = plan.scored(c)
            if not len(row_N) and all(each is None for each in carry):
                carry = []
                continue
            rows, onward = plan.recomputed(c, window), plan.carried(c, window)
            held, border = borders[c]
            before = restored(take(border, positions(rows, held)), features_BCfhw)
            of_x, *of_cache = self._chunk_gradient(
                features_BCfhw[rows, :, c : c + 1].detach(),
                before,
                positions(plan.carried(c + 1, window), rows),
                carry,
                (positions(row_N, rows), place_N, gradient_BSCHW[row_N, slot_N]),
                onward=len(onward) > 0,
            )
            gradient_BCfhw[rows, :, c : c + 1] = of_x
            carry = [g if g is None else g[positions(onward, rows)] for g in of_cache]
        return gradient_BCfhw

    def _chunk_gradient(
        self,
        x_NC1hw: Tensor,
        before: Cache | None,
        arriving_M: Tensor,
        carry: list[Tensor | None],
        scored: tuple[Tensor, Tensor, Tensor],
        *,
        onward: bool,
    ) -> tuple[Any, ...]:
        """Returns the gradients of a chunk's input and, if it goes ``onward``, of its cache; its graph ends here.

        ``carry`` belongs to the videos ``arriving_M``; ``scored`` are videos, places and gradients of pixels. A part of
        the cache that nothing reaches has None: without scored pixels, the last layers' part.
        """
        x_NC1hw.requires_grad_()
        entering = [each.requires_grad_() for each in tensors(before)] if onward else []
        row_N, place_N, gradient_NCHW = scored
        with torch.enable_grad(), recomputing(self.settings.recompute_blocks):
            pixels, after = self.chunk(x_NC1hw, before)
            leaving = zip(tensors(after), carry, strict=bool(carry))
            paths = [(each[arriving_M], g) for each, g in leaving if g is not None]
            if len(row_N):
                paths.append((pixels[row_N, :, place_N], gradient_NCHW))
        outputs, cotangents = zip(*paths, strict=True)
        return torch.autograd.grad(outputs, [x_NC1hw, *entering], cotangents, allow_unused=True)

    def gradient_share(
        self, latents_BCfhw: Tensor, frames_BS: Tensor, gradient_BSCHW: Tensor, window: int
    ) -> tuple[Tensor, Tensor]:
        """Measures the latents' gradient that a window keeps, for given gradients of the decoded frames.

        One video at a time, with its caches in the CPU's memory: a GPU holds the exact gradient of one chunk beside
        what the window's own sweep keeps.

        Args:
            latents_BCfhw: normalised per channel.
            frames_BS: int64.
            gradient_BSCHW: gradient of a reward in the frames; any scale.
            window: W.

        Returns:
            Cosine with the exact gradient, and the ratio of their norms, for each video; float32, NaN where the exact
            gradient is 0.
        """
        aside = CausalDecoder(self.vae, replace(self.settings, offload=True))
        videos = zip(latents_BCfhw.detach().split(1), frames_BS.split(1), gradient_BSCHW.split(1), strict=True)
        shares = [aside._share_of_one(*video, window) for video in videos]
        cosine_B, ratio_B = torch.stack(shares).unbind(1)
        return cosine_B, ratio_B

    def _share_of_one(self, latents_1Cfhw: Tensor, frames_1S: Tensor, gradient_1SCHW: Tensor, window: int) -> Tensor:
        plan = ChunkPlan.of(frames_1S, self.stride)
        latents_1Cfhw.requires_grad_()
        with torch.enable_grad():
            features = self.features(latents_1Cfhw[:, :, : plan.count])
        with torch.no_grad():
            _, borders = self.stream(features, plan, keep=True)

        def through(window: int | None) -> Tensor:
            of_features = self.pull_back(features, borders, plan, gradient_1SCHW, window)
            (of_latents,) = torch.autograd.grad(features, latents_1Cfhw, of_features, retain_graph=True)
            return of_latents.flatten().float()

        cut_N, exact_N = through(window), through(None)
        norm = exact_N.norm()
        cosine = torch.cosine_similarity(cut_N, exact_N, dim=0)
        return torch.stack([torch.where(norm > 0, cosine, torch.nan), cut_N.norm() / norm])

    def _stored(self, cache: Cache | None) -> Cache | None:
        device = "cpu" if self.settings.offload else None
        stored = partial(torch.Tensor.to, device=device, dtype=self.settings.cache_dtype)
        return cache and [stored(each) if isinstance(each, Tensor) else each for each in cache]


class _Sweep(torch.autograd.Function):
    """Decodes frames without a graph; the backward pass computes the chunks again, from the last to the first."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, decoder: CausalDecoder, plan: ChunkPlan) -> Tensor:
        """See ``CausalDecoder.stream``."""
        pixels, borders = decoder.stream(features, plan, True, decoder.settings.window)
        ctx.save_for_backward(features)
        ctx.rest = decoder, plan, borders
        return pixels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSCHW: Tensor) -> Any:
        """See ``CausalDecoder.pull_back``."""
        decoder, plan, borders = ctx.rest
        (features,) = ctx.saved_tensors
        return decoder.pull_back(features, borders, plan, gradient_BSCHW, decoder.settings.window), None, None


def latent_statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of the autoencoder's latents by channel, (C, 1, 1, 1), at least float32."""
    dtype = torch.promote_types(torch.float32, vae.dtype)
    mean, std = (
        torch.tensor(values, dtype=dtype, device=device).reshape(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
