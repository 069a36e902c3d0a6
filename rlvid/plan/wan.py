"""The networks of a Wan run on the meta device: the run's own model, of shapes alone, and what each of its parts costs.

The decoder is causal. A loss on its frames takes it forward chunk by chunk and back in a sweep, see
``rlvid.models.causal_decode``; both run here as in a training step. FLOPs are those of chunks with scored frames: the
others leave out the gradients of their last layers, some per cent of a sweep at most.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from rlvid.config.model import ModelConfig
from rlvid.models.causal_decode import CausalDecoder
from rlvid.models.chunk_plan import ChunkPlan
from rlvid.models.decoder_cache import Cache, tensors
from rlvid.models.folders import structure_folder
from rlvid.models.lora import inject_lora
from rlvid.models.recompute import recomputing
from rlvid.models.text_limit import text_length
from rlvid.models.text_rows import TEXT_LENGTH
from rlvid.models.unet3d import DTYPES
from rlvid.models.wan import WanModel
from rlvid.models.wan_parts import encoder_outline, outline_model
from rlvid.plan.measure import Cost, Meter, efficient_attention, measure
from rlvid.plan.network import DecodeCost, Network, network_of

_WITHOUT_DECODER = {key: field.default for key, field in ModelConfig.model_fields.items() if key.startswith("decode_")}
"""The settings of the decoder, which the denoiser's cost does not depend on."""


def shapes(spec: ModelConfig) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Returns the shapes of a video's latents (C, f, h, w) and of a prompt's embedding (L, D)."""
    folder, model = structure_folder(spec.path), outline_model(spec)
    rows = text_length(folder) if (folder / "tokenizer").is_dir() else TEXT_LENGTH
    assert isinstance(model.denoiser, WanTransformer3DModel), "no engine stands in its place"
    return model.latent_shape, (rows, model.denoiser.config.text_dim)


def transformer(spec: ModelConfig) -> tuple[Network, int]:
    """Returns the denoiser, measured on one branch of a video, and the number of layers with an adapter.

    Raises:
        ValueError: as ``rlvid.models.wan_parts.outline_model``, or no layer has a target's name.
    """
    return _transformer(spec.model_copy(update=_WITHOUT_DECODER).model_dump_json(), shapes(spec)[1])


@lru_cache(maxsize=8)  # measuring takes seconds, and plans are compared
def _transformer(settings: str, text_shape: tuple[int, int]) -> tuple[Network, int]:
    spec = ModelConfig.model_validate_json(settings)
    model = outline_model(spec)
    denoiser = model.denoiser
    base, adapter = sum(p.numel() for p in denoiser.parameters()), []
    if spec.finetune == "lora":
        adapter = inject_lora(denoiser, spec.lora.rank, spec.lora.targets, seed=0)
    else:
        denoiser.requires_grad_(True)
    with torch.device("meta"):
        inputs = torch.empty(1, *model.latent_shape), torch.empty(1), torch.empty(1, *text_shape)
    costs = []
    for again in (False, True):
        with recomputing(again):
            costs.append(measure(denoiser, partial(model.output, *inputs), backward=True, known=inputs))
    return network_of(denoiser, costs[0], base, cost_recomputed=costs[1]), len(adapter) // 2


@lru_cache(maxsize=4)
def text_encoder(path: str, precision: str, rows: int) -> Network:
    """Returns the text encoder, measured on one prompt of so many rows."""
    encoder = encoder_outline(structure_folder(path)).to(DTYPES[precision])
    tokens_1L = torch.zeros(1, rows, dtype=torch.int64, device="meta")

    def run() -> Tensor:
        text_1LD: Tensor = encoder(tokens_1L).last_hidden_state
        return text_1LD

    return network_of(encoder, measure(encoder, run, backward=False, known=(tokens_1L,)))


def autoencoder(spec: ModelConfig, scored: tuple[int, ...], *, backward: bool, recompute: bool) -> Network:
    """Returns the autoencoder: the cost of a chunk, and the memory of decoding the ``scored`` frames of a video.

    Args:
        spec: the model.
        scored: indices of frames.
        backward: whether the reward's gradient flows.
        recompute: whether chunks are computed again in the backward pass.
    """
    shape_alone = {"finetune": "full", "lora": ModelConfig().lora, "precision": "float32"}  # the rest is the denoiser's
    settings = spec.model_copy(update=shape_alone).model_dump_json()
    return _autoencoder(settings, scored, backward, recompute or spec.decode_window is not None)


@lru_cache(maxsize=64)  # advice takes up to six of a plan
def _autoencoder(described: str, scored: tuple[int, ...], backward: bool, sweeps: bool) -> Network:
    spec = ModelConfig.model_validate_json(described)
    model = outline_model(spec)
    settings = model._decoder.settings
    host = _HostMemory(settings.cache_dtype)
    if settings.offload:
        model._decoder._stored = host.store  # type: ignore[method-assign]
    first, caches = _chunk(model, None, backward, sweeps)
    later, caches = _chunk(model, caches, backward, sweeps)
    plain = _decode(spec.model_copy(update=_WITHOUT_DECODER).model_dump_json(), scored)
    decode, kept = plain, plain
    if backward:
        windowed = settings.window is not None
        decode = kept = _decode_for_a_loss(model, scored, plain.plain_peak, host, recompute=True)
        if not windowed:
            kept = _decode_for_a_loss(model, scored, plain.plain_peak, host, recompute=False)
        elif settings.share:
            decode = kept = replace(decode, share_peak=_share(model, caches), share_host=_share_host(model, scored))
    return network_of(model.vae, later, first_chunk=first, decode=decode, decode_kept=kept)


def _chunk(model: WanModel, cache: Cache | None, backward: bool, sweeps: bool) -> tuple[Cost, Cache]:
    """Returns the cost of a chunk, the first one of a video where there is no cache, and the cache after it."""
    decoder = model._decoder
    features = _features(model).requires_grad_(backward)
    with torch.no_grad(), efficient_attention(), Meter():  # which remembers layouts, and so takes less time
        _, after = decoder.chunk(features.detach(), cache)
    with recomputing(sweeps and decoder.settings.recompute_blocks):
        cost = measure(
            model.vae, lambda: decoder.chunk(features, cache)[0], backward=backward, known=(features, *tensors(cache))
        )
    return cost, after


class _HostMemory:
    """Counts the bytes of caches that a decoder stores in the CPU's memory.

    Args:
        dtype: of stored caches; None: their own.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype, self.bytes = dtype, 0

    def store(self, cache: Cache | None) -> Cache | None:
        """Returns tensors on the CPU that stand for a cache and take no memory; outlined ones cannot be copied."""
        return cache and [self._stand_in(each) if isinstance(each, Tensor) else each for each in cache]

    def _stand_in(self, tensor: Tensor) -> Tensor:
        made = torch.empty((), dtype=self.dtype or tensor.dtype).expand(tensor.shape)
        self.bytes += made.nbytes
        return made


def _features(model: WanModel, chunks: int = 1) -> Tensor:
    channels, _, height, width = model.latent_shape
    return torch.empty(1, channels, chunks, height, width, dtype=model.vae.dtype, device="meta")


@lru_cache(maxsize=64)
def _decode(described: str, scored: tuple[int, ...]) -> DecodeCost:
    model = outline_model(ModelConfig.model_validate_json(described))
    latents, frames_1S = torch.empty(1, *model.latent_shape, device="meta"), torch.tensor([scored])
    with efficient_attention(), torch.no_grad(), _meter(model, latents) as meter:
        model.decode_frames(latents, frames_1S)
    return DecodeCost(meter.peak)


def _decode_for_a_loss(
    model: WanModel, scored: tuple[int, ...], plain_peak: float, host: _HostMemory, *, recompute: bool
) -> DecodeCost:
    host.bytes = 0
    latents = torch.empty(1, *model.latent_shape, device="meta", requires_grad=True)
    gradient_1SCHW = torch.empty(1, len(scored), 3, model.height, model.width, device="meta")
    with efficient_attention(), _meter(model, latents, gradient_1SCHW) as meter:
        decoded = model.decode(latents, torch.tensor([scored]), recompute=recompute)
        forward_peak, held = meter.peak, meter.live
        meter.peak = held
        decoded.pull_back((decoded.frames * gradient_1SCHW).sum())
    return DecodeCost(plain_peak, forward_peak, held, meter.peak, host.bytes)


def _share(model: WanModel, cache: Cache) -> int:
    """Returns the bytes for the exact gradient of a chunk whose caches come from and go to the CPU's memory."""
    features = _features(model)
    place_N = torch.arange(model.stride)
    gradient_NCHW = torch.empty(len(place_N), 3, model.height, model.width, device="meta")
    scored = torch.zeros_like(place_N), place_N, gradient_NCHW
    with efficient_attention(), _meter(model, features, gradient_NCHW) as meter:
        before = [each.clone() if isinstance(each, Tensor) else each for each in cache]
        carry: list[Tensor | None] = [each.clone() for each in tensors(cache)]
        model._decoder._chunk_gradient(features, before, torch.tensor([0]), carry, scored, onward=True)
    return meter.peak


def _share_host(model: WanModel, scored: tuple[int, ...]) -> int:
    """Returns the bytes of the caches of all chunks, in the CPU's memory."""
    host, plan = _HostMemory(model._decoder.settings.cache_dtype), ChunkPlan.of(torch.tensor([scored]), model.stride)
    aside = CausalDecoder(model.vae, model._decoder.settings)
    aside._stored = host.store  # type: ignore[method-assign]
    with efficient_attention(), torch.no_grad(), Meter():
        aside.stream(_features(model, plan.count), plan, keep=True)
    return host.bytes


def _meter(model: WanModel, *known: Tensor) -> Meter:
    parts: Iterable[Tensor] = (*model.vae.parameters(), *model.vae.buffers())
    return Meter([*parts, *known])
