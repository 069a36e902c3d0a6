"""The settings of each method; ``method.name`` chooses one. Defaults are those of the papers."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from rlvid.config.section import Section, Share


def kept_steps(steps: int, tau: float) -> int:
    """int(tau * D), the steps that run when editing starts at noise level tau; 0.55 x 20 makes 11."""
    return int(round(tau * steps, 6))


def _shown(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"


class Method(Section):
    """The settings that all methods share."""

    needs_gradient: ClassVar[bool]
    """Whether the method back-propagates the reward; other methods use only its value."""
    needs_clips: ClassVar[bool] = False
    """Whether the method starts from clips; other methods start from noise."""
    eta: ClassVar[float] = 0.0
    """DDIM's eta when sampling.eta does not say."""
    added: ClassVar[frozenset[str]] = frozenset()
    """Settings that runs of earlier versions lack: they compute what their default says."""

    @property
    def needs_base(self) -> bool:
        """Whether predictions of the base model are compared with during training."""
        return False

    def kept_states(self, steps: int) -> int:
        """Returns the most latents of a video's chain that are kept to be trained on."""
        return 0

    def learning_steps(self, steps: int) -> range:
        """Returns the steps of the chain at which the denoiser may get gradient, 0 the noisiest."""
        return range(steps)

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """Raises ValueError where the method does not fit the chain of ``steps`` and ``eta``, or the batch."""


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


_WINDOWS = frozenset({"window", "window_range", "same_start"})
_TOO_FEW = (
    "train.group_size = {}: {} compares the videos of a prompt with each other; set it to 2 or more, such as "
    "train.group_size=8"
)


class PolicyGradient(Method):
    """Methods that see the chain as a policy and learn from the value of the reward."""

    needs_gradient: ClassVar[bool] = False
    eta: ClassVar[float] = 1.0

    clip_range: float = Field(
        1e-4,
        gt=0,
        description="how far the probability ratio may move from 1; counts from the second optimiser step on a batch",
    )
    clip_relative: bool = Field(
        False, description="whether clip_range is in units of 1 / sqrt(latent elements), the spread of the log-ratio"
    )
    window: int | None = Field(
        None,
        ge=1,
        description="neighbouring steps of the chain that are random and trained on, drawn for each prompt of a batch; "
        "the others are deterministic. null: all steps of window_range. 1 is the way of Flash-GRPO",
    )
    window_range: tuple[Share, Share] = Field(
        (0.0, 1.0),
        description="part of the chain that windows lie in, as shares of its random steps; [0, 0.5]: the noisy half",
    )
    same_start: bool = Field(
        False,
        description="whether the train.group_size videos of a prompt start from the same noise, and are scored at the "
        "same frames",
    )

    @property
    def all_random(self) -> bool:
        """Whether all steps of the chain are random, as in DDPO and DPOK; else those of a window."""
        return self.window is None and self.window_range == (0, 1)

    def window_steps(self, steps: int) -> range:
        """Returns the steps of the chain that windows lie in; at least one."""
        first, end = (round(share * (steps - 1)) for share in self.window_range)
        first = min(first, steps - 2)
        return range(first, max(end, first + 1))

    def width(self, steps: int) -> int:
        """Returns the number of random steps of a video's chain."""
        return self.window or len(self.window_steps(steps))

    def kept_states(self, steps: int) -> int:
        """See ``Method.kept_states``."""
        return self.width(steps) + 1

    def learning_steps(self, steps: int) -> range:
        """See ``Method.learning_steps``."""
        return self.window_steps(steps)

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        if eta == 0:
            raise ValueError(
                f"sampling.eta = 0 makes a deterministic chain, which method {self.name!r} cannot learn from; "  # type: ignore[attr-defined]
                "set sampling.eta=1"
            )
        if steps < 2:
            raise ValueError("sampling.steps = 1 leaves no random step to learn from; allowed: 2 to 500")
        if self.window_range[0] >= self.window_range[1]:
            raise ValueError(
                f"method.window_range = {list(self.window_range)}: the first share must be smaller than the second; "
                "allowed: 0 to 1, such as [0, 0.5]"
            )
        if self.same_start and group_size < 2:
            raise ValueError(
                f"train.group_size = {group_size}: method.same_start is for several videos of a prompt; set "
                "train.group_size to 2 or more, or method.same_start=false"
            )
        within = len(self.window_steps(steps))
        if self.window is not None and self.window > within:
            raise ValueError(
                f"method.window = {self.window} exceeds the {within} steps of method.window_range = "
                f"{list(self.window_range)} (of {steps - 1} random steps); allowed: 1 to {within}"
            )


class ClippedPolicy(PolicyGradient):
    """Policy gradients with PPO's clipped objective and standardised rewards as advantages."""

    inner_epochs: int = Field(1, ge=1, description="optimiser steps on each batch of rollouts")
    advantage_clip: float = Field(5.0, gt=0, description="largest absolute advantage")


class DdpoConfig(ClippedPolicy):
    """DDPO (Black et al., ICLR 2024): PPO's clipped objective on every step of the chain."""

    added: ClassVar[frozenset[str]] = _WINDOWS

    name: Literal["ddpo"] = "ddpo"
    timestep_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the random steps that is trained on, at least one"
    )
    buffer: int = Field(32, ge=1, description="number of latest rewards of each prompt, for its mean and deviation")
    min_count: int = Field(16, ge=2, description="rewards a prompt needs before its own statistics are used")

    def trained_steps(self, steps: int) -> int:
        """Returns the number of steps of a video's chain that an inner epoch trains on."""
        return max(1, round(self.timestep_fraction * self.width(steps)))

    def kept_states(self, steps: int) -> int:
        """See ``Method.kept_states``."""
        return min(self.width(steps) + 1, 2 * self.inner_epochs * self.trained_steps(steps))

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        super().check(steps, eta, batch_size, group_size)
        if self.timestep_fraction < 1 and self.width(steps) == 1:
            raise ValueError(
                f"method.timestep_fraction = {self.timestep_fraction} leaves out nothing where a chain has one random "
                "step; set it to 1, or method.window to 2 or more"
            )
        if self.buffer < self.min_count:
            raise ValueError(
                f"method.buffer = {self.buffer} is smaller than method.min_count = {self.min_count}: "
                "it would never be used"
            )


class GrpoConfig(ClippedPolicy):
    """GRPO on diffusion chains (Flow-GRPO, DanceGRPO 2025): a prompt's videos are compared with each other."""

    name: Literal["grpo"] = "grpo"
    clip_range: float = Field(
        1e-3,
        gt=0,
        description="how far the probability ratio may move from 1; counts from the second optimiser step on a batch",
    )
    deviation: Literal["group", "batch"] = Field(
        "group", description="the deviation that rewards are divided by: of a prompt's videos, or of the whole batch"
    )
    step_weight: Literal["none", "inverse"] = Field(
        "none",
        description="weights of steps: 'inverse' makes all steps move the policy alike; with 'none' the last random "
        "step moves it most by far (8 times as much as others with D = 10)",
    )
    kl: float = Field(0.0, ge=0, description="weight of the KL divergence of a step to the base model's, 0 is without")

    @property
    def needs_base(self) -> bool:
        """See ``Method.needs_base``."""
        return self.kl > 0

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        super().check(steps, eta, batch_size, group_size)
        if group_size < 2:
            raise ValueError(_TOO_FEW.format(group_size, "method 'grpo'"))


class DpokConfig(PolicyGradient):
    """DPOK (Fan et al., NeurIPS 2023): policy gradient with a value network and a KL term to the base model."""

    added: ClassVar[frozenset[str]] = _WINDOWS | {"baseline"}

    name: Literal["dpok"] = "dpok"
    reward_weight: float = Field(10.0, gt=0, description="weight of the policy term")
    kl: float = Field(0.01, ge=0, description="weight of the squared distance of the prediction to the base's")
    policy_steps: int = Field(5, ge=1, description="optimiser steps on each batch of rollouts")
    value_steps: int = Field(5, ge=1, description="steps of the value network on each batch, with baseline: network")
    value_lr: float = Field(1e-4, gt=0, description="learning rate of the value network, with baseline: network")
    baseline: Literal["network", "group"] = Field(
        "network",
        description="the estimate that is subtracted from a reward: the value network's, or the mean reward of the "
        "prompt's other videos. With method.same_start both estimate the same value",
    )

    @property
    def needs_base(self) -> bool:
        """See ``Method.needs_base``."""
        return self.kl > 0

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        super().check(steps, eta, batch_size, group_size)
        if self.baseline == "network":
            return
        if group_size < 2:
            raise ValueError(_TOO_FEW.format(group_size, "method.baseline = 'group'"))
        for key in ("value_steps", "value_lr"):
            if (value := getattr(self, key)) != DpokConfig.model_fields[key].default:
                raise ValueError(
                    f"method.{key} = {value}: there is no value network with method.baseline = 'group'; leave the key "
                    "out, or set method.baseline=network"
                )


class Supervised(Method):
    """Methods that train on their own samples, chosen or weighed by the reward."""

    needs_gradient: ClassVar[bool] = False

    inner_steps: int = Field(4, ge=1, description="optimiser steps on each batch of samples")
    guided: bool = Field(False, description="whether training uses the guided prediction")


class RwrConfig(Supervised):
    """Reward-weighted regression (Lee et al. 2023; as compared with in DDPO): exponential weights."""

    name: Literal["rwr"] = "rwr"
    beta: float = Field(0.2, gt=0, description="factor of rewards before the softmax")
    per_prompt: bool = Field(False, description="softmax within the samples of a prompt and not over the batch")

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        if self.per_prompt and group_size < 2:
            raise ValueError(
                "method.per_prompt weighs train.group_size samples of a prompt against each other; set it to 2 or more"
            )


class RaftConfig(Supervised):
    """RAFT (Dong et al. 2023): keep the best samples, train on them."""

    name: Literal["raft"] = "raft"
    keep: Literal["local", "global"] = Field(
        "global", description="the best of each prompt's train.group_size samples, or the best share of the batch"
    )
    share: float = Field(0.25, gt=0, le=1, description="share of the batch that is kept (global)")

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        if self.keep == "local" and group_size < 2:
            raise ValueError(
                "method.keep = 'local' takes the best of train.group_size samples of a prompt; set it to 2 or more"
            )
        if self.keep == "global" and round(self.share * batch_size, 6) < 1:
            raise ValueError(
                f"method.share = {self.share} keeps none of train.batch_size = {batch_size}; "
                f"allowed: {1 / batch_size:g} to 1"
            )


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    return {"name": "instructvideo"} | value if isinstance(value, dict) else value


def _name_of(value: Any) -> Any:
    return value.get("name") if isinstance(value, dict) else getattr(value, "name", None)


AnyMethod = Annotated[
    Annotated[InstructVideoConfig, Tag("instructvideo")]
    | Annotated[DraftConfig, Tag("draft")]
    | Annotated[DraftLVConfig, Tag("draft-lv")]
    | Annotated[AlignPropConfig, Tag("alignprop")]
    | Annotated[DdpoConfig, Tag("ddpo")]
    | Annotated[DpokConfig, Tag("dpok")]
    | Annotated[GrpoConfig, Tag("grpo")]
    | Annotated[RwrConfig, Tag("rwr")]
    | Annotated[RaftConfig, Tag("raft")],
    Discriminator(_name_of),
    BeforeValidator(_named),
]
METHODS: dict[str, Any] = {get_args(each)[1].tag: get_args(each)[0] for each in get_args(get_args(AnyMethod)[0])}
"""The settings of each method, by its name."""
VALUE_METHODS = ", ".join(name for name, kind in METHODS.items() if not kind.needs_gradient)
"""The methods that need a reward's value alone, as a message lists them."""
