"""The scorers of videos: the run's two rewards, further rewards, a CLIP, and in the built-in world the oracle."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlvid import __version__
from rlvid.cluster.reward_actor import ActorCaller
from rlvid.config import RunConfig
from rlvid.config.model import BUILT_IN
from rlvid.config.reward import RewardConfig, RewardPart
from rlvid.config.reward_names import absolute, is_function
from rlvid.data.clips import digest
from rlvid.evaluate.clip import FrameTextModel, NamedClip, load_clip
from rlvid.evaluate.models import EvaluatedModel, stamp
from rlvid.evaluate.reward_calls import RewardCaller
from rlvid.evaluate.score import VideoScorer
from rlvid.metric_names import metric_key
from rlvid.models.folders import movable
from rlvid.models.text_limit import TextLimit
from rlvid.reward.builtin import BUILTIN
from rlvid.reward.clip import ClipReward
from rlvid.reward.load import NAMES, check_one, held_out_reward, load_reward, trained_reward
from rlvid.reward.text_limit import reward_text_limit, reward_text_limits
from rlvid.reward.video import ImageReward

DEFAULT_CLIP = BUILTIN_HELD_OUT = "builtin-heldout"
_KNOWS_ALONE = "knows only the built-in world"
_KNOWS = f"a CLIP that {_KNOWS_ALONE}"
_COUNTS = ("name", "path", "held_out", "held_out_path", "mixture", "preprocess", "precision")
"""The settings of a reward on which the score of a video depends."""


@dataclass(frozen=True)
class FurtherReward:
    """A further reward: the name of its metric, ``reward_NAME``, and what ``load_reward`` needs."""

    metric: str
    name: str
    path: str | None


def parse_rewards(text: str) -> tuple[FurtherReward, ...]:
    """Reads ``hpsv2=/path/HPS_v2_compressed.pt,brightness,warm=mine.py:warmth,second:hpsv2=/path/other.pt``.

    Raises:
        ValueError: no such reward, its path is missing or wrong, or two have one name; weights are not read.
    """
    found: list[FurtherReward] = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        head, _, place = part.partition("=")
        label, _, given = head.rpartition(":")
        path = absolute(place) if place else None
        own = is_function(path)
        if not own and given not in NAMES:
            raise ValueError(
                f"--rewards {part!r}: there is no reward {given!r}; allowed: {', '.join(NAMES)}, each as NAME, "
                "NAME=PATH or LABEL:NAME=PATH, or one of your own as NAME=FILE.py:FUNCTION"
            )
        label = label or (place.rpartition(":")[2] if own and given == "custom" else given)
        name = "custom" if own else given
        check_one(name, path, f"--rewards {label}")
        metric = metric_key(label)
        if metric in {each.metric for each in found}:
            raise ValueError(
                f"--rewards {text!r}: {label!r} is there twice; leave one out, or give it a label of its own, as "
                "LABEL:NAME=PATH"
            )
        found.append(FurtherReward(metric, name, path))
    return tuple(found)


def stamp_of_reward(path: str) -> Any:
    """Returns a stamp that changes with a reward's file or folder, or with the file of a function."""
    return stamp(path.rpartition(":")[0] if is_function(path) else path)


def guard_rewards(config: RunConfig) -> tuple[FurtherReward, ...]:
    """Returns the further held-out rewards of a run's guard."""
    return tuple(FurtherReward(metric_key(each.label), each.name, each.path) for each in config.guard_rewards)


def named(name: str, path: str | None) -> str:
    """Names a reward without its folder; a fitted one by the name of its own."""
    if path == "random":
        return f"{name} with random weights"
    if path and name == "fitted":
        return f"{name}, {Path(path).name}"
    return Path(path).name if path and is_function(path) else name


def _floor(part: RewardPart) -> str:
    return f" (floor {part.floor:g})" if isinstance(part.floor, float) else ""


def _term(part: RewardPart) -> str:
    name = named(part.name, part.path) + _floor(part)
    return f"{part.weight:g} x ({name} - {part.centre:g})" if part.centre else f"{part.weight:g} x {name}"


@dataclass(frozen=True)
class Scorers:
    """The scorers of an evaluation's videos.

    Attributes:
        reward: settings of the run's rewards, with absolute paths.
        clip: what measures CLIPSIM and consistency, see ``rlvid.evaluate.clip.load_clip``.
        further: more rewards, each with a metric of its own.
        use_oracle: whether the videos are of the built-in world.
    """

    reward: RewardConfig
    clip: str = DEFAULT_CLIP
    further: tuple[FurtherReward, ...] = ()
    use_oracle: bool = False

    @staticmethod
    def of(config: RunConfig, clip: str = DEFAULT_CLIP, further: tuple[FurtherReward, ...] = ()) -> "Scorers":
        """Returns the scorers of a run; the oracle grades videos of the built-in world alone."""
        return Scorers(config.reward, clip, further, use_oracle=config.model.path in BUILT_IN)

    @property
    def identity(self) -> str:
        """Sixteen hex digits over all that the scores of a video depend on."""
        reward = self.reward.model_dump(mode="json", include=set(_COUNTS))
        paths = [self.reward.path, self.reward.held_out_path, *(part.path for part in self.reward.mixture)]
        paths += [each.path for each in self.further] + [self.clip.partition(":")[2] or self.clip]
        stamps = [stamp_of_reward(path) for path in paths if path]
        further = [[each.metric, each.name, each.path] for each in self.further]
        made = {"reward": reward, "clip": self.clip, "further": further, "oracle": self.use_oracle, "files": stamps}
        made["held_out"] = self.held_out
        if self.reward.pessimism:
            made["pessimism"] = self.reward.pessimism
        return digest(made | {"version": __version__})

    @property
    def metrics(self) -> list[str]:
        """The metrics of further rewards."""
        return [each.metric for each in self.further]

    @property
    def held_out(self) -> str | None:
        """The held-out reward: the run's, in the built-in world else the built-in one, and None if there is none."""
        return self.reward.held_out or (BUILTIN_HELD_OUT if self.use_oracle else None)

    @property
    def names(self) -> dict[str, str | None]:
        """What each reward is, by its metric: its name, of a function of the user's the file and the function."""
        parts = [_term(part) for part in self.reward.mixture]
        held_out = self.held_out and named(self.held_out, self.reward.held_out_path)
        if self.reward.pessimism:
            parts[-1] += f" - {self.reward.pessimism * len(parts):g} deviations"
        found = {"reward": " + ".join(parts) or named(self.reward.name, self.reward.path), "held_out": held_out}
        return found | {each.metric: named(each.name, each.path) for each in self.further}

    def cautions(self, clip_named: bool) -> list[str]:
        """Returns a warning for each measurement of real-world videos by a CLIP that was trained on the built-in world.

        Args:
            clip_named: whether the user chose ``clip``.
        """
        if self.use_oracle:
            return []
        found = []
        if not clip_named:
            found.append(f"CLIPSIM and consistency are by {DEFAULT_CLIP}, {_KNOWS}; name another with --clip")
        if self.held_out in BUILTIN:
            found.append(f"the held-out reward {self.held_out} {_KNOWS_ALONE}; set the run's reward.held_out")
        return found

    def text_limits(self, clip: FrameTextModel) -> list[TextLimit]:
        """Returns the limits of prompts of the rewards, and of ``clip`` unless it is the built-in one."""
        limits = reward_text_limits(self.reward)
        limits += [limit for each in self.further if (limit := reward_text_limit(each.name, each.path))]
        return limits + ([clip.limit] if isinstance(clip, NamedClip) else [])

    def movable(self) -> "Scorers":
        """Returns the same with a clip that a process in another working folder understands."""
        architecture, colon, file = self.clip.partition(":")
        clip = f"{architecture}:{Path(file).resolve()}" if colon else movable(self.clip)
        return Scorers(self.reward, clip, self.further, self.use_oracle)

    def load(self, device: torch.device) -> VideoScorer:
        """Loads all of them.

        Raises:
            ValueError: a reward or the CLIP cannot be loaded.
        """
        held_out = held_out_reward(self.reward, device)
        if held_out is None and self.held_out is not None:
            held_out = load_reward(self.held_out, device)
        further = load_further(self.further, self.reward, device, "--rewards")
        return VideoScorer(
            trained_reward(self.reward, device, ActorCaller),
            held_out,
            load_clip(self.clip, device),
            self.use_oracle,
            further,
            RewardCaller(self.reward.timeout),
        )


def load_further(
    further: Sequence[FurtherReward], reward: RewardConfig, device: torch.device, key: str
) -> dict[str, ImageReward]:
    """Loads further rewards, by the keys of their metrics, in the precision of a run's reward.

    Raises:
        ValueError: one cannot be loaded; ``key`` is the setting that names them.
    """
    settings: dict[str, Any] = {"precision": reward.precision, "chunk": reward.chunk}
    return {each.metric: load_reward(each.name, device, path=each.path, key=key, **settings) for each in further}


def load_run_scorer(config: RunConfig, device: torch.device, further: Sequence[FurtherReward] = ()) -> VideoScorer:
    """Loads the scorers of a guard or a sweep. A CLIP among its rewards also measures consistency and CLIPSIM.

    The held-out reward does so where it is a CLIP, else the first CLIP of ``further``. Without one the built-in CLIP
    measures videos of the built-in world, and the trained reward other videos, if it is a CLIP. Where the run has no
    held-out reward, the built-in one takes that place.

    Args:
        config: the run's.
        device: where they compute.
        further: held-out rewards of a guard.

    Raises:
        ValueError: a reward cannot be loaded.
    """
    trained, held_out = trained_reward(config.reward, device, ActorCaller), held_out_reward(config.reward, device)
    if held_out is None:
        held_out = load_reward(BUILTIN_HELD_OUT, device)
    use_oracle = Scorers.of(config).use_oracle
    others = load_further(further, config.reward, device, "guard.rewards")
    judges = (held_out, *others.values(), *(() if use_oracle else (trained,)))
    clip = next((each for each in judges if isinstance(each, ClipReward)), None)
    measuring = clip or load_clip(DEFAULT_CLIP, device)
    return VideoScorer(trained, held_out, measuring, use_oracle, others, RewardCaller(config.reward.timeout))


def differences(models: Sequence[EvaluatedModel]) -> list[str]:
    """Returns a line for each setting in which the runs differ, and in which all of them are evaluated as the first."""
    runs = [model.config for model in models[1:]]
    found: dict[str, list[str]] = {
        "sampling.guidance": [str(run.sampling.guidance) for run in runs],
        "sampling.final_level": [run.sampling.final_level for run in runs],
        "reward": [_reward_text(run.reward) for run in runs],
        "reward.held_out": [run.reward.held_out_path or Scorers.of(run).held_out or "none" for run in runs],
    }
    return [
        f"the runs differ in {key} ({', '.join(dict.fromkeys(values))}); all are evaluated with {values[0]}"
        for key, values in found.items()
        if len(set(values)) > 1
    ]


def _reward_text(reward: RewardConfig) -> str:
    parts = [f"{part.weight:g} x {part.path or part.name}{_floor(part)}" for part in reward.mixture]
    return " + ".join(parts) or reward.path or reward.name
