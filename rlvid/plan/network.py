"""A network of a run: its size, and what a row of it costs."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from rlvid.plan.measure import FREE, Cost


@dataclass(frozen=True)
class DecodeCost:
    """The memory of a loss on decoded frames, in bytes: of a video through a causal decoder, or of a micro-batch.

    Attributes:
        plain_peak: at once, without a graph.
        forward_peak: at once, while the frames are decoded.
        held: kept from then to the backward pass: the frames, and what that pass needs.
        backward_peak: at once in the decoder's backward pass, with the gradient of the frames.
        host: of the CPU's memory, for kept caches.
        share_peak: beside ``held``, while the gradient is measured that ``model.decode_window`` keeps; else 0. The
            measurement takes one video at a time.
        share_host: of the CPU's memory, beside ``host``, meanwhile.
    """

    plain_peak: float
    forward_peak: float = 0
    held: float = 0
    backward_peak: float = 0
    host: float = 0
    share_peak: float = 0
    share_host: float = 0


@dataclass(frozen=True)
class Network:
    """A network's size and the cost of a row.

    Attributes:
        parameters: in all.
        trainable: of these, the ones that are trained.
        weights: bytes of the parameters.
        cost: of one row; of a causal decoder, a chunk that is not a video's first.
        cost_recomputed: of one row, with the layers' activations computed again (of the denoiser).
        chunk: most rows at once (of rewards).
        recompute: whether chunks are computed again in the backward pass (of rewards).
        first_chunk: of the first chunk of a video (of causal decoders).
        decode: of a video, chunks computed again (of causal decoders).
        decode_kept: of a video, the graph of all chunks kept (of causal decoders).
    """

    parameters: int
    trainable: int
    weights: int
    cost: Cost
    cost_recomputed: Cost = FREE
    chunk: int = 1
    recompute: bool = False
    first_chunk: Cost = FREE
    decode: DecodeCost | None = None
    decode_kept: DecodeCost | None = None


NONE = Network(0, 0, 0, FREE)
"""Of a reward that needs no network."""


def network_of(module: nn.Module, cost: Cost, base: int | None = None, **others: Any) -> Network:
    """Returns the network of a module; ``base`` is its number of parameters without an adapter."""
    parameters = list(module.parameters())
    return Network(
        parameters=sum(p.numel() for p in parameters) if base is None else base,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights=sum(p.numel() * p.element_size() for p in parameters),
        cost=cost,
        **others,
    )
