"""The CLIP that measures videos: a built-in one, or one that the user names, with its own preprocessing."""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rlvid.models.text_limit import TextLimit, token_counts
from rlvid.reward.load import BUILTIN, load_reward


class FrameTextModel(Protocol):
    """What embeds frames and prompts in one space; every CLIP reward does."""

    def image_features(self, frames_BSCHW: Tensor) -> Tensor:
        """Normalised embeddings (B, S, D) of frames in [0, 1], float32."""

    def text_features(self, prompts: list[str]) -> Tensor:
        """Normalised embeddings (B, D) of prompts, float32."""


class NamedClip:
    """A CLIP behind its own preprocessing of 8-bit images; it measures, and gives no gradient.

    Args:
        images: N images (C, H, W), uint8, on the CPU -> features (N, D).
        texts: N prompts -> features (N, D).
        limit: of a prompt.
        chunk: most images that are embedded at once.
    """

    def __init__(
        self,
        images: Callable[[list[Tensor]], Tensor],
        texts: Callable[[list[str]], Tensor],
        limit: TextLimit,
        chunk: int = 64,
    ) -> None:
        self._images, self._texts, self.limit, self._chunk = images, texts, limit, chunk

    @torch.no_grad()
    def image_features(self, frames_BSCHW: Tensor) -> Tensor:
        """See ``FrameTextModel``; frames are rounded to 8 bits, as in a video file."""
        pixels = (frames_BSCHW.flatten(0, 1).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        features = torch.cat([self._images(list(part)) for part in pixels.split(self._chunk)]).float()
        return F.normalize(features, dim=-1).unflatten(0, frames_BSCHW.shape[:2])

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """See ``FrameTextModel``."""
        return F.normalize(self._texts(prompts).float(), dim=-1)


def load_clip(name: str, device: str | torch.device = "cpu") -> FrameTextModel:
    """The CLIP that ``--clip`` names.

    Args:
        name: ``builtin-heldout`` or ``builtin``; a folder or hub id of a Hugging Face CLIP, of which the hub's must be
            in the local cache; or ``ARCHITECTURE:FILE``, an open_clip architecture and a checkpoint of it.
        device: where it runs.

    Raises:
        ValueError: there is no such model, or it is not a CLIP.
    """
    if name in BUILTIN:
        return load_reward(name, device)
    architecture, colon, file = name.partition(":")
    return _open_clip(architecture, Path(file), device) if colon else _hugging_face(name, device)


def _hugging_face(name: str, device: str | torch.device) -> NamedClip:
    from transformers import AutoConfig, CLIPModel, CLIPProcessor

    where: dict[str, Any] = {"local_files_only": True}
    try:
        kind = AutoConfig.from_pretrained(name, **where).model_type
        if kind != "clip":
            raise ValueError(f"--clip {name!r} is a model of type {kind!r}; expected a CLIP")
        model, found = CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True, **where)
        processor = CLIPProcessor.from_pretrained(name, **where)
    except OSError:
        raise ValueError(
            f"--clip {name!r} is no folder of a whole CLIP (config.json, model.safetensors, tokenizer, "
            f"preprocessor_config.json), and not in the local cache of the hub; to fetch it: "
            f"hf download {shlex.quote(name)}"
        ) from None
    if found["missing_keys"]:
        raise ValueError(f"--clip {name!r} lacks weights: {sorted(found['missing_keys'])[:3]}")
    model = model.eval().to(device)
    length = model.config.text_config.max_position_embeddings

    def images(pixels: list[Tensor]) -> Tensor:
        ready = processor.image_processor(images=pixels, return_tensors="pt").pixel_values
        return model.get_image_features(ready.to(model.device, model.dtype)).pooler_output

    def texts(prompts: list[str]) -> Tensor:
        tokens = processor.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return model.get_text_features(**tokens.to(model.device)).pooler_output

    return NamedClip(images, texts, TextLimit(f"--clip {name}", length, partial(token_counts, processor.tokenizer)))


def _open_clip(architecture: str, file: Path, device: str | torch.device) -> NamedClip:
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    if architecture not in open_clip.list_models():
        raise ValueError(
            f"--clip {architecture}:{file}: open_clip has no {architecture!r}; it has ViT-B-32, ViT-H-14, ..."
        )
    if not file.is_file():
        raise ValueError(f"--clip {architecture}:{file}: there is no file {file}; expected a checkpoint of open_clip")
    try:
        model, prepare = open_clip.create_model_from_pretrained(architecture, pretrained=str(file), device=device)
    except RuntimeError as error:  # keys or shapes of another architecture
        raise ValueError(f"--clip {architecture}:{file}: {' '.join(str(error).split())[:300]}") from None
    model.eval()
    tokenise = open_clip.get_tokenizer(architecture)

    def images(pixels: list[Tensor]) -> Tensor:
        ready = torch.stack([prepare(to_pil_image(each)) for each in pixels])
        return model.encode_image(ready.to(device))

    def counts(prompts: list[str]) -> list[int]:
        if isinstance(tokenise, open_clip.SimpleTokenizer):
            return [len(tokenise.encode(prompt)) + 2 for prompt in prompts]
        return token_counts(tokenise.tokenizer, prompts)

    limit = TextLimit(f"--clip {architecture}", tokenise.context_length, counts)
    return NamedClip(images, lambda prompts: model.encode_text(tokenise(prompts).to(device)), limit)
