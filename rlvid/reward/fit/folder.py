"""The folder of a fitted reward: ``rlvid reward fit`` writes it, and ``reward.name=fitted`` reads it.

=============================  ================================================================================
file                           content
=============================  ================================================================================
``reward.json``                ``Spec``: the axes, the preprocessing, the head, the mapping of scores
``open_clip_config.json``      structure of the CLIP
``model.safetensors``          its weights, by open_clip's names
``head.safetensors``           of a video reward: the weights over the features of frames
``tokenizer.json`` and others  the CLIP's tokenizer, unless it is OpenAI's
=============================  ================================================================================

A reward answers m + s mean_a((raw_a - m_a) / s_a) / c: each axis is standardised by the mean m_a and the deviation s_a
of base samples, and c is the deviation of the mean over the axes, below 1 where axes differ. So the answers for base
samples have the mean m and the deviation s of the reward that it stands in for, and its learning rates carry over.

``reward.json`` has the SHA-256 of each file that scores depend on, and of its own settings: files of two fits can have
the same shapes, and would give other scores.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.model import CLIP
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from rlvid.config.fit import HeadConfig
from rlvid.files import damaged, write_atomic
from rlvid.models.stored import save_tokenizer
from rlvid.models.weights import check_fit, check_texts, fill, headers, read_json, read_weights
from rlvid.reward.clip import ClipReward, TextFeatures
from rlvid.reward.fit.models import Backbone, ImageScorer, TemporalHead, VideoScorer, patch_width, width_of
from rlvid.reward.fit.seal import CONFIG, HEAD, SPEC, check_seal, seal
from rlvid.reward.preprocess import Preprocess
from rlvid.reward.published import check_clip, load_clip
from rlvid.reward.segments import middle_frames

Scorer = ImageScorer | VideoScorer


class Spec(BaseModel):
    """``reward.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    axes: tuple[str, ...] = Field(min_length=1, description="what was asked, such as quality; a head each")
    preprocess: Preprocess = Field(description="the policy that makes frames the CLIP's input")
    head: HeadConfig | None = Field(None, description="of a reward of whole videos; null: a cosine of single frames")
    frames: int | None = Field(
        None, ge=1, description="of a video, that a reward of whole videos looks at, as many as in its fit; null: all"
    )
    base_mean: tuple[float, ...] = Field(description="mean raw score of base samples, an axis each")
    base_deviation: tuple[float, ...] = Field(description="standard deviation of the same, above 0")
    combined_deviation: float = Field(
        1.0, gt=0, description="standard deviation of the mean of the standardised axes over base samples; one axis: 1"
    )
    mean: float = Field(0.0, description="mean of the answers for base samples")
    deviation: float = Field(1.0, gt=0, description="standard deviation of the same")
    sha256: dict[str, str] | None = Field(
        None, description="of each file, and of the settings here but mean and deviation; null: not checked"
    )

    @model_validator(mode="after")
    def _fits(self) -> "Spec":
        if not len(self.axes) == len(self.base_mean) == len(self.base_deviation):
            raise ValueError("axes, base_mean and base_deviation differ in length")
        if not all(each > 0 for each in self.base_deviation):
            raise ValueError(f"base_deviation = {list(self.base_deviation)}: a deviation must be above 0")
        if self.head is None and len(self.axes) > 1:
            raise ValueError(f"axes = {list(self.axes)}: a cosine has one axis")
        if self.head is None and self.frames is not None:
            raise ValueError(f"frames = {self.frames}: a cosine is of each frame; leave it out")
        if len(self.axes) == 1 and self.combined_deviation != 1:
            raise ValueError(f"combined_deviation = {self.combined_deviation}: of one axis it is 1")
        return self


class FittedVideoReward(nn.Module):
    """A fitted reward of whole videos: ``(frames_BFCHW in [0, 1], prompts) -> score_B``.

    It looks at as many frames as in its fit, ``spec.frames``, evenly from end to end, since its head judges motion by
    the change from frame to frame; a video of fewer frames repeats some, as the readers of a fit do. The others have no
    gradient.
    """

    whole_video = True
    base_mean_A: Tensor
    base_deviation_A: Tensor

    def __init__(self, scorer: VideoScorer, text: TextFeatures, spec: Spec) -> None:
        super().__init__()
        self.scorer, self.text_features, self.spec = scorer.eval().requires_grad_(False), text, spec
        self.register_buffer("base_mean_A", torch.tensor(spec.base_mean))
        self.register_buffer("base_deviation_A", torch.tensor(spec.base_deviation))

    def forward(self, frames_BFCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns score_B, at least float32; differentiable."""
        frames, count = frames_BFCHW.shape[1], self.spec.frames or frames_BFCHW.shape[1]
        places = middle_frames(frames, count)
        image_BFD, patch_BFN = self.scorer.backbone(frames_BFCHW[:, places] if count < frames else frames_BFCHW)
        if count > frames:
            image_BFD, patch_BFN = image_BFD[:, places], patch_BFN[:, places]
        raw_BA = self.scorer.score(image_BFD, patch_BFN, self.text_features(prompts))
        standard_B = ((raw_BA - self.base_mean_A) / self.base_deviation_A).mean(1)
        return self.spec.mean + self.spec.deviation * (standard_B / self.spec.combined_deviation)


def save_fitted(
    folder: Path, spec: Spec, scorer: Scorer, config: dict[str, Any], tokenizer: CLIPTokenizer | None = None
) -> None:
    """Writes a fitted reward into a folder that exists.

    Args:
        folder: of the reward.
        spec: its settings.
        scorer: its models.
        config: the CLIP's structure, in open_clip's form.
        tokenizer: of the CLIP; None for OpenAI's.
    """
    save_clip(folder, scorer.backbone.clip, config, tokenizer)
    if isinstance(scorer, VideoScorer):
        save_file(_weights(scorer.head), folder / HEAD)
    later = {"frames"} if spec.frames is None else None  # left out, it is as earlier versions wrote it
    seal(folder, spec.model_dump(mode="json", exclude=later))


def save_clip(folder: Path, clip: CLIP, config: dict[str, Any], tokenizer: CLIPTokenizer | None = None) -> None:
    """Writes a CLIP into a folder that exists: the part of a fitted reward that a fit can begin with.

    Args:
        folder: of the model.
        clip: the model.
        config: its structure, in open_clip's form.
        tokenizer: of the CLIP; None for OpenAI's.
    """
    save_file(_weights(clip), folder / "model.safetensors")
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    write_atomic(folder / CONFIG, json.dumps({"model_cfg": config}, indent=2).encode())


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in module.state_dict().items()}


def read_spec(path: str | Path, where: str) -> Spec:
    """Returns the settings of a fitted reward.

    Raises:
        ValueError: the file is missing or damaged; ``where`` begins the message.
    """
    folder = Path(path).expanduser()
    if not (folder / SPEC).is_file():
        raise ValueError(f"{where}: no {SPEC} there; name a folder that rlvid reward fit wrote")
    check_texts(folder, where)
    try:
        return Spec.model_validate(read_json(folder / SPEC, where))
    except (ValidationError, TypeError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        named = ".".join(map(str, reason["loc"]))
        raise damaged(f"{where}: {SPEC}", f"{named}: {reason['msg']}", "fit the reward anew") from None


def check_fitted(path: str, where: str) -> Spec:
    """Checks a fitted reward's files without loading its weights; returns its settings.

    Raises:
        ValueError: a file is missing, damaged, of another model or of another fit; ``where`` begins the message.
    """
    spec, folder = read_spec(path, where), Path(path).expanduser()
    for name in (CONFIG, *([] if spec.head is None else [HEAD])):
        if not (folder / name).is_file():
            raise ValueError(f"{where}: no {name} there; copy the whole folder")
    clip, *_ = check_clip("fitted", folder, headers(folder / "model.safetensors", where), where)
    size = clip.visual.image_size
    if spec.preprocess.size not in (size, *(size[:1] if isinstance(size, tuple) else ())):
        raise damaged(f"{where}: {SPEC}", f"preprocess.size = {spec.preprocess.size}, and the CLIP sees {size}")
    if spec.head is not None:
        made, found = build_head(spec.head, clip, len(spec.axes)), headers(folder / HEAD, where)
        if not {"change.weight", *(["motion.norm.weight"] if spec.head.motion else [])} <= found.keys():
            raise ValueError(f"{where}: {HEAD} is of an earlier version of rlvid; fit the reward anew")
        check_fit(made.state_dict(), found, f"{where}: {HEAD}")
    check_seal(folder, where)
    return spec


def build_head(config: HeadConfig, clip: CLIP, axes: int, device: str | torch.device = "meta") -> TemporalHead:
    """Returns the head of a video reward over the features of a CLIP; on ``meta`` it is without numbers."""
    sizes = width_of(clip, config.grid), clip.visual.output_dim, axes
    with torch.device(device):
        return TemporalHead(
            *sizes, patch=patch_width(clip), motion=config.motion, width=config.width, layers=config.layers,
            heads=config.heads,
        )  # fmt: skip


def load_fitted(
    path: str,
    device: str | torch.device = "cpu",
    *,
    where: str,
    precision: str = "float32",
    chunk: int = 8,
    recompute: bool = True,
) -> ClipReward | FittedVideoReward:
    """Loads a fitted reward, frozen.

    Args:
        path: of its folder.
        device: where it computes.
        where: the beginning of errors.
        precision: of the CLIP's weights; the head of a video reward is float32.
        chunk: most frames in one pass of the CLIP.
        recompute: see ``rlvid.reward.clip.in_chunks``.

    Raises:
        ValueError: as ``check_fitted``; or a weight is not finite.
    """
    spec, folder = check_fitted(path, where), Path(path).expanduser()
    clip, tokenise = load_clip("fitted", folder, where)
    preprocess = spec.preprocess
    scale = Backbone(clip, preprocess).scale.detach()  # before a coarser type rounds it
    clip = clip.to(device, getattr(torch, precision))
    if spec.head is None:
        (base_mean,), (base_deviation,) = spec.base_mean, spec.base_deviation
        # Multiplied first: a reward with base_deviation = deviation * scale is the plain cosine, to the last bit.
        factor = spec.deviation * float(scale) / base_deviation
        shift = spec.mean - spec.deviation * base_mean / base_deviation
        return ClipReward(clip, tokenise, preprocess, chunk, recompute=recompute, scale=factor, shift=shift)
    head = build_head(spec.head, clip, len(spec.axes))
    fill(head, read_weights(folder / HEAD, where), f"{where}: {HEAD}")
    head.float()
    backbone = Backbone(clip, preprocess, grid=spec.head.grid, chunk=chunk, recompute=recompute, scale=scale)
    return FittedVideoReward(VideoScorer(backbone, head), TextFeatures(clip, tokenise), spec).to(device)
