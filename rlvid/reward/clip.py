"""Rewards on one open_clip backend: cosine of normalised image and text features, as HPSv2 has it."""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from rlvid.reward.preprocess import Preprocess, normalise


class ClipReward(nn.Module):
    """Scores frames against prompts with a CLIP model; the score is a cosine in [-1, 1], without logit scale.

    Args:
        clip: an open_clip model; it is frozen and put into evaluation mode.
        tokenise: prompts -> token ids (B, L).
        preprocess: how frames become the model's input.
        chunk: most images that go through the model at once.
    """

    def __init__(
        self, clip: CLIP, tokenise: Callable[[list[str]], Tensor], preprocess: Preprocess, chunk: int = 64
    ) -> None:
        super().__init__()
        self.clip, self.tokenise, self.preprocess, self.chunk = (
            clip.eval().requires_grad_(False),
            tokenise,
            preprocess,
            chunk,
        )
        self._text: dict[str, Tensor] = {}

    def image_features(self, frames_BSCHW: Tensor) -> Tensor:
        """Normalised embeddings (B, S, D) of frames in [0, 1], float32; differentiable."""
        images = normalise(self.preprocess(frames_BSCHW.flatten(0, 1)))
        weight = self.clip.logit_scale
        features = torch.cat([self.clip.encode_image(part.to(weight)) for part in images.split(self.chunk)])
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return nn.functional.normalize(features, dim=-1).unflatten(0, frames_BSCHW.shape[:2])

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Normalised embeddings (B, D) of prompts, float32, computed once for each prompt."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._text]
        if new:
            device = self.clip.logit_scale.device
            features = self.clip.encode_text(self.tokenise(new).to(device))
            features = nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
            self._text.update(zip(new, features, strict=True))
        return torch.stack([self._text[p] for p in prompts])

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """scores_BS, float32."""
        return torch.einsum("bsd,bd->bs", self.image_features(frames_BSCHW), self.text_features(prompts))


BUILTIN = {"builtin": "reward", "builtin-heldout": "heldout"}


def load_reward(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """A reward of the built-in world: ``builtin`` to train on, ``builtin-heldout`` to be judged by, or the ``oracle``.

    Raises:
        ValueError: no such reward.
    """
    if name == "oracle":
        from rlvid.toy.oracle import OracleReward

        return OracleReward()
    if name not in BUILTIN:
        raise ValueError(f"reward {name!r} does not exist; allowed: {', '.join(BUILTIN)}, oracle")
    weights = Path(str(resources.files("rlvid"))) / "toy" / "weights"
    return load_clip_folder(weights / BUILTIN[name], weights / "model" / "tokenizer", device)


def load_clip_folder(folder: Path, tokenizer: Path, device: str | torch.device = "cpu") -> ClipReward:
    """A reward from ``config.json`` (open_clip's own) and ``model.safetensors``, with a CLIP tokenizer's folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    clip = CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]))
    clip.load_state_dict(load_file(folder / "model.safetensors"))
    words = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
    length = config["text_cfg"]["context_length"]

    def tokenise(prompts: list[str]) -> Tensor:
        return words(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids

    return ClipReward(clip.to(device), tokenise, Preprocess(size=config["vision_cfg"]["image_size"]))
