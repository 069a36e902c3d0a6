"""The published structures of Wan's text-to-video models, for dry runs and for counting memory without weights.

Sizes are those of Wan-AI's checkpoints in diffusers' layout (scripts/convert_wan_to_diffusers.py there).
"""

from dataclasses import dataclass
from typing import Any

RANDOM_PREFIX = "random:"
"""Before a structure's name, ``model.path`` for that structure with random weights."""


@dataclass(frozen=True)
class Structure:
    """A published model: settings of its parts, its usual video, and the ``shift`` of its noise levels."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    shift: float
    frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16


def _transformer(heads: int, ffn: int, layers: int, channels: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "ffn_dim": ffn,
        "num_layers": layers,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 4096,
        "freq_dim": 256,
        "patch_size": [1, 2, 2],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }


_VAE_2_1: dict[str, Any] = {}  # the class's defaults
_VAE_2_2: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ],
}  # fmt: skip

STRUCTURES = {
    "wan2.1-t2v-1.3b": Structure(_transformer(12, 8960, 30, 16), _VAE_2_1, shift=3.0),
    "wan2.1-t2v-14b": Structure(_transformer(40, 13824, 40, 16), _VAE_2_1, shift=3.0),
    "wan2.2-ti2v-5b": Structure(_transformer(24, 14336, 30, 48), _VAE_2_2, 5.0, 121, 704, 1280, 24),
}
"""Structures by name; the last one only without a first image."""

UMT5_PARAMETERS = 5_680_910_336
"""Parameters of the text encoder that all of them share; it embeds prompts before training and is not kept."""
