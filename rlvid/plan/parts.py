"""A run's networks on the meta device, and what a row of each costs."""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from open_clip import get_model_config
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rlvid.config import RunConfig
from rlvid.models.folders import resolved_shape, structure_folder
from rlvid.models.lora import check_targets, inject_lora
from rlvid.models.unet3d import DTYPES
from rlvid.models.untrained import outline
from rlvid.plan.measure import FREE, Cost, measure
from rlvid.reward.clip import BUILTIN


@dataclass(frozen=True)
class Network:
    """A network's size and the cost of a row.

    Attributes:
        parameters: in all.
        trainable: of these, the ones that are trained.
        weights: bytes of the parameters.
        cost: of one row.
    """

    parameters: int
    trainable: int
    weights: int
    cost: Cost


_NONE = Network(0, 0, 0, FREE)


@dataclass(frozen=True)
class Parts:
    """A run's networks, and the shapes that they work on: latents (C, F, h, w), text (L, D), pixels."""

    denoiser: Network
    autoencoder: Network
    text_encoder: Network
    reward: Network
    held_out: Network
    adapted_layers: int
    latent_shape: tuple[int, int, int, int]
    text_shape: tuple[int, int]
    size: int


def outline_parts(config: RunConfig) -> Parts:
    """Builds and measures what ``config`` asks for; no weights are read.

    Raises:
        ValueError: the model's configuration is missing, its size does not fit, or no layer has a target's name.
    """
    spec, gradient = config.model, config.method.needs_gradient
    frames, size = resolved_shape(spec.path, spec.frames, spec.size)
    parts = _model(
        structure_folder(spec.path), spec.precision, frames, size, spec.lora.rank, tuple(spec.lora.targets), gradient
    )
    return replace(
        parts,
        reward=_reward(config.reward.name, spec.precision, size, gradient),
        held_out=_reward(config.reward.held_out, spec.precision, size, False),
    )


@lru_cache(maxsize=8)  # the full-size denoiser takes seconds, and plans are compared
def _model(
    folder: Path, precision: str, frames: int, size: int, rank: int, targets: tuple[str, ...], gradient: bool
) -> Parts:
    unet, vae, encoder = (nn.Module.to(p, DTYPES[precision]).requires_grad_(False) for p in outline(folder))
    check_targets(unet, list(targets))
    base = sum(p.numel() for p in unet.parameters())
    adapter = inject_lora(unet, rank, list(targets), seed=0)
    side = size // 2 ** (len(vae.config.block_out_channels) - 1)
    latent_shape = (unet.config.in_channels, frames, side, side)
    text_shape = (encoder.config.max_position_embeddings, encoder.config.hidden_size)
    return Parts(
        denoiser=_network(unet, _denoise(unet, latent_shape, text_shape), base),
        autoencoder=_network(vae, _decode(vae, side, gradient)),
        text_encoder=_network(encoder, FREE),
        reward=_NONE,
        held_out=_NONE,
        adapted_layers=len(adapter) // 2,
        latent_shape=latent_shape,
        text_shape=text_shape,
        size=size,
    )


def _denoise(unet: Any, latent_shape: tuple[int, ...], text_shape: tuple[int, int]) -> Cost:
    with torch.device("meta"):
        latents_BCFhw = torch.empty(1, *latent_shape, dtype=unet.dtype)
        text_BLD = torch.empty(1, *text_shape, dtype=unet.dtype)
        timestep_B = torch.empty(1, dtype=torch.int64)

    def run() -> Tensor:
        output: Tensor = unet(latents_BCFhw, timestep_B, encoder_hidden_states=text_BLD, return_dict=False)[0]
        return output

    return measure(unet, run, backward=True, known=(latents_BCFhw, text_BLD, timestep_B))


def _decode(vae: Any, side: int, backward: bool) -> Cost:
    latents_NChw = torch.empty(
        1, vae.config.latent_channels, side, side, dtype=vae.dtype, device="meta", requires_grad=backward
    )
    return measure(vae, lambda: vae.decode(latents_NChw).sample, backward=backward, known=(latents_NChw,))


def _network(module: nn.Module, cost: Cost, base: int | None = None) -> Network:
    parameters = list(module.parameters())
    return Network(
        parameters=sum(p.numel() for p in parameters) if base is None else base,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights=sum(p.numel() * p.element_size() for p in parameters),
        cost=cost,
    )


def _reward(name: str | None, precision: str, size: int, backward: bool) -> Network:
    if name is None or name == "oracle":  # the oracle is arithmetic on pixels
        return _NONE
    with torch.device("meta"):
        images_NCHW = torch.empty(1, 3, size, size, requires_grad=backward)
        judge = _BlipJudge() if name == "imagereward" else _ClipJudge(_clip_config(name))
    judge.eval().requires_grad_(False).to(DTYPES["float32" if name in BUILTIN else precision])
    return _network(judge, measure(judge, lambda: judge(images_NCHW), backward=backward, known=(images_NCHW,)))


def _clip_config(name: str) -> dict[str, Any]:
    if name in BUILTIN:
        path = Path(str(resources.files("rlvid"))) / "toy" / "weights" / BUILTIN[name] / "config.json"
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return dict(get_model_config("ViT-H-14"))  # HPSv2 and HPSv2.1


class _ClipJudge(nn.Module):
    """An open_clip reward: what is computed for each image; text features are computed once for each prompt."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        vision = CLIPVisionCfg(**config["vision_cfg"])
        self.clip = CLIP(config["embed_dim"], vision, CLIPTextCfg(**config["text_cfg"]))
        self.size = vision.image_size

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.clip.encode_image(_resize(images_NCHW, self.size).to(self.clip.logit_scale.dtype)).float()


class _BlipJudge(nn.Module):
    """ImageReward: ViT-L/16, BERT-base that looks at the image in every layer, and five linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=224,
                patch_size=16,
            )
        )
        text = BlipTextConfig(
            vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12, max_position_embeddings=512
        )
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (768, 1024, 128, 64, 16, 1)
        self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        weight = next(self.head.parameters())
        seen = self.vision(_resize(images_NCHW, 224).to(weight.dtype)).last_hidden_state
        tokens_NL = torch.zeros(len(images_NCHW), 35, dtype=torch.int64, device=weight.device)
        # The padding's mask is left out: transformers would look at its values, and it only adds to the logits.
        read = self.text(tokens_NL, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        return self.head(read[:, 0]).float()


def _resize(images_NCHW: Tensor, size: int) -> Tensor:
    return F.interpolate(images_NCHW, (size, size), mode="bicubic", antialias=True, align_corners=False)
