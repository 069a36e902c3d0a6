"""A check of the attention kernel of this machine's device."""

from collections.abc import Iterator

import torch

from rlvid.doctor.finding import Finding, finding
from rlvid.models.attention import WAY_OUT, keeps_scores, kept_growth


def check_attention() -> Iterator[Finding]:
    """Checks that what attention keeps grows as the number of tokens, and not as its square."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    grown = {str(dtype).removeprefix("torch."): kept_growth(dtype, device) for dtype in dtypes}
    square = [name for name, factor in grown.items() if keeps_scores(factor)]
    factors = ", ".join(f"{factor:.1f} times in {name}" for name, factor in grown.items())
    found = f"for 4 times the tokens of a Wan model it keeps {factors} ({device.type})"
    if square:
        found += f": the matrix of scores is kept in {' and '.join(square)}"
    yield finding("attention kernel", not square, found, WAY_OUT, "warning")
