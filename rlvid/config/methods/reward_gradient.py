"""The settings of InstructVideo, DRaFT, DRaFT-LV and AlignProp, which back-propagate the reward."""

from statistics import NormalDist
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlvid.config.methods.base import Method


def kept_steps(steps: int, tau: float) -> int:
    """int(tau * D), the steps that run when editing starts at noise level tau; 0.55 x 20 makes 11."""
    return int(round(tau * steps, 6))


class RewardGradient(Method):
    """Methods that back-propagate the reward through the chain."""

    needs_gradient: ClassVar[bool] = True
    added: ClassVar[frozenset[str]] = frozenset({"kl_at"})

    kl: float = Field(
        0.0,
        ge=0,
        description="weight of the squared distance of the prediction (eps, or v of a flow) to the base model's, 0 is "
        "without",
    )
    kl_at: Literal["steps", "path"] = Field(
        "steps",
        description="where method.kl compares: at the steps with gradient, or at a random noise level of the whole "
        "path, on each sample with new noise",
    )
    unconditional_gradient: bool = Field(True, description="whether gradient flows through the unconditional branch")

    @property
    def needs_base(self) -> bool:
        """See ``Method.needs_base``."""
        return self.kl > 0

    def prefix_length(self, steps: int) -> int:
        """Returns the most steps of the chain that run without gradient."""
        return self.learning_steps(steps).start

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        if self.kl_at == "path" and self.kl == 0:
            raise ValueError(
                "method.kl_at = 'path' is for method.kl above 0, which is 0; set method.kl, such as method.kl=0.1, or "
                "leave method.kl_at out"
            )


class InstructVideoConfig(RewardGradient):
    """InstructVideo (CVPR 2024): reward fine-tuning as editing."""

    needs_clips: ClassVar[bool] = True
    added: ClassVar[frozenset[str]] = RewardGradient.added | {"denoising", "start"}

    name: Literal["instructvideo"] = "instructvideo"
    tau: float | None = Field(
        0.6,
        gt=0,
        le=1,
        description="where editing starts, as a fraction of the chain; null with method.start",
    )
    start: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the noise level at which editing starts, instead of tau: sigma / (alpha + sigma), which is sigma "
        "on a flow, whatever its shift and its steps. 0.66 is the start of the paper's chain",
    )
    gradient_steps: int = Field(1, ge=1, description="K, last steps of the chain that carry gradient")
    offset_noise: float = Field(0.1, ge=0, description="strength of the noise that is constant over a frame's pixels")
    denoising: float = Field(
        0.0,
        ge=0,
        description="weight of the pre-training loss on the source clips, at a random noise level each; 0 is without",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_level_replaces_the_fraction(cls, data: Any) -> Any:
        replaced = isinstance(data, dict) and data.get("start") is not None
        return {"tau": None} | data if replaced else data

    @model_validator(mode="after")
    def _starts_once(self) -> "InstructVideoConfig":
        if (self.tau is None) == (self.start is None):
            raise ValueError(
                f"tau = {_shown(self.tau)} and start = {_shown(self.start)} both say where editing starts; set one of "
                "the two, and leave the other out or null, such as method.start=0.66 method.tau=null"
            )
        return self

    def learning_steps(self, steps: int) -> range:
        """See ``Method.learning_steps``."""
        return range(steps - self.gradient_steps, steps)

    def prefix_length(self, steps: int) -> int:
        """See ``RewardGradient.prefix_length``; the chain of ``start`` is the noise path's."""
        assert self.tau is not None
        return kept_steps(steps, self.tau) - self.gradient_steps

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``; the chain of ``start`` is the noise path's, see ``rlvid.diffusion.schedule``."""
        super().check(steps, eta, batch_size, group_size)
        if self.tau is None:
            return
        start = kept_steps(steps, self.tau)
        if start < 1:
            raise ValueError(
                f"method.tau = {self.tau} leaves no step of sampling.steps = {steps}; "
                f"tau must be at least {1 / steps:g}"
            )
        if self.gradient_steps > start:
            raise ValueError(
                f"method.gradient_steps = {self.gradient_steps} exceeds the {start} steps that run "
                f"(int(tau * steps)); allowed: 1 to {start}"
            )


class DraftConfig(RewardGradient):
    """DRaFT-K (Clark et al., ICLR 2024): the reward's gradient through the last K steps of the whole chain."""

    name: Literal["draft"] = "draft"
    gradient_steps: int | None = Field(1, ge=1, description="K, last steps that carry gradient; null: the whole chain")

    def learning_steps(self, steps: int) -> range:
        """See ``Method.learning_steps``."""
        return range(steps - (self.gradient_steps or steps), steps)

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        super().check(steps, eta, batch_size, group_size)
        if self.gradient_steps is not None and self.gradient_steps > steps:
            raise ValueError(
                f"method.gradient_steps = {self.gradient_steps} exceeds sampling.steps = {steps}; allowed: 1 to {steps}"
            )


class DraftLVConfig(RewardGradient):
    """DRaFT-LV (Clark et al., ICLR 2024): K = 1, averaged over fresh noises at the last step for less variance."""

    added: ClassVar[frozenset[str]] = RewardGradient.added | {"start"}

    name: Literal["draft-lv"] = "draft-lv"
    repeats: int = Field(2, ge=1, description="n, noises at the last step for each video")
    start: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the noise level that they bring a sample to: sigma / (alpha + sigma), which is sigma on a flow; "
        "null: the last step's",
    )

    def learning_steps(self, steps: int) -> range:
        """See ``Method.learning_steps``."""
        return range(steps - 1, steps)

    def prefix_length(self, steps: int) -> int:
        """See ``RewardGradient.prefix_length``; the sample that noise is added to has no gradient."""
        return steps


class AlignPropConfig(RewardGradient):
    """AlignProp (Prabhudesai et al. 2023): the reward's gradient through a randomly truncated chain."""

    eta: ClassVar[float] = 1.0

    name: Literal["alignprop"] = "alignprop"
    truncation: Literal["gaussian", "uniform", "fixed"] = Field(
        "gaussian", description="how the cut is drawn, once a batch; predictions before it carry no gradient"
    )
    mean: float = Field(
        0.84, gt=0, lt=1, description="mean of the gaussian cut, as a fraction of the chain (42 of 50 steps)"
    )
    spread: float = Field(0.1, gt=0, description="standard deviation of the gaussian cut, as a fraction of the chain")
    cut: int | None = Field(None, ge=0, description="the fixed cut: how many first steps carry no gradient")

    def learning_steps(self, steps: int) -> range:
        """See ``Method.learning_steps``."""
        return range(self.cut or 0, steps)

    def prefix_length(self, steps: int) -> int:
        """See ``RewardGradient.prefix_length``."""
        return steps - 1 if self.cut is None else self.cut

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        super().check(steps, eta, batch_size, group_size)
        if steps < 2:
            raise ValueError("sampling.steps = 1 leaves nothing to cut; allowed: 2 to 500")
        if (self.cut is not None) != (self.truncation == "fixed"):
            raise ValueError("method.cut is for method.truncation=fixed, which needs it; set both or neither")
        if self.cut is not None and self.cut >= steps:
            raise ValueError(
                f"method.cut = {self.cut} leaves no step of sampling.steps = {steps} with gradient; "
                f"allowed: 0 to {steps - 1}"
            )
        if self.truncation != "gaussian":
            for key in ("mean", "spread"):
                if (value := getattr(self, key)) != AlignPropConfig.model_fields[key].default:
                    raise ValueError(
                        f"method.{key} = {value} is for method.truncation=gaussian, and method.truncation = "
                        f"{self.truncation!r} does not use it; leave it out"
                    )
        elif self.chance_of_a_cut(steps) < 0.01:
            raise ValueError(
                f"method.mean = {self.mean} with method.spread = {self.spread}: of {steps} steps, fewer than one draw "
                f"in a hundred is a cut, 1 to {steps - 1}; set method.mean to {1 / steps:g} or more, and "
                "method.spread to 1 or less"
            )

    def chance_of_a_cut(self, steps: int) -> float:
        """Returns the probability that a draw of the gaussian cut lies in [1, ``steps``)."""
        draw = NormalDist(self.mean * steps, self.spread * steps)
        return draw.cdf(steps) - draw.cdf(1)


def _shown(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"
