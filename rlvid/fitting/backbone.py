"""The models that a fit begins with: a CLIP, its tokenizer, and a head over frames."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from transformers import CLIPTokenizer

from rlvid.config.fit import BackboneConfig, FitConfig
from rlvid.reward.builtin import BUILTIN, builtin_folder
from rlvid.reward.clip import Tokenise, build_clip, own_tokenizer, pad_with
from rlvid.reward.fit.folder import Scorer, Spec, build_head, read_spec
from rlvid.reward.fit.models import Backbone, ImageScorer, VideoScorer, choose_layers
from rlvid.reward.preprocess import Preprocess
from rlvid.reward.published import (
    check_files,
    find_files,
    load_clip,
    load_random,
    preprocess_of,
    structure,
)


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
    where = f"{key} = {config.path!r}"
    foreign = None if config.name in BUILTIN else check_files(config.name, str(config.path), where)
    made = structure(config.name, builtin_folder(config.name) if config.name in BUILTIN else foreign, where)
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
    if foreign is None:
        return []
    return sorted(path for path in foreign.iterdir() if path.is_file()) if foreign.is_dir() else [foreign]


def preprocess_for(config: BackboneConfig, key: str = "backbone.path") -> Preprocess:
    """Returns the policy that makes frames the input of a backbone, without reading its weights."""
    if config.name in BUILTIN:
        return read_spec(builtin_folder(config.name), config.name).preprocess
    where = f"{key} = {config.path!r}"
    made = structure(config.name, find_files(config.name, str(config.path), where), where)
    return preprocess_of(config.name, made["vision_cfg"]["image_size"])


def begin(config: FitConfig, key: str = "backbone.path") -> Beginning:
    """Loads the CLIP of a fit, or builds it from the seed, and chooses the layers that are fitted.

    Raises:
        ValueError: as ``check_backbone``; or it has fewer layers.
    """
    backbone = config.backbone
    builtin, where = backbone.name in BUILTIN, f"{key} = {backbone.path!r}"
    source = builtin_folder(backbone.name) if builtin else find_files(backbone.name, str(backbone.path), where)
    made, words = structure(backbone.name, source, where), own_tokenizer(source, where)
    if builtin and backbone.path == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            clip: CLIP = build_clip(made)
        assert words is not None, "a built-in reward's folder has its tokenizer"
        tokenise = pad_with(words, made["text_cfg"]["context_length"])
    elif source is None:
        clip, tokenise = load_random(backbone.name, config.seed)
    else:
        clip, tokenise = load_clip(backbone.name, source, where)
    clip.float().eval()  # files may hold half precision, in which AdamW loses small steps, and drop patches
    choose_layers(clip, backbone.layers, image=backbone.towers == "both")
    return Beginning(clip, made, tokenise, words, preprocess_for(backbone, key))


def scorer_of(config: FitConfig, beginning: Beginning, axes: int, chunk: int = 64, recompute: bool = False) -> Scorer:
    """Makes the scorer that is fitted; new weights come from the seed."""
    grid = config.head.grid if config.kind == "video" else 0
    backbone = Backbone(beginning.clip, beginning.preprocess, grid=grid, chunk=chunk, recompute=recompute)
    if config.kind == "image":
        return ImageScorer(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return VideoScorer(backbone, build_head(config.head, beginning.clip, axes, "cpu"))


def spec_of(
    config: FitConfig, beginning: Beginning, axes: list[str], mean_A: Any, deviation_A: Any, combined: float = 1.0
) -> Spec:
    """Returns the settings of the fitted reward.

    Args:
        config: of the fit.
        beginning: of the fit.
        axes: that were fitted.
        mean_A: of the raw scores of base samples.
        deviation_A: of the same.
        combined: standard deviation of the mean of their standardised axes.
    """
    video = config.kind == "video"
    return Spec(
        axes=tuple(axes), preprocess=beginning.preprocess, head=config.head if video else None,
        frames=config.frames if video else None,
        base_mean=tuple(map(float, mean_A)), base_deviation=tuple(map(float, deviation_A)),
        combined_deviation=combined, mean=config.mean, deviation=config.deviation,
    )  # fmt: skip
