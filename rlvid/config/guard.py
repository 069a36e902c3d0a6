"""Settings of the guard, which detects over-optimisation: the trained reward rises while the held-out reward falls."""

from pydantic import Field, field_validator

from rlvid.config.reward import NamedReward
from rlvid.config.reward_names import BuiltinReward, absolute
from rlvid.config.section import Section
from rlvid.metric_names import metric_key

BUILTIN_JUDGES: tuple[BuiltinReward, ...] = ("builtin-frames", "builtin-video")
"""Further held-out rewards of a guard on the built-in models: they are fitted to votes, and ``builtin`` is not."""


AT_ONCE = 8
"""Most videos that a guard scores at once, unless a prompt has more."""
PIXELS_AT_ONCE = 2**24
"""Most pixels that are scored at once, unless one video has more: those of 16 videos of 16 frames of 256 x 256."""


class GuardConfig(Section):
    """The guard's fixed prompts and noise; it scores checkpoints beside training and has no influence on the result."""

    every: int = Field(
        0, ge=0, description="steps between evaluations, a multiple of output.checkpoint_every; 0: none (docs/guard.md)"
    )
    prompts: str | None = Field(
        None, description="a built-in set or a file of prompts; default: the first captions of the run's own clips"
    )
    count: int = Field(16, ge=4, le=1000, description="number of prompts, over which noise is estimated")
    videos_per_prompt: int = Field(2, ge=1, le=16, description="videos per prompt; diversity needs two")
    steps: int | None = Field(None, ge=1, le=500, description="sampling steps of a video; default: sampling.steps")
    scales: list[float] = Field(
        [1.0],
        description="scales of the learned change at which a checkpoint is evaluated, above 0 and at most 4; 1 is the "
        "checkpoint itself, and must be there",
    )
    rewards: list[NamedReward] | None = Field(
        None,
        description="further held-out rewards, beside reward.held_out: {name, path} each; default: for the built-in "
        "models builtin-frames and builtin-video, except those that are trained on; else none",
    )
    stop: bool = Field(False, description="end training when it over-optimises or collapses; else only warn")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs reserved for the guard; a part of one (such as 0.3) is shared with a worker; default: one "
        "when the workers have GPUs, else none",
    )

    def resolved(self) -> "GuardConfig":
        """Returns the same with absolute paths of rewards, for a process that works in another folder."""
        if self.rewards is None:
            return self
        rewards = [each.model_copy(update={"path": absolute(each.path)}) for each in self.rewards]
        return self.model_copy(update={"rewards": rewards})

    @field_validator("scales")
    @classmethod
    def _scales_fit(cls, value: list[float]) -> list[float]:
        if 1 not in value or not all(0 < scale <= 4 for scale in value) or len(set(value)) < len(value):
            raise ValueError("must be different numbers above 0 and at most 4, and hold 1: for example [0.25, 0.5, 1]")
        return value

    @field_validator("rewards")
    @classmethod
    def _rewards_have_names_of_their_own(cls, value: list[NamedReward] | None) -> list[NamedReward] | None:
        labels = [each.label for each in value or ()]
        keys = list(map(metric_key, labels))
        if twice := [label for label, key in zip(labels, keys, strict=True) if keys.count(key) > 1]:
            called = " and ".join(dict.fromkeys(map(repr, twice)))
            raise ValueError(f"two rewards are called {called}, and the log would show one; rename one")
        return value

    @field_validator("gpus")
    @classmethod
    def _one_worker_a_gpu(cls, value: float | None) -> float | None:
        if value is not None and value >= 0.5 and value != int(value):
            raise ValueError("must be a whole number, or below 0.5: else two workers could share a GPU")
        return value
