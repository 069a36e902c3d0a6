"""The parts of a Wan text-to-video model: from a folder in diffusers' layout, or of a structure with random weights."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from rlvid.models import untrained
from rlvid.models.causal_decode import DecodeSettings
from rlvid.models.folders import cached_folder, read_config
from rlvid.models.unet3d import DTYPES
from rlvid.models.wan import WanModel, check_shape
from rlvid.models.wan_structures import RANDOM_PREFIX, STRUCTURES, Structure
from rlvid.models.wan_text import RandomEmbedder, TextEmbedder, UMT5Embedder
from rlvid.models.weights import check_fit, check_texts, fill, headers, read_json, read_weights

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
"""Folders of a model in diffusers' layout."""
NETWORKS = ("transformer", "vae", "text_encoder")
"""Those of them that have weights."""

EXACT = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""Names within a transformer whose parameters are float32 always, as diffusers loads them."""

_CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}
_ENCODER = "umt5"
_FILES = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # two names of one tensor; files hold either or both
_OTHERS = "supported: WanPipeline with one transformer, as Wan2.1 T2V and Wan2.2 TI2V-5B have"


def load_wan(
    path: str,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    precision: str = "float32",
    text: bool = True,
    negative_prompt: str = "",
    decode: DecodeSettings | None = None,
    device: str | torch.device = "cpu",
) -> WanModel:
    """Loads a folder in diffusers' layout, a hub id that is in the Hugging Face cache, or ``random:`` and a structure.

    Args:
        path: ``model.path``.
        frames: F; default: the published models' own, as for the two below.
        height: in pixels.
        width: in pixels.
        precision: of transformer and text encoder. The autoencoder is float32 always, and so are the transformer's time
            embedding, its norms and their tables.
        text: load the text encoder; of a random structure, embeddings are drawn.
        negative_prompt: the prompt of the unconditional branch.
        decode: how the decoder's gradient is computed.
        device: of the weights.

    Raises:
        ValueError: as ``wan_folder``, ``WanModel``, or weights that are damaged or of another structure.
    """
    dtype, folder = DTYPES[precision], None if path.startswith(RANDOM_PREFIX) else wan_folder(path)
    structure = _named(path) if folder is None else _stored_structure(path, folder)
    transformer, vae = outline(structure.transformer, structure.vae)
    asked = {"frames": frames, "height": height, "width": width}
    shape: dict[str, Any] = {
        name: getattr(structure, name) if value is None else value for name, value in asked.items()
    }
    check_shape(transformer, vae, **shape)
    embedder: TextEmbedder | None = None
    if folder is None:
        to_precision(transformer, dtype, "meta", EXACT)
        for seed, part in enumerate((transformer, vae)):
            fill_random(part.to_empty(device=device), seed)
        if text:
            embedder = RandomEmbedder(structure.transformer["text_dim"], device=device, dtype=dtype)
    else:
        for name, part in zip(NETWORKS, (transformer, vae), strict=False):
            fill(part, read_weights(folder / name, _where(path, name)), _where(path, name))
        if text:
            embedder = _stored_text(path, folder, dtype, device)
    _fill_constants(transformer)
    to_precision(transformer, dtype, device, EXACT)
    to_precision(vae, torch.float32, device)
    shape |= {"fps": structure.fps, "shift": structure.shift}
    return WanModel(transformer, vae, embedder, **shape, negative_prompt=negative_prompt, decode=decode)


def check_wan(path: str) -> None:
    """Checks that the weights of ``model.path`` are all there and fit its structure; no numbers are read.

    Raises:
        ValueError: as ``load_wan``, but for numbers that are not finite.
    """
    if path.startswith(RANDOM_PREFIX):
        _named(path)
        return
    folder = wan_folder(path)
    parts = (*outline(read_config(folder, "transformer"), read_config(folder, "vae")), _encoder_outline(folder))
    for name, part in zip(NETWORKS, parts, strict=True):
        where = _where(path, name)
        check_fit(_untied(part.state_dict()), _untied(headers(folder / name, where)), where)


def wan_folder(path: str) -> Path:
    """Returns the folder of ``model.path``, after a check of its parts and classes.

    Raises:
        ValueError: it or one of its parts is missing, or it is another model: of images, or with two transformers.
    """
    found = Path(path) if Path(path).exists() else cached_folder(path, "model_index.json")
    if found is None:
        raise ValueError(
            f"model.path = {path!r} is neither a folder nor in the Hugging Face cache; expected a folder in diffusers' "
            f"layout with {', '.join(PARTS)}, or one of {', '.join(RANDOM_PREFIX + name for name in STRUCTURES)}"
        )
    where = f"model.path = {path!r}"
    index = read_json(found / "model_index.json", where)
    if index.get("_class_name") != "WanPipeline":
        raise ValueError(f"{where}: model_index.json is of a {index.get('_class_name')}; {_OTHERS}")
    if any(index.get("transformer_2") or ()) or (found / "transformer_2").exists():
        raise ValueError(f"{where}: it has a second transformer (transformer_2); {_OTHERS}")
    wanted = {part: _FILES.get(part, "config.json") for part in PARTS}
    missing = [f"{part}/{file}" for part, file in wanted.items() if not (found / part / file).is_file()]
    if missing:
        raise ValueError(f"{where}: {found} lacks {', '.join(missing)}; copy the whole model, or fetch the rest")
    for part in PARTS:
        check_texts(found / part, f"{where}: {part}")
    _check_classes(where, found)
    return found


def _check_classes(where: str, folder: Path) -> None:
    for part, expected in _CLASSES.items():
        name = read_config(folder, part).get("_class_name")
        if name != expected:
            raise ValueError(f"{where}: its {part} is a {name}; supported: {expected}")
    kind = read_config(folder, "text_encoder").get("model_type")
    if kind != _ENCODER:
        raise ValueError(f"{where}: its text encoder is of type {kind!r}; supported: {_ENCODER!r}")
    transformer, channels = read_config(folder, "transformer"), read_config(folder, "vae").get("z_dim", 16)
    if transformer.get("image_dim") is not None or transformer.get("in_channels", 16) != channels:
        raise ValueError(f"{where}: its transformer is conditioned on images (image_dim, in_channels); {_OTHERS}")


def outline(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[WanTransformer3DModel, AutoencoderKLWan]:
    """Returns both networks of a structure on the meta device, float32: layers and shapes, no numbers."""
    with untrained.NoDraws(), torch.device("meta"):
        return WanTransformer3DModel.from_config(transformer).eval(), AutoencoderKLWan.from_config(vae).eval()


def to_precision(network: nn.Module, dtype: torch.dtype, device: str | torch.device, exact: Iterable[str] = ()) -> None:
    """Moves a network, in place; parameters with one of the ``exact`` names on their way are float32."""
    nn.Module.to(network, device)  # diffusers' own warns of nothing
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(dtype if set(exact).isdisjoint(name.split(".")) else torch.float32)


@torch.no_grad()
def fill_random(network: nn.Module, seed: int) -> None:
    """Draws all weights as ``rlvid.models.untrained.fill`` does; gains of RMS norms are one."""
    untrained.fill(network, seed)
    for layer in network.modules():
        if isinstance(layer, WanRMS_norm):
            layer.gamma.fill_(1.0)
        elif isinstance(layer, nn.RMSNorm | UMT5LayerNorm):
            layer.weight.fill_(1.0)


def _where(path: str, part: str) -> str:
    return f"model.path = {path!r}: {part}"


def _named(path: str) -> Structure:
    name = path.removeprefix(RANDOM_PREFIX)
    if name not in STRUCTURES:
        known = ", ".join(RANDOM_PREFIX + each for each in STRUCTURES)
        raise ValueError(f"model.path = {path!r}: there is no structure {name!r}; allowed: {known}")
    return STRUCTURES[name]


def _stored_structure(path: str, folder: Path) -> Structure:
    """Returns a folder's settings, with the usual video of the published models that have its kind of autoencoder."""
    transformer, vae = read_config(folder, "transformer"), read_config(folder, "vae")
    scheduler = read_json(folder / "scheduler" / _FILES["scheduler"], _where(path, "scheduler"))
    shift = float(scheduler.get("flow_shift", scheduler.get("shift", 1.0)))
    like = STRUCTURES["wan2.2-ti2v-5b" if vae.get("is_residual") else "wan2.1-t2v-1.3b"]
    return replace(like, transformer=transformer, vae=vae, shift=shift)


def _stored_text(path: str, folder: Path, dtype: torch.dtype, device: str | torch.device) -> UMT5Embedder:
    encoder, where = _encoder_outline(folder), _where(path, "text_encoder")
    weights = _untied(read_weights(folder / "text_encoder", where))
    check_fit(_untied(encoder.state_dict()), weights, where)
    fill(encoder, weights | {name: weights[source] for name, source in _TIED.items()}, where)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    to_precision(encoder, dtype, device, ("wo",) if dtype == torch.float16 else ())  # half precision overflows there
    return UMT5Embedder(tokenizer, encoder)


def _encoder_outline(folder: Path) -> UMT5EncoderModel:
    with untrained.NoDraws(), torch.device("meta"):
        return UMT5EncoderModel(UMT5Config(**read_config(folder, "text_encoder"))).eval()


def _untied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of which each tensor has one name."""
    found = {_TIED.get(name, name): tensor for name, tensor in weights.items() if name in _TIED}
    return found | {name: tensor for name, tensor in weights.items() if name not in _TIED}


def _fill_constants(transformer: WanTransformer3DModel) -> None:
    """Computes the table of rotations, which no file holds."""
    config = transformer.config
    transformer.rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
