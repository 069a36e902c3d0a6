"""Untrained miniatures of the real classes, for tests and dry runs: a model and a reward in well under a second."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from diffusers.models.resnet import TemporalConvLayer
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from rlvid.models.stored import save_text_encoder, save_tokenizer
from rlvid.models.unet3d import UNet3DModel
from rlvid.reward.clip import ClipReward
from rlvid.reward.preprocess import Preprocess
from rlvid.toy.pretrain.denoiser import build_scheduler
from rlvid.toy.pretrain.text import CONTEXT_LENGTH, build_text_encoder, build_tokenizer


def tiny_model(*, frames: int = 4, size: int = 16) -> UNet3DModel:
    """Makes a random model with 60 k parameters; draws temporal convolutions anew, because they start at zero."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=size // 2,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    for module in unet.modules():
        if isinstance(module, TemporalConvLayer):
            torch.nn.init.normal_(module.conv4[-1].weight, std=0.1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=size,
    )
    tokenizer = build_tokenizer()
    text_encoder, scheduler = build_text_encoder(tokenizer, 16), build_scheduler()
    return UNet3DModel(unet, vae, text_encoder, tokenizer, scheduler, frames=frames, height=size, width=size)


def save_tiny_model(folder: Path) -> None:
    """Writes ``tiny_model()`` as a folder in diffusers' layout, for ``model.path``."""
    model = tiny_model()
    for name, part in {"unet": model.denoiser, "vae": model.vae, "scheduler": build_scheduler()}.items():
        part.save_pretrained(folder / name)
    save_text_encoder(model.text_encoder, folder / "text_encoder")
    save_tokenizer(model.tokenizer, folder / "tokenizer")


def tiny_reward(seed: int = 0) -> ClipReward:
    """Returns a random reward of open_clip's class over frames of 16 pixels."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    vision = CLIPVisionCfg(layers=1, width=16, head_width=8, image_size=16, patch_size=4)
    text = CLIPTextCfg(context_length=CONTEXT_LENGTH, vocab_size=len(tokenizer), width=16, heads=2, layers=1)

    def tokenise(prompts: list[str]) -> Tensor:
        return tokenizer(
            prompts, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
        ).input_ids

    return ClipReward(CLIP(16, vision, text), tokenise, Preprocess(16))


def save_tiny_clip(folder: Path, seed: int = 0) -> None:
    """Writes a random CLIP as a Hugging Face folder: model, tokenizer and image processor."""
    tokenizer = build_tokenizer()
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shared | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_LENGTH}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = shared | {"image_size": 16, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
