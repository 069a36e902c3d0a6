"""The rewards that judge trials: the base description's held-out reward, and those of its guard.

They are independent of what trials learn only if no trial trains on one of them.
"""

from collections.abc import Sequence
from typing import Any

from rlvid.config import RunConfig
from rlvid.config.reward import NamedReward
from rlvid.metric_names import REWARD_PREFIX, metric_key
from rlvid.models.folders import WAN, family, structure_folder
from rlvid.models.video_shape import resolved_shape

GAIN = "gain"
"""The objective that is the guard's gain: the least one over the base model in a held-out reward."""


def check_objectives(objectives: Sequence[str], base: RunConfig) -> None:
    """Checks that the base description has the rewards that objectives need.

    Raises:
        ValueError: it has no held-out reward; or an objective is no reward of its guard, or is the oracle.
    """
    for one in ("held_out", GAIN):
        if one in objectives and base.reward.held_out is None:
            raise ValueError(
                f"objective {one}: the base has reward.held_out = null; set reward.held_out=... (and its path), or "
                "leave it out of objectives and metric"
            )
    judges = {metric_key(each.label): each.name for each in base.guard_rewards}
    for one in objectives:
        if one.startswith(REWARD_PREFIX) and one not in judges:
            raise ValueError(
                f"objective {one}: no reward of the base's guard; allowed: {', '.join(judges) or 'none'}; leave it out "
                "of objectives and metric, or name the reward in guard.rewards"
            )
    if _uses(objectives) and "oracle" in judges.values():
        raise ValueError("guard.rewards: a sweep chooses nothing by the oracle; leave it out")


def check_trial(objectives: Sequence[str], base: RunConfig, run: RunConfig) -> None:
    """Checks that a trial can be measured beside the others.

    Raises:
        ValueError: it trains on a reward that judges it; or its videos are of another kind than the base's.
    """
    for judge, way_out in _judges(objectives, base):
        if run.reward.trains_on(judge.name, judge.path):
            raise ValueError(
                f"a trial trains on {judge.label}, which judges all trials; {way_out}, or leave held_out, {GAIN} and "
                f"{REWARD_PREFIX}NAME out of objectives and metric"
            )
    if (run.model, run.sampling.negative_prompt) == (base.model, base.sampling.negative_prompt):
        return
    own, others = _sampled(run), _sampled(base)
    for key, value in own.items():
        if value != others[key]:
            raise ValueError(
                f"a trial has {key} = {value!r}, and the base {others[key]!r}: its videos would be of another kind "
                f"than those that it is measured beside; set {key} for all trials, and leave it out of the space"
            )


def _judges(objectives: Sequence[str], base: RunConfig) -> list[tuple[NamedReward, str]]:
    """Returns the rewards that objectives judge by, other than the base's own, and what to do about each."""
    held_out = base.reward.held_out
    found = [(each, "leave it out of guard.rewards") for each in base.guard_rewards] if _uses(objectives) else []
    if held_out is not None and {"held_out", GAIN} & set(objectives):
        own = NamedReward(name=held_out, path=base.reward.held_out_path)
        found.insert(0, (own, "set another reward.held_out"))
    return found


def _sampled(run: RunConfig) -> dict[str, Any]:
    """Returns what a run's videos are sampled with, in training and in a measurement, by key."""
    shape, spec = resolved_shape(run.model), run.model
    shift = spec.shift
    if shift is None and family(spec.path) is WAN:
        from rlvid.models.flow_shift import scheduler_shift  # seconds of imports, for these models alone

        shift = scheduler_shift(structure_folder(spec.path))
    return {
        "model.frames": shape.frames,
        "model.height": shape.height,
        "model.width": shape.width,
        "model.shift": shift,
        "sampling.negative_prompt": run.sampling.negative_prompt,
    }


def _uses(objectives: Sequence[str]) -> bool:
    return any(one == GAIN or one.startswith(REWARD_PREFIX) for one in objectives)
