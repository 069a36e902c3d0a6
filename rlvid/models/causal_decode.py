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
``borders``        the caches m_c that the forward pass kept
``pixels``         y, in the decoder's range [-1, 1], not clamped
``carry``          dL/dm_(c+1)
``window``         W, chunks through which a frame's gradient flows; None: all, the exact gradient
=================  ============================================================================

The forward pass runs without a graph and keeps ``borders``. The backward pass computes one chunk again at a time, with
a graph, and pulls both of its cotangents back.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, unpatchify
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlvid.models.chunk_plan import ChunkPlan, positions
from rlvid.models.recompute import checkpointed, recomputing

Cache = list[Any]
"""Features that a chunk leaves to the next, one entry a convolution: a tensor (N, C, <= 2, h, w), None, "Rep"."""

_CONVOLUTIONS = 2  # of a residual block that have a cache


@dataclass(frozen=True)
class DecodeSettings:
    """How the gradient through the decoder is computed.

    Attributes:
        window: W, chunks through which the gradient of a frame flows at least; None is the exact gradient. What is
            left out is measured by ``CausalDecoder.gradient_share``.
        cache_dtype: of the kept caches; None keeps them as they are, ``torch.bfloat16`` halves them and rounds the
            gradient. Pixels do not change.
        offload: keeps caches in the CPU's memory.
        recompute_blocks: within a chunk, computes each residual block again in the backward pass.

    Raises:
        ValueError: the window is below 1.
    """

    window: int | None = None
    cache_dtype: torch.dtype | None = None
    offload: bool = False
    recompute_blocks: bool = True

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window}; allowed: 1 or more chunks, or null for the exact gradient")


@dataclass(frozen=True)
class GradientShare:
    """The gradient that a window keeps, against the exact one: ``cosine_B``, and ``norm_B``, the ratio of norms."""

    cosine_B: Tensor
    norm_B: Tensor


class CausalDecoder:
    """Decodes frames of an autoencoder that is frozen: its weights get no gradient.

    Args:
        vae: its residual blocks are prepared for recomputation; weights and results do not change.
        settings: of the gradient.
    """

    def __init__(self, vae: AutoencoderKLWan, settings: DecodeSettings | None = None) -> None:
        self.vae, self.settings = vae, settings or DecodeSettings()
        self.stride: int = vae.config.scale_factor_temporal
        for module in vae.decoder.modules():
            if isinstance(module, WanResidualBlock) and "forward" not in vars(module):
                module.forward = partial(_run_block, module.forward)

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
    ) -> tuple[Tensor, list[Cache | None]]:
        """Decodes the planned frames, chunk after chunk.

        Args:
            features_BCfhw: see ``features``.
            plan: the frames.
            keep: keep the caches that ``pull_back`` needs with this window.
            window: W.

        Returns:
            pixels_BSCHW, and borders: for each chunk its incoming cache, or None.
        """
        pieces, places, borders = [], [], list[Cache | None]()
        cache: Cache | None = None
        rows = plan.rows(0)
        for c in range(plan.count):
            active = plan.rows(c)
            cache, rows = _take(cache, positions(active, rows)), active
            if keep:
                borders.append(self._stored(_take(cache, positions(plan.recomputed(c, window), rows))))
            pixels, cache = self.chunk(features_BCfhw[rows, :, c : c + 1], cache)
            row_N, slot_N, place_N = plan.scored(c)
            pieces.append(pixels[positions(row_N, rows), :, place_N])
            places.append(row_N * plan.slots + slot_N)
        order = torch.cat(places).argsort()
        return torch.cat(pieces)[order].unflatten(0, (-1, plan.slots)), borders

    def pull_back(
        self,
        features_BCfhw: Tensor,
        borders: list[Cache | None],
        plan: ChunkPlan,
        gradient_BSCHW: Tensor,
        window: int | None = None,
    ) -> Tensor:
        """Computes the gradient of the features from the gradient of the pixels, one chunk's graph at a time.

        With a window, the cache that enters chunk c is a constant where no frame of chunks c .. c + W - 2 is scored.

        Args:
            features_BCfhw: as ``stream`` had them.
            borders: what ``stream`` kept, with this window or a larger one.
            plan: the frames.
            gradient_BSCHW: gradient of the pixels.
            window: W.

        Returns:
            Gradient of the features, (B, C, f, h, w).
        """
        gradient_BCfhw = torch.zeros_like(features_BCfhw)
        carry: list[Tensor] = []
        for c in reversed(range(plan.count)):
            rows = plan.recomputed(c, window)
            if not len(rows):
                continue
            before = _restored(borders[c], features_BCfhw)
            onward = plan.carried(c, window)
            x = features_BCfhw[rows, :, c : c + 1].detach().requires_grad_()
            entering = _tensors(before) if len(onward) else []
            for tensor in entering:
                tensor.requires_grad_()
            with torch.enable_grad(), recomputing(self.settings.recompute_blocks):
                pixels, after = self.chunk(x, before)
                leaving, cotangents = [], []
                if carry:
                    arriving = positions(plan.carried(c + 1, window), rows)
                    leaving, cotangents = [each[arriving] for each in _tensors(after)], carry
                row_N, slot_N, place_N = plan.scored(c)
                if len(row_N):
                    leaving = [*leaving, pixels[positions(row_N, rows), :, place_N]]
                    cotangents = [*cotangents, gradient_BSCHW[row_N, slot_N].to(pixels.dtype)]
            of_x, *of_cache = torch.autograd.grad(leaving, [x, *entering], cotangents)
            gradient_BCfhw[rows, :, c : c + 1] = of_x
            passed = positions(onward, rows)
            carry = [each[passed] for each in of_cache]
        return gradient_BCfhw

    def gradient_share(
        self, latents_BCfhw: Tensor, frames_BS: Tensor, gradient_BSCHW: Tensor, window: int
    ) -> GradientShare:
        """Measures the latents' gradient that a window keeps, for given gradients of the decoded frames.

        Args:
            latents_BCfhw: normalised per channel.
            frames_BS: int64.
            gradient_BSCHW: gradient of a reward in the frames; any scale.
            window: W.

        Returns:
            Cosine and ratio of norms for each video, float32.
        """
        plan = ChunkPlan.of(frames_BS, self.stride)
        latents_BCfhw = latents_BCfhw.detach().requires_grad_()
        with torch.enable_grad():
            features = self.features(latents_BCfhw[:, :, : plan.count])
        with torch.no_grad():
            _, borders = self.stream(features, plan, keep=True)

        def through(window: int | None) -> Tensor:
            of_features = self.pull_back(features, borders, plan, gradient_BSCHW, window)
            (of_latents,) = torch.autograd.grad(features, latents_BCfhw, of_features, retain_graph=True)
            return of_latents.flatten(1).float()

        cut_BN, exact_BN = through(window), through(None)
        return GradientShare(torch.cosine_similarity(cut_BN, exact_BN), cut_BN.norm(dim=1) / exact_BN.norm(dim=1))

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


def _run_block(forward: Any, x: Tensor, feat_cache: Cache | None = None, feat_idx: list[int] | None = None) -> Tensor:
    """Runs a residual block as a pure function of its input and its caches, so that it may be computed again."""
    if feat_cache is None or feat_idx is None:
        return forward(x)
    place = feat_idx[0]
    here = slice(place, place + _CONVOLUTIONS)

    def pure(x: Tensor, *before: Tensor | None) -> Any:
        cache = list(before)
        return forward(x, cache, [0]), *cache

    y, *feat_cache[here] = checkpointed(pure, x, *feat_cache[here])
    feat_idx[0] = place + _CONVOLUTIONS
    return y


def _tensors(cache: Cache | None) -> list[Tensor]:
    return [each for each in cache or () if isinstance(each, Tensor)]


def _take(cache: Cache | None, rows: Tensor) -> Cache | None:
    """Returns the cache of some rows; the very tensors where these are all rows."""

    def some(tensor: Tensor) -> Tensor:
        return tensor if len(rows) == len(tensor) else tensor[rows]

    return cache and [some(each) if isinstance(each, Tensor) else each for each in cache]


def _restored(cache: Cache | None, like: Tensor) -> Cache | None:
    """Returns copies of kept tensors that share no graph, on the device and of the dtype of ``like``."""
    return cache and [each.detach().to(like) if isinstance(each, Tensor) else each for each in cache]
