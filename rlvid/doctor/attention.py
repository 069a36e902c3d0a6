"""A check of the attention kernel: a video transformer needs one that keeps no matrix of scores.

With N tokens, the matrix has N^2 numbers a head: 51 GiB in a block of Wan2.1 T2V-1.3B for 81 frames of 480 x 832.
"""

from collections.abc import Iterator

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from rlvid.doctor.finding import Finding, finding

_TOKENS, _HEADS, _WIDTH = 256, 2, 128
_WAY_OUT = (
    "use a torch whose scaled_dot_product_attention has a flash or memory-efficient kernel for this device and "
    "precision, or unset DIFFUSERS_ATTN_BACKEND"
)


def kept_bytes(tokens: int, dtype: torch.dtype, device: torch.device) -> int:
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


def check_attention() -> Iterator[Finding]:
    """Checks that what attention keeps grows as the number of tokens, and not as its square."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grown = {}
    for dtype in (torch.bfloat16, torch.float32):
        few, many = (kept_bytes(tokens, dtype, device) for tokens in (_TOKENS, 4 * _TOKENS))
        grown[str(dtype).removeprefix("torch.")] = many / few
    square = [name for name, factor in grown.items() if factor > 6]  # 4 without the matrix, 16 with nothing else
    factors = ", ".join(f"{factor:.1f} times in {name}" for name, factor in grown.items())
    found = f"for 4 times the tokens of a Wan model it keeps {factors} ({device.type})"
    if square:
        found += f": the matrix of scores is kept in {' and '.join(square)}"
    yield finding("attention kernel", not square, found, _WAY_OUT, "warning")
