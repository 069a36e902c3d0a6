"""The settings of the rewards: which reward, its weights, and the reduction of a video's frames to one number."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from rlvid.config.reward_names import (
    NOT_DIFFERENTIABLE,
    PATH_HELP,
    PUBLISHED,
    HeldOutReward,
    PartReward,
    Precision,
    Preset,
    SingleReward,
    absolute,
    check_path,
    is_function,
    is_own,
    is_url,
)  # fmt: skip
from rlvid.config.section import Section


class RemoteConfig(Section):
    """A reward of your own that is computed elsewhere; it sees 8-bit pixels and gives no gradient."""

    where: Literal["process", "actor"] = Field(
        "process",
        description="where FILE.py:FUNCTION runs: in a process beside each worker, or in a Ray actor of each worker",
    )
    python: str | None = Field(
        None, description="interpreter of the process, of an environment with NumPy; default: the one of rlvid"
    )
    packages: list[str] = Field([], description="pip requirements that Ray installs for the actor")
    cpus: float = Field(1.0, ge=0, description="CPU cores of the actor")
    gpus: float = Field(0.0, ge=0, description="GPUs of the actor")
    whole_video: bool = Field(False, description="whether it wants all frames of a video; a server says so itself")
    batch: int = Field(8, ge=1, description="videos in one request")
    timeout: float = Field(60.0, gt=0, description="limit for one request, in seconds; a start may take 600 more")
    retries: int = Field(2, ge=0, le=10, description="tries after a request that failed; then its videos are left out")

    @model_validator(mode="after")
    def _fits(self) -> "RemoteConfig":
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(
                f"gpus = {self.gpus:g}: Ray takes a share of one GPU or whole GPUs; allowed: 0 to 1, 2, 3, ..."
            )
        if self.python is not None and self.where == "actor":
            raise ValueError("python is for where=process; an actor takes packages")
        if self.where == "process":
            for key in ("packages", "cpus", "gpus"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} is for where=actor; a process takes python, the interpreter it runs in")
        return self


class NamedReward(Section):
    """A reward by its name, with the path of its weights or its function."""

    name: Literal[SingleReward, HeldOutReward] = Field(description="as reward.name")
    path: str | None = Field(None, description=PATH_HELP)

    @model_validator(mode="before")
    @classmethod
    def _name_follows_from_the_path(cls, data: Any) -> Any:
        if isinstance(data, dict) and is_own(data.get("path")):
            return {"name": "custom"} | data
        return data

    @model_validator(mode="after")
    def _path_fits(self) -> "NamedReward":
        check_path(self.name, self.path, "path")
        return self

    @property
    def label(self) -> str:
        """The name of its metric: the reward's name, or that of the user's function, server or folder."""
        if self.name == "fitted" and self.path:
            return Path(os.path.abspath(Path(self.path).expanduser())).name
        if self.name != "custom" or not self.path:
            return self.name
        return self.path.partition("://")[2] if is_url(self.path) else self.path.rpartition(":")[2]


class RewardPart(NamedReward):
    """A part of a mixture of rewards, which is trained on."""

    name: Literal[SingleReward, HeldOutReward, PartReward] = Field(  # type: ignore[assignment]  # one name more
        description="as reward.name; or 'motion', which holds the motion of the base model's videos"
    )
    floor: Annotated[float, Field(gt=0)] | Literal["base"] | None = Field(
        None,
        description="of name=motion alone: motion of the base model's videos, as an evaluation measures it; below it "
        "the score falls from 0 to -1, that of a frozen video. base: a new run measures it once",
    )
    measured: bool = Field(
        False, description="whether the run measured the floor itself, because it was base; the run sets it"
    )
    weight: float = Field(1.0, description="factor of its scores; a negative one penalises high scores")
    centre: float = Field(
        0.0, description="score that counts as 0, before the weight: of use with reward.pessimism and reward.ceiling"
    )
    preprocess: Preset | None = Field(None, description="as reward.preprocess")

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what is at its default: what is hashed over the settings stays as in versions without it."""
        data: dict[str, Any] = handler(self)
        return {key: value for key, value in data.items() if value or key not in ("centre", "floor", "measured")}

    @field_validator("name")
    @classmethod
    def _may_be_trained_on(cls, value: str) -> str:
        if value in get_args(HeldOutReward):
            raise ValueError(f"{value!r} is a reward to judge with; allowed: {', '.join(get_args(SingleReward))}")
        return value

    @field_validator("floor", mode="before")
    @classmethod
    def _is_a_motion_or_base(cls, value: Any) -> Any:
        if value is None or value == "base" or isinstance(value, bool):
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError("must be a finite number greater than 0, or base: then a new run measures it")
        return number

    @model_validator(mode="after")
    def _floor_fits(self) -> "RewardPart":
        if self.name == "motion" and self.floor is None:
            raise ValueError(
                "floor is not set, and name = 'motion' needs it: floor=base, the base model's motion, which the run "
                "measures, or a number such as floor=0.03; rlvid evaluate --base CONFIG shows the motion"
            )
        if self.name != "motion" and self.floor is not None:
            raise ValueError(f"floor = {self.floor} is for name = 'motion', not for {self.name!r}; leave it out")
        if self.measured and not isinstance(self.floor, float):
            raise ValueError(f"measured = true, but floor = {self.floor} is not a number; leave measured out")
        return self

    @model_validator(mode="after")
    def _preprocess_fits(self) -> "RewardPart":
        if self.preprocess is not None and self.name not in PUBLISHED:
            raise ValueError(f"preprocess is for {', '.join(PUBLISHED)}, not for {self.name!r}")
        return self


class RewardConfig(Section):
    """The rewards of a run: on frames or whole videos, and the reduction of a video's frames to one number."""

    name: Literal[SingleReward, "mixture"] = Field(
        "builtin",
        description="what is trained on; 'oracle' scores whole videos of the built-in world, without gradient",
    )
    path: str | None = Field(None, description=PATH_HELP)
    held_out: Literal[SingleReward, HeldOutReward] | None = Field(
        "builtin-heldout", description="a second reward that is logged and never trained on"
    )
    held_out_path: str | None = Field(None, description="path of the held-out reward, as reward.path")
    remote: RemoteConfig | None = Field(
        None,
        description="how the reward of reward.path is computed elsewhere: {where, python, ...}; null: in the worker",
    )
    mixture: list[RewardPart] = Field([], description="parts of the weighted sum: {name, path, weight} each")
    pessimism: float = Field(
        0.0,
        ge=0,
        description="k of a mixture of rewards for one thing, whose weights and centres bring them to one unit: the "
        "sum over n parts is lowered by k x n standard deviations over them; 0: the sum",
    )
    preprocess: Preset | None = Field(
        None, description="how frames become the model's input; default: as the reward's own code has it"
    )
    precision: Precision = Field("float32", description="precision of the rewards' frozen weights; scores are float32")
    chunk: int | None = Field(
        None, ge=1, description="most frames in a reward model at once; default: 64 for the built-in ones, else 8"
    )
    checkpoint_activations: bool | None = Field(
        None, description="recompute a chunk in the backward pass to save memory; default: all but the built-in rewards"
    )
    timeout: float | None = Field(
        600.0,
        ge=0,
        description="limit for one call of a reward, in seconds; a worker that exceeds it ends with a message and is "
        "restarted (train.max_failures); 0 or null: no limit",
    )
    segments: int = Field(
        4,
        ge=1,
        description="S of SegVR: segments of F // S frames, one random frame scored in each; where S does not divide "
        "F, the last F % S frames are never drawn",
    )
    attenuation: float = Field(
        1.0, ge=0, allow_inf_nan=True, description="lambda of TAR: 0: equal weights; inf: the central frame alone"
    )
    tar_normalisation: Literal["paper", "normalised"] | None = Field(
        None,
        description="'paper' divides TAR's weights by S, so that their sum varies with the frames drawn; 'normalised' "
        "makes it one; by default 'normalised' for methods that compare videos by their rewards, else 'paper'",
    )
    skip_below: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="frames whose share of the summed weight is smaller are not decoded (0.02 halves it)",
    )
    ceiling: float | str | None = Field(
        None,
        description="reward of a video above which more counts as no more: it trains on min(reward, ceiling), and the "
        "gradient is 0 there. A number in units of TensorBoard's reward/weighted; or a quantile, such as q0.9: that of "
        "the rewards of the run's own real clips, computed once. null: none",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_follow_from_paths(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {"name": "mixture"} if data.get("mixture") else {}
        names |= {"name": "custom"} if is_own(data.get("path")) else {}
        names |= {"held_out": "custom"} if is_own(data.get("held_out_path")) else {}
        return names | data

    @field_validator("mixture")
    @classmethod
    def _parts_have_names_of_their_own(cls, parts: list[RewardPart]) -> list[RewardPart]:
        labels = [part.label for part in parts]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two parts are called {twice[0]!r}, and the log would show one; rename one")
        return parts

    @field_validator("ceiling", mode="before")
    @classmethod
    def _is_a_number_or_a_quantile(cls, value: Any) -> Any:
        """Returns a number as a float, a quantile in one form: equal ceilings have equal fingerprints."""
        if value is None or isinstance(value, bool):
            return value
        quantile = isinstance(value, str) and value.startswith("q")
        try:
            number = float(value[1:] if quantile else value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or (quantile and not 0 <= number <= 1):
            raise ValueError("must be a finite number, or q and a number between 0 and 1, such as q0.9")
        return f"q{abs(number)!r}" if quantile else number

    @model_validator(mode="after")
    def _paths_fit(self) -> "RewardConfig":
        if (self.name == "mixture") != bool(self.mixture):
            raise ValueError(
                f"name = {self.name!r}, but mixture has {len(self.mixture)} parts; a mixture has name=mixture (or no "
                "name) and a list such as mixture=[{name: brightness, weight: 1}]"
            )
        self._pessimism_fits()
        check_path(self.name, self.path, "path")
        check_path(self.held_out or "none", self.held_out_path, "held_out_path")
        if self.remote is not None and self.name != "custom":
            raise ValueError(
                f"remote is for a reward of your own (reward.path=FILE.py:FUNCTION), not for {self.name!r}"
            )
        if self.preprocess is not None and self.name not in PUBLISHED:
            raise ValueError(
                f"preprocess = {self.preprocess!r} is for {', '.join(PUBLISHED)}, not for {self.name!r}; in a "
                "mixture, give it to a part"
            )
        return self

    def _pessimism_fits(self) -> None:
        if self.pessimism == 0:
            return
        if len(self.mixture) < 2:
            raise ValueError(
                f"pessimism = {self.pessimism:g} is for a mixture of 2 parts or more, and there are "
                f"{len(self.mixture)}; add parts to reward.mixture, or leave pessimism out"
            )
        for place, part in enumerate(self.mixture):
            if part.weight <= 0:
                raise ValueError(
                    f"mixture.{place}.weight = {part.weight:g}: with pessimism = {self.pessimism:g} the parts are "
                    "opinions on one thing in one unit; allowed: above 0, such as 1 / the deviation of its scores"
                )

    @property
    def parts(self) -> list[tuple[str, str | None]]:
        """Name and path of what is trained on: one reward, or those of a mixture."""
        return [(part.name, part.path) for part in self.mixture] or [(self.name, self.path)]

    def trains_on(self, name: str, path: str | None) -> bool:
        """Whether the reward of this name, and of this path wherever it is written from, is trained on."""
        return (name, absolute(path)) in [(part, absolute(its_path)) for part, its_path in self.parts]

    @property
    def ceiling_quantile(self) -> float | None:
        """The quantile of the rewards of real clips that is the ceiling; None where it is a number or there is none."""
        return float(self.ceiling[1:]) if isinstance(self.ceiling, str) else None

    @property
    def floor_is_open(self) -> bool:
        """Whether a new run measures the floor of a part first (``floor: base``)."""
        return any(part.floor == "base" for part in self.mixture)

    @property
    def measured_floor(self) -> float | None:
        """The floor that the run has measured itself; None where it has measured none."""
        return next((part.floor for part in self.mixture if part.measured and isinstance(part.floor, float)), None)

    def with_floor(self, floor: float) -> "RewardConfig":
        """Returns the same with a number that a run has measured, in place of ``floor: base`` or that number."""
        known = {"floor": floor, "measured": True}
        parts = [part.model_copy(update=known) if part.floor in ("base", floor) else part for part in self.mixture]
        return self.model_copy(update={"mixture": parts})

    def without_open_floor(self) -> "RewardConfig":
        """Returns the same without a part whose floor a run has yet to measure.

        Raises:
            ValueError: no part is left.
        """
        parts = [part for part in self.mixture if part.floor != "base"]
        if self.mixture and not parts:
            raise ValueError(
                "reward.mixture: the floor of its only part, 'motion', is base, which a run measures when it starts; "
                "give a number such as floor=0.03, or another part beside it"
            )
        return self.model_copy(update={"mixture": parts})

    @property
    def functions(self) -> list[str]:
        """Every FILE.py:FUNCTION that loading these rewards runs."""
        paths = [*(path for _, path in self.parts), self.held_out_path]
        return [path for path in paths if path is not None and is_function(path)]

    @property
    def foreign(self) -> list[str]:
        """Every path that would run somebody's code or send frames to somebody's server."""
        paths = [*(path for _, path in self.parts), self.held_out_path]
        return self.functions + [path for path in paths if path is not None and is_url(path)]

    @property
    def without_gradient(self) -> str | None:
        """The reward, or the part of the mixture, that is known to give no gradient."""
        if self.remote is not None:
            return self.path
        names = (
            path if is_url(path) else name for name, path in self.parts if name in NOT_DIFFERENTIABLE or is_url(path)
        )
        return next(names, None)

    def resolved(self) -> "RewardConfig":
        """Returns the same with absolute paths, for a process that works in another folder."""
        parts = [part.model_copy(update={"path": absolute(part.path)}) for part in self.mixture]
        paths = {"path": absolute(self.path), "held_out_path": absolute(self.held_out_path)}
        remote = self.remote
        if remote is not None and remote.python is not None:  # links are kept: a venv's interpreter is one
            remote = remote.model_copy(update={"python": str(Path(remote.python).expanduser().absolute())})
        return self.model_copy(update=paths | {"mixture": parts, "remote": remote})
