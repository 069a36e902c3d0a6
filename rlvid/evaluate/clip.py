"""The CLIP model that measures videos: the built-in one, or a user's, with its own preprocessing."""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rlvid.models.folders import cached_folder
from rlvid.models.text_limit import TextLimit, token_counts
from rlvid.models.untrained import fill_constants
from rlvid.models.weights import check_texts, fill, read_json, read_weights
from rlvid.reward.builtin import BUILTIN
from rlvid.reward.clip import ClipReward
from rlvid.reward.load import load_builtin

_CHUNK = 64  # most images that are embedded at once


class FrameTextModel(Protocol):
    """A model that embeds frames and prompts in one space, as every CLIP reward does."""

    def image_features(self, frames_BSCHW: Tensor) -> Tensor:
        """Returns normalised embeddings (B, S, D) of frames in [0, 1], float32."""

    def text_features(self, prompts: list[str]) -> Tensor:
        """Returns normalised embeddings (B, D) of prompts, float32."""


class NamedClip:
    """A CLIP with its own preprocessing of 8-bit images, for measurement only: it gives no gradient.

    Args:
        images: N images (C, H, W), uint8, on the CPU -> features (N, D).
        texts: N prompts -> features (N, D).
        limit: of a prompt.
    """

    def __init__(
        self,
        images: Callable[[list[Tensor]], Tensor],
        texts: Callable[[list[str]], Tensor],
        limit: TextLimit,
    ) -> None:
        self._images, self._texts, self.limit = images, texts, limit

    @torch.no_grad()
    def image_features(self, frames_BSCHW: Tensor) -> Tensor:
        """See ``FrameTextModel``; frames are rounded to 8 bits, as in a video file."""
        pixels = (frames_BSCHW.flatten(0, 1).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        features = torch.cat([self._images(list(part)) for part in pixels.split(_CHUNK)]).float()
        return F.normalize(features, dim=-1).unflatten(0, frames_BSCHW.shape[:2])

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """See ``FrameTextModel``."""
        return F.normalize(self._texts(prompts).float(), dim=-1)


def load_clip(name: str, device: str | torch.device = "cpu") -> FrameTextModel:
    """Returns the CLIP that ``--clip`` names.

    Args:
        name: a built-in reward of frames, such as ``builtin-heldout``; a folder or hub id of a Hugging Face CLIP, of
            which the hub's must be in the local cache; or ``ARCHITECTURE:FILE``, an open_clip architecture and a
            checkpoint of it.
        device: where it runs.

    Raises:
        ValueError: there is no such model, or it is not a CLIP.
    """
    if name in BUILTIN:
        made = load_builtin(name, device)
        if not isinstance(made, ClipReward):
            raise ValueError(f"--clip {name!r} is a reward of whole videos; name a CLIP, such as builtin-heldout")
        return made
    architecture, colon, file = name.partition(":")
    return _open_clip(architecture, Path(file), device) if colon else _hugging_face(name, device)


def _hugging_face(name: str, device: str | torch.device) -> NamedClip:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    where, folder = f"--clip {name!r}", Path(name) if Path(name).is_dir() else cached_folder(name, "config.json")
    if folder is None or not (folder / "config.json").is_file():
        raise _no_clip(name)
    check_texts(folder, where)
    settings = read_json(folder / "config.json", where)
    if settings.get("model_type") != "clip":
        raise ValueError(f"{where} is a model of type {settings.get('model_type')!r}; expected a CLIP")
    weights = {n: tensor for n, tensor in read_weights(folder, where).items() if not n.endswith(".position_ids")}
    try:
        # No code of the folder is run, and the user is not asked for permission.
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except OSError:
        raise _no_clip(name) from None
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig.from_dict(settings))
    fill(model, weights, where)
    fill_constants(model)
    model = model.eval().float().to(device)
    length = model.config.text_config.max_position_embeddings

    def images(pixels: list[Tensor]) -> Tensor:
        ready = processor.image_processor(images=pixels, return_tensors="pt").pixel_values
        return model.get_image_features(ready.to(model.device, model.dtype)).pooler_output

    def texts(prompts: list[str]) -> Tensor:
        tokens = processor.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return model.get_text_features(**tokens.to(model.device)).pooler_output

    return NamedClip(images, texts, TextLimit(f"--clip {name}", length, partial(token_counts, processor.tokenizer)))


def _no_clip(name: str) -> ValueError:
    return ValueError(
        f"--clip {name!r} is no folder of a whole CLIP (config.json, model.safetensors, tokenizer, "
        f"preprocessor_config.json), and not in the local cache of the hub; to fetch it: "
        f"hf download {shlex.quote(name)}"
    )


def _open_clip(architecture: str, file: Path, device: str | torch.device) -> NamedClip:
    import open_clip
    from open_clip.model import convert_to_custom_text_state_dict
    from torchvision.transforms.functional import to_pil_image

    where = f"--clip {architecture}:{file}"
    if architecture not in open_clip.list_models():
        raise ValueError(f"{where}: open_clip has no {architecture!r}; it has ViT-B-32, ViT-H-14, ...")
    if not file.is_file():
        raise ValueError(f"{where}: there is no file {file}; expected a checkpoint of open_clip")
    weights = read_weights(file, where)
    _check_activation(architecture, file, weights, where)
    weights = {name: tensor for name, tensor in weights.items() if name not in _OPENAI}
    model, _, prepare = open_clip.create_model_and_transforms(architecture, pretrained=None, pretrained_hf=False)
    if "positional_embedding" in weights and not hasattr(model, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    fill(model, weights, where)
    model = model.eval().float().to(device)
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


_OPENAI = {"input_resolution", "context_length", "vocab_size"}
"""Numbers that OpenAI's own files of CLIP hold beside the weights."""
_QUICK = "-quickgelu"
"""End of open_clip's names of architectures that compute with QuickGELU."""


def _check_activation(architecture: str, file: Path, weights: dict[str, Tensor], where: str) -> None:
    """Raises ValueError for weights that were trained with the other activation, as far as can be known.

    Names and shapes fit either way, and scores are off by about 1e-3. Files are known by the names that open_clip
    publishes them under. OpenAI's weights are known by their three constants, or as every number of them is one of 16
    bits, stored as such or not.
    """
    import open_clip

    plain = architecture.removesuffix(_QUICK)
    pair = {False: plain, True: plain + _QUICK}
    if not set(pair.values()) <= set(open_clip.list_models()):
        return
    published = {}
    for tag in open_clip.list_pretrained_tags_by_model(plain):
        about = open_clip.get_pretrained_cfg(plain, tag)
        published[Path(about.get("url") or tag).name] = bool(about.get("quick_gelu", False))
    quick, why = published.get(file.name), "by its name"
    if quick is None and weights.keys() >= _OPENAI:
        quick, why = True, "it is OpenAI's"
    elif quick is None and all(torch.equal(t.half().to(t.dtype), t) for t in weights.values()):
        quick, why = True, "its numbers are of 16 bits, as OpenAI's are"
    if quick is not None and pair[quick] != architecture:
        raise ValueError(
            f"{where}: {file.name} was trained with another activation ({why}), and scores would be off by about 1e-3; "
            f"name it {pair[quick]}:{file}, or give a folder of transformers, whose config.json names the activation"
        )
