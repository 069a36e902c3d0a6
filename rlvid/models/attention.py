"""What attention keeps for the backward pass: a video transformer needs a kernel that keeps no matrix of scores.

With N tokens, the matrix has N^2 numbers a head: 51 GiB in a block of Wan2.1 T2V-1.3B for 81 frames of 480 x 832.
"""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

WAY_OUT = (
    "use a torch whose scaled_dot_product_attention has a flash or memory-efficient kernel for this device and "
    "precision, or unset DIFFUSERS_ATTN_BACKEND"
)
_TOKENS, _HEADS, _WIDTH = 256, 2, 128


def kept_growth(dtype: torch.dtype, device: torch.device) -> float:
    """Returns how many times as many bytes attention keeps for 4 times the tokens; takes milliseconds on a CPU."""
    few, many = (_kept_bytes(tokens, dtype, device) for tokens in (_TOKENS, 4 * _TOKENS))
    return many / few


def keeps_scores(growth: float) -> bool:
    """Returns whether a ``kept_growth`` is one of a matrix of scores."""
    return growth > 6  # 4 without the matrix, 16 with nothing else


def _kept_bytes(tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Returns the bytes that attention, as diffusers' Wan calls it, keeps for the backward pass."""
    kept = dict[int, int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    query, key, value = (
        torch.zeros(1, tokens, _HEADS, _WIDTH, dtype=dtype, device=device, requires_grad=True) for _ in range(3)
    )
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = dispatch_attention_fn(query, key, value)  # holds what was kept, or an address would be used twice
    assert output.requires_grad
    return sum(kept.values())
