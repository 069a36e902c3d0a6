"""The settings of DDPO, GRPO and DPOK, which see the chain as a policy."""

from typing import ClassVar, Literal

from pydantic import Field

from rlvid.config.methods.base import Method
from rlvid.config.section import Share

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
