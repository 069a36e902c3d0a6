"""Stage 3: the CLIPs that rewards begin with, open_clip models that match single frames with captions."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from rlvid.reward.clip import build_clip, pad_with
from rlvid.reward.preprocess import normalise
from rlvid.toy.pretrain.common import fit
from rlvid.toy.pretrain.text import CONTEXT_LENGTH
from rlvid.world.captions import write_captions
from rlvid.world.render import degrade, render, sample_clips, sample_degradation

LARGEST_SCALE = 50.0
"""Bound of the factor of cosines."""
_BATCH, _FRAMES = 128, 4


@dataclass(frozen=True)
class Vision:
    """The image tower: a ViT of ``layers`` blocks of ``width`` channels over square patches of ``patch`` pixels."""

    width: int
    layers: int
    patch: int = 4


def structure(vision: Vision, vocabulary: int) -> dict[str, Any]:
    """Returns a CLIP's configuration in open_clip's form; its text tower has two layers of 64 channels."""
    tower = {"layers": vision.layers, "width": vision.width, "head_width": 16, "image_size": 32}
    return {
        "embed_dim": 64,
        "vision_cfg": tower | {"patch_size": vision.patch},
        "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 4, "layers": 2, "vocab_size": vocabulary},
    }


def fit_clip(
    vision: Vision, degraded: float, seed: int, steps: int, tokenizer: CLIPTokenizer, device: torch.device
) -> CLIP:
    """Trains a CLIP on single frames of clips, a share of them ``degraded``, with the symmetric contrastive loss.

    Different seeds see different clips from the first step on.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_clip(structure(vision, len(tokenizer))).to(device).train()
    tokenise, targets_B = pad_with(tokenizer, CONTEXT_LENGTH), torch.arange(_BATCH, device=device)

    def loss_of_step(step: int) -> Tensor:
        clips = sample_clips(_BATCH, generator)
        kind_B, strength_B = sample_degradation(_BATCH, generator, degraded)
        frames_BFCHW = degrade(render(clips, frames=_FRAMES), kind_B, strength_B, generator)
        frames_BCHW = frames_BFCHW[torch.arange(_BATCH), torch.randint(_FRAMES, (_BATCH,), generator=generator)]
        tokens_BL = tokenise(write_captions(clips, generator)).to(device)
        image_BD = model.encode_image(normalise(frames_BCHW.to(device)), normalize=True)
        text_BD = model.encode_text(tokens_BL, normalize=True)
        logits_BB = model.logit_scale.exp().clamp(max=LARGEST_SCALE) * image_BD @ text_BD.T
        return (F.cross_entropy(logits_BB, targets_B) + F.cross_entropy(logits_BB.T, targets_B)) / 2

    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.0))
    fit([model], loss_of_step, steps=steps, peak=1.5e-3, name=f"CLIP {seed}")
    return model.eval().requires_grad_(False)
