"""The settings of a reward that is fitted to preference pairs."""

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from rlvid.config.parse import apply_override, explain
from rlvid.config.reward_names import BuiltinReward, HeldOutReward
from rlvid.config.section import Decay, Section
from rlvid.credentials import refuse_credentials, refuse_credentials_in_arguments


class BackboneConfig(Section):
    """The CLIP that a fit begins with."""

    name: Literal[BuiltinReward, HeldOutReward, "clip", "hpsv2", "hpsv2.1", "pickscore"] = Field(
        "builtin", description="the CLIP of a reward: the built-in one, or a published one"
    )
    path: str | None = Field(None, description="its file or folder, as reward.path; 'random' for untrained weights")
    layers: int | None = Field(
        None,
        ge=0,
        description="last groups of layers of each tower that are fitted: 1 is the projections, 2 adds the last "
        "blocks; 0 fits the head alone; null: all weights",
    )

    towers: Literal["both", "text"] = Field(
        "both",
        description="what is fitted of it: both towers, or the text's alone; then, as with layers=0, what the image "
        "tower says of the frames is computed once, and steps are quick",
    )

    @model_validator(mode="after")
    def _path_fits(self) -> "BackboneConfig":
        builtin = self.name.startswith("builtin")
        if builtin and self.path not in (None, "random"):
            raise ValueError(f"path = {self.path!r}: {self.name!r} takes none but 'random'; name another backbone")
        if not builtin and self.path is None:
            raise ValueError(f"path is not set, and the backbone {self.name!r} needs it: a file or folder, or 'random'")
        return self


class HeadConfig(Section):
    """The transformer over the features of frames, of a reward of whole videos."""

    grid: int = Field(4, ge=1, description="patches of a frame are averaged to a square of this side")
    motion: int = Field(
        32, ge=0, description="channels of a patch whose energy of motion is seen; 0 as in earlier versions"
    )
    width: int = Field(128, ge=2, description="of its tokens; a multiple of heads, and even")
    layers: int = Field(2, ge=1, description="of the transformer")
    heads: int = Field(4, ge=1, description="of its attention")

    @model_validator(mode="after")
    def _divides(self) -> "HeadConfig":
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width = {self.width} is not even, or no multiple of heads = {self.heads}; allowed: 128")
        return self


class FitConfig(Section):
    """The settings of ``rlvid reward fit``."""

    kind: Literal["image", "video"] = Field("image", description="a reward of single frames, or of whole videos")
    axes: tuple[str, ...] = Field((), description="axes of votes to fit; default: all that the pairs have")
    frames: int = Field(
        8,
        ge=1,
        description="frames of a video that are read, evenly from end to end; a reward of whole videos looks at "
        "as many",
    )
    backbone: BackboneConfig = BackboneConfig()
    head: HeadConfig = HeadConfig()
    preferences: float = Field(1.0, ge=0, description="weight of Bradley and Terry's loss; 0 fits without votes")
    contrastive: float = Field(
        0.0, ge=0, description="weight of CLIP's contrastive loss, within groups of a batch; keeps prompts apart"
    )
    steps: int = Field(400, ge=1, description="optimiser steps")
    batch_size: int = Field(32, ge=1, description="pairs in a step, of all workers")
    group: int = Field(8, ge=1, description="pairs whose gradient is computed at once; the same for all workers")
    lr: float = Field(1e-4, gt=0, le=1, description="highest learning rate")
    warmup: int = Field(20, ge=1, description="steps of linear warm-up; then half a cosine follows")
    average: Decay = Field(0.99, description="decay of the moving average of the weights, which is the result")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the gradient")
    seed: int = Field(
        0, ge=0, lt=2**31, description="of the order of pairs, of drawn frames, of new weights, of the split"
    )
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the prompts whose pairs are not fitted on")
    base: str = Field(
        "base", description="model whose samples set the unit of scores; where no pair names it, all videos do"
    )
    mean: float = Field(0.0, description="mean score of base samples: that of the reward that it stands in for")
    deviation: float = Field(1.0, gt=0, description="standard deviation of the same")
    workers: int = Field(1, ge=1, description="processes that fit together")
    readers: int = Field(1, ge=1, description="tasks that read videos side by side")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPU cores that a worker reserves; threads of its torch")
    use_gpu: bool | None = Field(None, description="whether workers get a GPU each; null: where the cluster has them")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    max_failures: int = Field(3, ge=0, description="restarts after the loss of a worker")
    grace_period: float = Field(20, ge=0, description="seconds for a step and a checkpoint after an interruption")

    @model_validator(mode="after")
    def _fits(self) -> "FitConfig":
        if self.batch_size % self.group or self.batch_size // self.group % self.workers:
            raise ValueError(
                f"batch_size = {self.batch_size} does not divide into groups of {self.group} for {self.workers} "
                f"workers; allowed: multiples of {self.group * self.workers}"
            )
        if self.kind == "image" and len(self.axes) > 1:
            raise ValueError(f"axes = {list(self.axes)}: an image reward has one axis; name one, or set kind=video")
        if len({*self.axes}) < len(self.axes):
            raise ValueError(f"axes = {list(self.axes)}: an axis is there twice; name it once")
        if self.kind == "image" and self.head != HeadConfig():
            raise ValueError("head is for kind=video; an image reward is a cosine")
        if self.contrastive and self.backbone.layers == 0:
            raise ValueError("contrastive has nothing to fit with backbone.layers = 0; set it to 0, or layers to 1")
        if not (self.preferences or self.contrastive):
            raise ValueError("preferences = 0 and contrastive = 0 leave nothing to fit; set one above 0")
        if self.contrastive and self.group < 2:
            raise ValueError(f"group = {self.group}: a contrastive loss compares pairs of a group; set it to 2 or more")
        if self.kind == "image" and self.backbone.layers == 0:
            raise ValueError("backbone.layers = 0 leaves nothing to fit of an image reward; set 1 or more, or null")
        if self.kind == "video" and not self.preferences:
            raise ValueError("preferences = 0: the head of a video reward learns from votes alone; set it above 0")
        return self


def load_fit(overrides: list[str]) -> FitConfig:
    """Returns the settings of a fit.

    Args:
        overrides: ``key=value`` strings, values in YAML; later ones win.

    Raises:
        ValueError: in one line: the key, the value, what is allowed.
    """
    data: dict[str, Any] = {}
    refuse_credentials_in_arguments(overrides)
    for text in overrides:
        apply_override(data, text, "key=value, such as steps=200")
    refuse_credentials(data, "")
    try:
        return FitConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError("; ".join(explain(each, FitConfig, {}) for each in error.errors())) from None
