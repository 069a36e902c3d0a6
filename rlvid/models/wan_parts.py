"""The parts of a Wan text-to-video model: from a folder in diffusers' layout, or of a structure with random weights."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from rlvid.config.model import ModelConfig
from rlvid.models import untrained
from rlvid.models.causal_decode import DecodeSettings
from rlvid.models.flow_shift import stored_shift
from rlvid.models.folders import STRUCTURES, WAN, model_folder, structure_folder
from rlvid.models.text_rows import TextEmbedder
from rlvid.models.unet3d import DTYPES
from rlvid.models.video_shape import VideoShape, decoder_chunks, resolved_shape
from rlvid.models.wan import WanModel
from rlvid.models.wan_text import RandomEmbedder, UMT5Embedder
from rlvid.models.weights import check_fit, fill, headers, read_weights

EXACT = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""Names within a transformer whose parameters are float32 always, as diffusers loads them."""

_TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # two names of one tensor; files hold either or both


def load_wan(
    spec: ModelConfig,
    *,
    text: TextEmbedder | bool = True,
    denoiser: bool = True,
    negative_prompt: str = "",
    device: str | torch.device = "cpu",
) -> WanModel:
    """Loads the model of ``spec``; random weights are always the same.

    Args:
        spec: path, shape, shift, window of the decoder's gradient, and the precision of transformer and text encoder.
            The autoencoder is float32 always, and so are the transformer's time embedding, its norms and their tables.
        text: embeds prompts; true loads the model's own encoder, or draws embeddings where weights are random, and
            false none.
        denoiser: whether the transformer is needed; without it, it stays on the meta device.
        negative_prompt: the prompt of the unconditional branch.
        device: of the weights.

    Raises:
        ValueError: as ``model_folder``, ``resolved_shape``, ``stored_shift``, ``WanModel``, or weights that are damaged
            or of another structure.
    """
    dtype, shape, folder = DTYPES[spec.precision], resolved_shape(spec), model_folder(spec.path)
    transformer, vae = outline(folder)
    width: int = transformer.config.text_dim
    if isinstance(text, bool):
        embedder = _embedder(spec.path, folder, width, dtype, device) if text else None
    else:
        embedder = text
    for seed, (name, part) in enumerate({"transformer": transformer, "vae": vae}.items()):
        if part is transformer and not denoiser:
            continue
        of, exact = (dtype, EXACT) if part is transformer else (torch.float32, ())
        if spec.path in STRUCTURES:
            to_precision(part, of, "meta", exact)
            fill_random(part.to_empty(device=device), seed)
        else:
            fill(part, read_weights(folder / name, _where(spec.path, name)), _where(spec.path, name))
        if part is transformer:
            _fill_constants(transformer)
        to_precision(part, of, device, exact)
    model = _assembled(spec, shape, transformer, vae, embedder)
    model.set_negative_prompt(negative_prompt)
    return model


def outline_model(spec: ModelConfig) -> WanModel:
    """Returns the model of ``spec`` on the meta device, as ``load_wan`` makes it, but without numbers and text encoder.

    Raises:
        ValueError: as ``structure_folder``, ``resolved_shape``, ``stored_shift`` and ``WanModel``.
    """
    shape = resolved_shape(spec)
    transformer, vae = outline(structure_folder(spec.path))
    to_precision(transformer, DTYPES[spec.precision], "meta", EXACT)
    return _assembled(spec, shape, transformer, vae, None)


def _assembled(
    spec: ModelConfig,
    shape: VideoShape,
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    embedder: TextEmbedder | None,
) -> WanModel:
    return WanModel(
        transformer, vae, embedder, frames=shape.frames, height=shape.height, width=shape.width, fps=shape.fps,
        shift=spec.shift or stored_shift(structure_folder(spec.path)),
        decode=decode_settings(spec),
    )  # fmt: skip


def decode_settings(spec: ModelConfig) -> DecodeSettings:
    """Returns how the gradient through the decoder is computed, by the settings of a run.

    Of a window of all chunks nothing is measured, for it leaves nothing out.
    """
    half = None if spec.decode_cache_precision == "float32" else DTYPES[spec.decode_cache_precision]
    window = spec.decode_window
    measured = spec.decode_share and (window is None or window < decoder_chunks(spec))
    return DecodeSettings(window, half, spec.decode_offload, measured)


def check_wan(path: str) -> None:
    """Checks that the weights of ``model.path`` are all there and fit its structure; no numbers are read.

    Raises:
        ValueError: as ``load_wan``, but for numbers that are not finite.
    """
    folder = model_folder(path)
    if path in STRUCTURES:
        return
    for name, part in zip(WAN.networks, (*outline(folder), encoder_outline(folder)), strict=True):
        where = _where(path, name)
        check_fit(_untied(part.state_dict()), _untied(headers(folder / name, where)), where)


def outline(folder: Path) -> tuple[WanTransformer3DModel, AutoencoderKLWan]:
    """Returns transformer and autoencoder on the meta device, float32: layers and shapes, no numbers."""
    transformer = untrained.outline_part(folder, "transformer", WanTransformer3DModel.from_config)
    return transformer.eval(), untrained.outline_part(folder, "vae", AutoencoderKLWan.from_config).eval()


def to_precision(network: nn.Module, dtype: torch.dtype, device: str | torch.device, exact: Iterable[str] = ()) -> None:
    """Moves a network, in place; parameters with one of the ``exact`` names on their way are float32.

    Parameters change their precision before they move: the device need not hold them as they were stored.
    """
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(dtype if set(exact).isdisjoint(name.split(".")) else torch.float32)
    nn.Module.to(network, device)  # diffusers' own warns of nothing


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


def _embedder(path: str, folder: Path, width: int, dtype: torch.dtype, device: str | torch.device) -> TextEmbedder:
    if path in STRUCTURES:
        return RandomEmbedder(width, device=device, dtype=dtype)
    return _stored_text(path, folder, dtype, device)


def _stored_text(path: str, folder: Path, dtype: torch.dtype, device: str | torch.device) -> UMT5Embedder:
    encoder, where = encoder_outline(folder), _where(path, "text_encoder")
    weights = _untied(read_weights(folder / "text_encoder", where))
    check_fit(_untied(encoder.state_dict()), weights, where)
    fill(encoder, weights | {name: weights[source] for name, source in _TIED.items()}, where)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    to_precision(encoder, dtype, device, ("wo",) if dtype == torch.float16 else ())  # half precision overflows there
    return UMT5Embedder(tokenizer, encoder)


def encoder_outline(folder: Path) -> UMT5EncoderModel:
    """Returns the text encoder on the meta device, float32."""
    return untrained.outline_part(folder, "text_encoder", lambda s: UMT5EncoderModel(UMT5Config(**s))).eval()


def _untied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights of which each tensor has one name."""
    found = {_TIED.get(name, name): tensor for name, tensor in weights.items() if name in _TIED}
    return found | {name: tensor for name, tensor in weights.items() if name not in _TIED}


def _fill_constants(transformer: WanTransformer3DModel) -> None:
    """Computes the table of rotations, which no file holds."""
    config = transformer.config
    transformer.rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
