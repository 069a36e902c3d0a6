"""Untrained miniatures of Wan's classes, for tests and dry runs."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from rlvid.models.causal_decode import DecodeSettings
from rlvid.models.wan import WanModel
from rlvid.models.wan_text import UMT5Embedder

VAES: dict[str, dict[str, Any]] = {
    "2.1": {"base_dim": 4, "z_dim": 4, "scale_factor_spatial": 4},
    "2.2": {
        "base_dim": 4, "decoder_base_dim": 6, "z_dim": 6, "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_spatial": 8,
    },
}  # fmt: skip
"""Settings of tiny autoencoders of both kinds; the second one sees pixels in patches of two by two."""

WORDS = ("a", "red", "blue", "circle", "square", "moving", "left", "right", ",", "dog")
TEXT_WIDTH = 16


def tiny_wan_vae(kind: str = "2.1", seed: int = 0) -> AutoencoderKLWan:
    """Makes a random autoencoder of a kind, ``2.1`` or ``2.2``, that passes signals on: variance 1 / fan-in."""
    torch.manual_seed(seed)
    channels = VAES[kind]["z_dim"]
    vae = AutoencoderKLWan(
        **VAES[kind],
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=torch.linspace(-0.5, 0.5, channels).tolist(),
        latents_std=torch.linspace(0.5, 2.0, channels).tolist(),
    )
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    return vae.eval().requires_grad_(False)


def tiny_wan_text(length: int = 16) -> UMT5Embedder:
    """Makes a random text encoder with a vocabulary of words."""
    torch.manual_seed(1)
    vocabulary = {word: place for place, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )
    config = UMT5Config(
        vocab_size=len(vocabulary), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return UMT5Embedder(tokenizer, UMT5EncoderModel(config))


def tiny_wan(
    kind: str = "2.1",
    *,
    frames: int = 9,
    height: int = 16,
    width: int = 32,
    decode: DecodeSettings | None = None,
) -> WanModel:
    """Makes a random model with an autoencoder of a kind; the transformer has 20 k parameters."""
    vae, text = tiny_wan_vae(kind), tiny_wan_text()
    torch.manual_seed(2)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return WanModel(transformer, vae, text, frames=frames, height=height, width=width, decode=decode)


def tiny_wan_pipeline(model: WanModel) -> WanPipeline:
    """Returns diffusers' pipeline of a model's very parts, with the scheduler of the published models."""
    assert isinstance(model.text, UMT5Embedder)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=model.path.shift
    )
    return WanPipeline(model.text.tokenizer, model.text.encoder, model.vae, scheduler, model.denoiser)


def save_tiny_wan(folder: Path, kind: str = "2.1") -> None:
    """Writes ``tiny_wan(kind)`` as a folder in diffusers' layout, for ``model.path``."""
    tiny_wan_pipeline(tiny_wan(kind)).save_pretrained(folder)
