"""Activation checkpointing layer by layer: a layer keeps its inputs alone and is computed again in the backward pass.

A checkpoint around a whole network would keep less between two of its calls, but in the backward pass all of the
network's activations come back at once, and that is the peak. Layer by layer, one layer's activations come back at a
time; the work is the same. The variant of torch that is not reentrant is used, since the other one gives wrong
gradients under ZeRO.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_on = False


@contextmanager
def recomputing(on: bool) -> Iterator[None]:
    """Checkpoints prepared layers in the block, when they run with a graph."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def prepare(network: nn.Module, layers: tuple[type[nn.Module], ...]) -> None:
    """Prepares every layer of these classes for checkpointing; names and weights do not change."""
    for module in network.modules():
        if isinstance(module, layers) and "forward" not in vars(module):
            module.forward = partial(checkpointed, module.forward)


def checkpointed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Runs a pure function of tensors, checkpointed where ``recomputing`` is on and a graph is built."""
    if _on and torch.is_grad_enabled():
        forward = partial(copy_context().run, forward)  # what the call's context holds, again in the backward pass
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
    return forward(*inputs, **options)
