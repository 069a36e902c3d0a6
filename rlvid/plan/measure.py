"""FLOPs and bytes of a computation, counted operation by operation; on the meta device it takes no numbers at all."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """The cost of one row: a video in one branch, a frame, or an image.

    Attributes:
        flops: of the forward pass; a multiplication and an addition are two.
        backward_flops: of the backward pass, without computing anything again.
        plain_peak: bytes that live at once in a forward pass without a graph.
        kept: bytes that a forward pass with a graph keeps for the backward pass, its output included.
        peak: bytes that live at once in a forward pass with a graph and the backward pass after it.
    """

    flops: int
    backward_flops: int
    plain_peak: int
    kept: int
    peak: int

    @property
    def forward(self) -> "Cost":
        """The same without a graph, and so without a backward pass."""
        return Cost(self.flops, 0, self.plain_peak, 0, 0)


FREE = Cost(0, 0, 0, 0, 0)
"""The cost of a reward without a network: almost nothing."""


class Meter(TorchDispatchMode):
    """Counts FLOPs by the formulas of ``torch.utils.flop_counter``, and the bytes of tensors made within it.

    On the meta device, torch computes the shapes of an operation's outputs in Python, slowly. So they are remembered:
    tensors of the same layouts give outputs of the same layouts.

    Args:
        known: tensors that were there before, and are not counted.

    Attributes:
        flops: so far.
        live: bytes of tensors that were made within and are alive.
        peak: the largest value of ``live``.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no other storage takes their place
        self._seen = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation and notes what it did."""
        output = _run(func, args, kwargs or {})
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return output

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        weakref.finalize(storage, self._forget, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
_layouts: dict[Any, _Layout] = {}
"""Layouts of outputs on the meta device, by operation and arguments."""


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation; makes its output from a remembered layout where that is one new tensor on the meta device."""
    returns = func._schema.returns
    if func._schema.is_mutable or len(returns) != 1 or returns[0].alias_info is not None:
        return func(*args, **kwargs)
    tensors = list[Tensor]()
    key = func, _key(args, tensors), _key(list(kwargs.items()), tensors)
    if not tensors or not all(tensor.is_meta for tensor in tensors):
        return func(*args, **kwargs)
    if key in _layouts:
        shape, stride, dtype = _layouts[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    output = func(*args, **kwargs)
    if isinstance(output, Tensor) and output.is_meta:
        storage = output.untyped_storage()
        new = storage._cdata not in {tensor.untyped_storage()._cdata for tensor in tensors}
        if new and storage.nbytes() == output.numel() * output.element_size():
            _layouts[key] = output.shape, output.stride(), output.dtype
    return output


def _key(value: Any, tensors: list[Tensor]) -> Any:
    """Returns an argument in a form that can be hashed, tensors by their layouts; appends these to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_key(each, tensors) for each in value)
    return type(value), value


def measure(module: nn.Module, run: Callable[[], Tensor], *, backward: bool, known: Iterable[Tensor] = ()) -> Cost:
    """Costs of ``run()``, which calls ``module`` on one row.

    Args:
        module: its parameters and buffers are not counted.
        run: gives the output; where it has a graph, that must come from parameters of the module or ``known`` tensors.
        backward: whether to measure the backward pass too.
        known: other tensors that are there before, such as inputs.
    """
    known = [*module.parameters(), *module.buffers(), *known]
    with efficient_attention(), torch.no_grad(), Meter(known) as plain:
        run()
    if not backward:
        return Cost(plain.flops, 0, plain.peak, 0, 0)
    leaves = [tensor for tensor in known if tensor.requires_grad]
    for leaf in leaves:
        leaf.grad = torch.empty_like(leaf)
        known.append(leaf.grad)
    with efficient_attention(), Meter(known) as meter:
        output = run()
        kept, forward_flops = meter.live, meter.flops
        output.backward(torch.empty_like(output))
    for leaf in leaves:
        leaf.grad = None
    return Cost(forward_flops, meter.flops - forward_flops, plain.peak, kept, meter.peak)


@contextmanager
def efficient_attention() -> Iterator[None]:
    """Makes torch use memory-efficient attention on the meta device, as on other devices.

    Every device's fast kernel keeps queries, keys, values, output and one number a row, as the one for CPUs, whose
    shapes and FLOPs torch knows, does here.
    """
    original = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if query.device.type != "meta" or query.dim() != 4:
            return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=options.get("scale")
        )[0]
        return output

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]  # the same arguments by their usual names
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
