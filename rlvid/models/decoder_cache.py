"""The cache of a causal decoder, and its residual blocks as pure functions of it."""

from functools import partial
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import Tensor, nn

from rlvid.models.recompute import checkpointed

Cache = list[Any]
"""Features that a chunk leaves to the next, one entry a convolution: a tensor (N, C, <= 2, h, w), None, "Rep"."""
Border = tuple[Tensor, Cache | None]
"""The cache that enters a chunk, of the videos (N,) whose gradient may reach it."""

_CONVOLUTIONS = 2  # of a residual block that have a cache


def tensors(cache: Cache | None) -> list[Tensor]:
    """Returns the tensors of a cache."""
    return [each for each in cache or () if isinstance(each, Tensor)]


def take(cache: Cache | None, rows_N: Tensor) -> Cache | None:
    """Returns the cache of some videos; the very tensors where these are all of them."""

    def some(tensor: Tensor) -> Tensor:
        return tensor if len(rows_N) == len(tensor) else tensor[rows_N]

    return cache and [some(each) if isinstance(each, Tensor) else each for each in cache]


def restored(cache: Cache | None, like: Tensor) -> Cache | None:
    """Returns kept tensors without their graph, on the device and of the dtype of ``like``."""
    return cache and [each.detach().to(like) if isinstance(each, Tensor) else each for each in cache]


def prepare_blocks(decoder: nn.Module) -> None:
    """Prepares a decoder's residual blocks for recomputation; names, weights and results do not change."""
    for module in decoder.modules():
        if isinstance(module, WanResidualBlock) and "forward" not in vars(module):
            module.forward = partial(_run_block, module.forward)


def _run_block(forward: Any, x: Tensor, feat_cache: Cache | None = None, feat_idx: list[int] | None = None) -> Tensor:
    """Runs a block as a pure function of its input and its caches; diffusers' own changes both arguments in place."""
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
