"""The models that a fit begins with: a CLIP, its tokenizer, and a head over frames."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from transformers import CLIPTokenizer

from rlvid.config.fit import BackboneConfig, FitConfig
from rlvid.reward.clip import Tokenise, build_clip, pad_with
from rlvid.reward.fit.folder import Scorer, Spec, build_head
from rlvid.reward.fit.models import Backbone, ImageScorer, VideoScorer, choose_layers
from rlvid.reward.load import BUILTIN, load_builtin
from rlvid.reward.preprocess import Preprocess
from rlvid.reward.published import (
    check_files,
    find_files,
    load_clip,
    load_random,
    own_tokenizer,
    preprocess_of,
    structure,
)

_WEIGHTS = Path(str(resources.files("rlvid"))) / "toy" / "weights"


@dataclass(frozen=True)
class Beginning:
    """What a fit begins with.

    Attributes:
        clip: the model, with gradients where it is fitted.
        structure: of the model, in open_clip's form.
        tokenise: prompts -> token ids.
        tokenizer: to be saved with the result; None for OpenAI's.
        preprocess: the policy that makes frames its input.
    """

    clip: CLIP
    structure: dict[str, Any]
    tokenise: Tokenise
    tokenizer: CLIPTokenizer | None
    preprocess: Preprocess


def check_backbone(config: BackboneConfig, key: str = "backbone.path") -> list[Path]:
    """Checks the backbone's files without reading its weights; returns those that are not of this package.

    Raises:
        ValueError: they are missing, damaged or of another model, or it has fewer layers.
    """
    source, where = None, f"{key} = {config.path!r}"
    if config.name.startswith("builtin"):
        made = _structure_of_builtin(config.name)
    else:
        source = check_files(config.name, str(config.path), where)
        made = structure(config.name, source, where)
    blocks = [made[tower]["layers"] for tower in ("text_cfg", "vision_cfg")]
    if not all(isinstance(each, int) for each in blocks):
        raise ValueError(f"{where}: its image tower is no transformer; name another CLIP")
    if config.towers == "text":
        del blocks[1:]
    if config.layers is not None and config.layers > 1 + min(blocks):
        raise ValueError(
            f"backbone.layers = {config.layers}: the smaller tower has {1 + min(blocks)} groups of layers; allowed: 0 "
            f"to {1 + min(blocks)}, or null for all"
        )
    if source is None:
        return []
    return sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]


def preprocess_for(config: BackboneConfig, key: str = "backbone.path") -> Preprocess:
    """Returns the policy that makes frames the input of a backbone, without reading its weights."""
    if config.name.startswith("builtin"):
        return Preprocess(_structure_of_builtin(config.name)["vision_cfg"]["image_size"])
    where = f"{key} = {config.path!r}"
    made = structure(config.name, find_files(config.name, str(config.path), where), where)
    return preprocess_of(config.name, made["vision_cfg"]["image_size"])


def begin(config: FitConfig, key: str = "backbone.path") -> Beginning:
    """Loads the CLIP of a fit, or builds it from the seed, and chooses the layers that are fitted.

    Raises:
        ValueError: as ``check_backbone``; or it has fewer layers.
    """
    backbone = config.backbone
    builtin = backbone.name.startswith("builtin")
    made = _builtin(backbone, config.seed) if builtin else _published(backbone, config.seed, key)
    made.clip.float().eval()  # files may hold half precision, in which AdamW loses small steps, and drop patches
    choose_layers(made.clip, backbone.layers, image=backbone.towers == "both")
    return made


def _structure_of_builtin(name: str) -> dict[str, Any]:
    text = (_WEIGHTS / BUILTIN[name] / "config.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _builtin(config: BackboneConfig, seed: int) -> Beginning:
    made = _structure_of_builtin(config.name)
    words = CLIPTokenizer.from_pretrained(_WEIGHTS / "model" / "tokenizer", local_files_only=True)
    if config.path == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            clip = build_clip(made)
    else:
        clip = load_builtin(config.name).clip
    tokenise = pad_with(words, made["text_cfg"]["context_length"])
    return Beginning(clip, made, tokenise, words, Preprocess(made["vision_cfg"]["image_size"]))


def _published(config: BackboneConfig, seed: int, key: str) -> Beginning:
    where = f"{key} = {config.path!r}"
    source = find_files(config.name, str(config.path), where)
    clip, tokenise = load_random(config.name, seed) if source is None else load_clip(config.name, source, where)
    made = structure(config.name, source, where)
    return Beginning(clip, made, tokenise, own_tokenizer(source), preprocess_of(config.name, clip.visual.image_size))


def scorer_of(config: FitConfig, beginning: Beginning, axes: int, chunk: int = 64, recompute: bool = False) -> Scorer:
    """Makes the scorer that is fitted; new weights come from the seed."""
    grid = config.head.grid if config.kind == "video" else 0
    backbone = Backbone(beginning.clip, beginning.preprocess, grid=grid, chunk=chunk, recompute=recompute)
    if config.kind == "image":
        return ImageScorer(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return VideoScorer(backbone, build_head(config.head, beginning.clip, axes, "cpu"))


def spec_of(config: FitConfig, beginning: Beginning, axes: list[str], mean_A: Any, deviation_A: Any) -> Spec:
    """Returns the settings of the fitted reward; the raw scores of base samples have this mean and deviation."""
    return Spec(
        axes=tuple(axes), preprocess=beginning.preprocess, head=config.head if config.kind == "video" else None,
        base_mean=tuple(map(float, mean_A)), base_deviation=tuple(map(float, deviation_A)), mean=config.mean,
        deviation=config.deviation,
    )  # fmt: skip
