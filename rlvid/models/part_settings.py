"""The settings of a model's parts: whole numbers where they must be, and parts that fit each other."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from rlvid.files import damaged

COUNTS = {
    "transformer": (
        "num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "freq_dim", "ffn_dim", "num_layers",
        "rope_max_seq_len",
    ),
    "unet": ("in_channels", "out_channels", "cross_attention_dim"),
    "vae": (
        "z_dim", "base_dim", "num_res_blocks", "scale_factor_spatial", "scale_factor_temporal", "latent_channels",
        "in_channels", "out_channels",
    ),
    "text_encoder": (
        "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "hidden_size", "num_attention_heads",
        "num_hidden_layers", "intermediate_size", "vocab_size",
    ),
}  # fmt: skip
"""Part -> its settings that are whole numbers above 0; one that a file lacks has the libraries' value."""
ODD = (
    TypeError, ValueError, AttributeError, AssertionError, ArithmeticError, LookupError, RuntimeError,
    StrictDataclassError,
)  # fmt: skip
"""Errors of constructors where a setting is of another type, or sizes do not divide."""
_AGAIN = "copy it anew"


def check_counts(part: str, settings: Mapping[str, Any], where: str) -> None:
    """Checks the types of a part's settings.

    Args:
        part: its folder's name.
        settings: from its ``config.json``.
        where: names the model, the part and the file.

    Raises:
        ValueError: one is not what it must be; the error has its key.
    """
    settings = settings.get("text_config", settings) if part == "text_encoder" else settings
    if not isinstance(settings, Mapping):
        raise damaged(where, "text_config is no table of settings", _AGAIN)
    for key in COUNTS[part]:
        if key in settings and not is_count(settings[key]):
            raise _odd(where, key, settings[key], "a whole number above 0")
    lists = {"block_out_channels": "some"} | ({"patch_size": "3"} if part == "transformer" else {})
    for key, count in lists.items():
        found = settings.get(key, [1, 1, 1])
        numbers = isinstance(found, list) and found and all(map(is_count, found))
        if not numbers or (count == "3" and len(found) != 3):
            raise _odd(where, key, found, f"{count} whole numbers above 0, in a list")


def check_wan_fit(settings: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Checks that the parts of a Wan model fit each other.

    Args:
        settings: of each part, by its folder's name.
        where: names the model.

    Raises:
        ValueError: the text encoder's width is not the denoiser's, or the autoencoder's numbers for latents are not
            one for each channel, or no numbers to divide by.
    """
    _check_width(
        settings["text_encoder"].get("d_model", 512),
        settings["transformer"].get("text_dim", 4096),
        "d_model",
        "transformer: text_dim",
        where,
    )
    vae = settings["vae"]
    channels = vae.get("z_dim", 16)
    for key in ("latents_mean", "latents_std"):
        found = vae.get(key, [1.0] * 16)
        if not isinstance(found, list) or len(found) != channels or not all(map(_is_finite, found)):
            raise ValueError(
                f"{where}: vae: {key} is not {channels} finite numbers, one for each channel of latents (z_dim); copy "
                "vae/config.json anew"
            )
        if key == "latents_std" and min(found) <= 0:
            raise ValueError(f"{where}: vae: {key} has {min(found):g}; allowed: numbers above 0; copy its file anew")


def check_unet_fit(settings: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Checks that the parts of a 3D U-Net fit each other; see ``check_wan_fit``.

    Raises:
        ValueError: the text encoder's width, or the autoencoder's channels, are not the denoiser's.
    """
    encoder, unet = settings["text_encoder"], settings["unet"]
    encoder = encoder.get("text_config", encoder)
    _check_width(
        encoder.get("hidden_size", 512),
        unet.get("cross_attention_dim", 1024),
        "hidden_size",
        "unet: cross_attention_dim",
        where,
    )
    made, read = settings["vae"].get("latent_channels", 4), unet.get("in_channels", 4)
    if made != read:
        raise ValueError(
            f"{where}: its autoencoder has {made} channels of latents (vae: latent_channels), and its denoiser reads "
            f"{read} (unet: in_channels); take all parts from one model that starts from text alone"
        )


def build(make: Callable[[dict[str, Any]], Any], settings: dict[str, Any], where: Path) -> Any:
    """Returns a part on the meta device.

    Args:
        make: its constructor.
        settings: from its file.
        where: the file.

    Raises:
        ValueError: no such part can be built.
    """
    try:
        with torch.device("meta"):
            return make(settings)
    except ODD as error:
        raise damaged(
            where, f"no network can be built of it: {error}", f"{_AGAIN}, or have a library that knows it"
        ) from None


def _check_width(made: Any, read: Any, made_by: str, read_by: str, where: str) -> None:
    if made != read:
        raise ValueError(
            f"{where}: its text encoder gives {made} numbers a token (text_encoder: {made_by}), and its denoiser reads "
            f"{read} ({read_by}); take all parts from one model"
        )


def _odd(where: str, key: str, value: Any, allowed: str) -> ValueError:
    return damaged(where, f"{key} = {json.dumps(value)[:60]}; expected {allowed}", _AGAIN)


def is_count(value: Any) -> bool:
    """Returns whether a setting is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
