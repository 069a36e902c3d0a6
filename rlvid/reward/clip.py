"""Rewards on one open_clip backend: HPSv2, HPSv2.1, PickScore and CLIP score are cosines, the aesthetic one is affine.

=============  =========================================================================================
reward         score of a frame, with normalised features i of the image and t of the prompt
=============  =========================================================================================
HPSv2, v2.1    i . t, in [-1, 1]; the two versions have the same structure and scales that do not compare
CLIP score     i . t
PickScore      exp(logit scale) i . t
aesthetic      w . i + b, about 1 to 10 (LAION's linear head; the prompt plays no part)
=============  =========================================================================================
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTokenizer

from rlvid.files import damaged
from rlvid.reward.preprocess import Preprocess, normalise

Tokenise = Callable[[list[str]], Tensor]
"""Prompts -> token ids (B, L), int64."""
_PROBE = "a 1 é 一 ~"
"""Characters that a tokenizer must know, or have a token for."""

EMBEDDINGS = 4096
"""Embeddings of prompts that a reward keeps on its device; 16 MiB for HPSv2, whose D is 1024."""


def in_chunks(compute: Callable[..., Tensor], chunk: int, recompute: bool, *inputs: Tensor) -> Tensor:
    """``compute`` of at most ``chunk`` rows of the inputs at once.

    With ``recompute``, a chunk keeps its inputs alone and is computed again in the backward pass, so that the
    activations of one chunk at a time are in memory.
    """
    parts = zip(*(each.split(chunk) for each in inputs), strict=True)
    if recompute and torch.is_grad_enabled():
        return torch.cat([checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
    return torch.cat([compute(*part) for part in parts])


def at_least_float32(values: Tensor) -> Tensor:
    """Returns the values in float32, or as they are in float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class ImageFeatures(nn.Module):
    """The common part of rewards on a CLIP image tower; ``visual`` is the tower."""

    visual: nn.Module
    preprocess: Preprocess
    chunk: int
    recompute: bool

    def image_features(self, frames_BSCHW: Tensor) -> Tensor:
        """Returns normalised embeddings (B, S, D) of frames in [0, 1], float32; differentiable."""
        images = normalise(self.preprocess(frames_BSCHW.flatten(0, 1)))
        dtype = next(self.visual.parameters()).dtype
        features = in_chunks(lambda part: self.visual(part.to(dtype)), self.chunk, self.recompute, images)
        return nn.functional.normalize(at_least_float32(features), dim=-1).unflatten(0, frames_BSCHW.shape[:2])


class TextFeatures:
    """Embeds prompts with a frozen CLIP, and keeps the ``EMBEDDINGS`` that were used last.

    A prompt is embedded by itself: in a batch, its last bits would depend on the other prompts of the batch, so the
    kept embedding, and a run, would depend on the step at which the process started.
    """

    def __init__(self, clip: CLIP, tokenise: Tokenise) -> None:
        self.clip, self.tokenise = clip, tokenise
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Returns normalised embeddings (B, D), float32, or float64 of such weights."""
        for prompt in dict.fromkeys(prompts):
            own = self._kept.pop(prompt, None)
            self._kept[prompt] = self._embedding(prompt) if own is None else own  # last, since it is the one used last
        features_BD = torch.stack([self._kept[prompt] for prompt in prompts])
        while len(self._kept) > EMBEDDINGS:
            del self._kept[next(iter(self._kept))]
        return features_BD

    def _embedding(self, prompt: str) -> Tensor:
        features_1D = self.clip.encode_text(self.tokenise([prompt]).to(self.clip.logit_scale.device))
        return nn.functional.normalize(at_least_float32(features_1D), dim=-1)[0]


class ClipReward(ImageFeatures):
    """Scores frames against prompts with a CLIP model: the cosine times ``scale`` plus ``shift``.

    Args:
        clip: an open_clip model; it is frozen and put into evaluation mode.
        tokenise: prompts -> token ids (B, L).
        preprocess: how frames become the model's input.
        chunk: most images that go through the model at once.
        recompute: see ``in_chunks``.
        scale: factor of the cosines; PickScore takes the exponential of the model's logit scale.
        shift: is added to the product.
    """

    def __init__(
        self,
        clip: CLIP,
        tokenise: Tokenise,
        preprocess: Preprocess,
        chunk: int = 64,
        *,
        recompute: bool = False,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.clip, self.tokenise, self.preprocess = clip.eval().requires_grad_(False), tokenise, preprocess
        self.chunk, self.recompute, self.scale, self.shift = chunk, recompute, scale, shift
        self.text_features = TextFeatures(self.clip, tokenise)

    @property
    def visual(self) -> nn.Module:  # type: ignore[override]
        """The image tower."""
        return self.clip.visual

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_BS, float32."""
        cosine_BS = torch.einsum("bsd,bd->bs", self.image_features(frames_BSCHW), self.text_features(prompts))
        return cosine_BS * self.scale + self.shift


def build_clip(config: dict[str, Any]) -> CLIP:
    """Builds an open_clip model of a configuration in open_clip's form, with open_clip's initial weights."""
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    return CLIP(config["embed_dim"], vision, text, quick_gelu=config.get("quick_gelu", False))


def own_tokenizer(source: Path | None, where: str) -> CLIPTokenizer | None:
    """Returns the tokenizer in a model's folder; None where there is none, and OpenAI's is meant.

    Raises:
        ValueError: its files are damaged, or of a tokenizer that CLIP's class cannot be.
    """
    if source is None or not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    try:
        words = CLIPTokenizer.from_pretrained(source, local_files_only=True)
        words(_PROBE)
    except Exception as error:  # the library has no class of its own
        raise _no_tokenizer(error, where) from None
    if words.pad_token_id is None:
        raise _no_tokenizer("it has no padding token", where)
    return words


def _no_tokenizer(reason: object, where: str) -> ValueError:
    return damaged(
        f"{where}: its tokenizer", reason, "copy tokenizer.json, or vocab.json and merges.txt, of this model anew"
    )


def pad_with(words: CLIPTokenizer, length: int) -> Tokenise:
    """Wraps a transformers tokenizer into a function that pads and cuts to ``length`` tokens."""

    def tokenise(prompts: list[str]) -> Tensor:
        return words(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids

    return tokenise
