"""What both sides of a parity test are made from: sizes, weights, pixels and prompts that follow from a seed alone.

It imports torch only: the golden scripts use it in environments that know nothing of rlvid.
"""

from typing import Any

import torch
from torch import Tensor, nn

HPS = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 40, "head_width": 10, "patch_size": 7},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2},
}
"""An HPSv2 in miniature, with heads that are not 64 wide, as in ViT-H-14."""
BLIP: dict[str, dict[str, Any]] = {
    "vision": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": 32, "patch_size": 8},
    "text": {"hidden_size": 24, "encoder_hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 3, "vocab_size": 101, "max_position_embeddings": 64, "bos_token_id": 2,
             "sep_token_id": 3},
}  # fmt: skip
"""An ImageReward in miniature."""
FULL_BLIP: dict[str, dict[str, Any]] = {
    "vision": {"hidden_size": 1024, "image_size": 224},
    "text": {"hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12, "vocab_size": 30524, "max_position_embeddings": 512},
}  # fmt: skip
"""An ImageReward in full."""

SIZES = ((28, 28), (56, 56), (40, 28), (28, 61), (97, 33), (31, 90), (112, 63), (17, 23), (45, 46))
GRADIENTS = SIZES[:5]
"""Heights and widths of the frames: squares, the model's own size, portrait, landscape, odd, and small ones."""

FULL = ((256, 256), (180, 320))
"""Of the full-size check."""

PROMPTS = (
    "a red circle moving left",
    "A Dog, running!  fast\tand\nfar",
    "caf\u00e9 na\u00efve \u00fcber 3.14 50%",
    "\u732b\u304c\u8d70\u308b \U0001f408\u200d\u2b1b",
    "Tom &amp; Jerry&#39;s <b>house</b>",
    "it's we'll they'd I'm don't",
    "",
    "x" * 400,
    " ".join(["word"] * 120),
    "mojibake: \u00e2\u20ac\u201c and \ufb01ne ligatures",
)
"""Ordinary text and odd text: accents, other scripts, entities, contractions, nothing, and far too much."""


def named(module: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of a reference's weights, as they stand in its checkpoint."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """A checkpoint with numbers of ordinary size, each tensor drawn from its own name and the seed."""
    return {name: _drawn(name, shape, seed) for name, shape in shapes.items()}


def _drawn(name: str, shape: list[int], seed: int) -> Tensor:
    if name.endswith("position_ids"):
        return torch.arange(shape[-1])[None]
    if name.endswith("logit_scale"):
        return torch.tensor(2.3)
    own = sum(ord(sign) * (place + 1) for place, sign in enumerate(name))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + own)
    scale = 0.05 if len(shape) < 2 else (1.0 if name.startswith("mlp.") else 1.5) / shape[-1] ** 0.5
    gain = name.endswith("weight") and any(part in name for part in ("ln_", "norm", "LayerNorm"))
    return torch.randn(shape, generator=generator) * scale + float(gain)


def pixels(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth picture with some noise: (3, H, W), multiples of 1/255 inside (0, 1).

    No pixel is saturated: rlvid clamps frames, which has no gradient there, and the packages do not. In float64, for
    float32's last bit depends on the number of threads, and rounding would make a whole level of it.
    """
    generator = torch.Generator().manual_seed(seed * 7919 + height * 1009 + width)
    coarse = torch.rand(1, 3, 5, 6, generator=generator).double()
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)[0]
    noise = torch.rand(3, height, width, generator=generator).double()
    return (1.4 * (0.8 * smooth + 0.2 * noise) - 0.2).clamp(0.02, 0.98).mul(255).round().float().div(255)


def vocabulary() -> list[str]:
    """101 lines of a BERT vocabulary: signs and a few words, so that most words fall to pieces."""
    signs = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs)]
    words += [".", ",", "!", "'", "%", ":", "&", ";", "#", "<", ">", "/", "red", "circle", "left", "moving", "dog"]
    words += ["##ing", "##ed", "word", "cafe", "running"]
    assert len(words) == 99
    return words
