"""The rewards that judge trials: the base description's held-out reward, and those of its guard.

They are independent of what trials learn only if no trial trains on one of them.
"""

from collections.abc import Sequence

from rlvid.config import RunConfig
from rlvid.config.reward import NamedReward
from rlvid.metric_names import REWARD_PREFIX, metric_key

GAIN = "gain"
"""The objective that is the guard's gain: the least one over the base model in a held-out reward."""
SAME_VIDEOS = (
    "model.frames", "model.size", "model.height", "model.width", "model.shift", "sampling.negative_prompt",
)  # fmt: skip
"""Keys of a run that its videos are sampled with, in training and in a measurement."""


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
    for judge in _judges(objectives, base):
        if run.reward.trains_on(judge.name, judge.path):
            raise ValueError(
                f"a trial trains on {judge.label}, which judges all trials; name another reward.held_out, leave it out "
                f"of guard.rewards, or held_out, {GAIN} and {REWARD_PREFIX}NAME out of objectives and metric"
            )
    for key in SAME_VIDEOS:
        section, name = key.split(".")
        own, others = getattr(getattr(run, section), name), getattr(getattr(base, section), name)
        if own != others:
            raise ValueError(
                f"a trial has {key} = {own!r}, and the base {others!r}: its videos would be of another kind than those "
                f"that it is measured beside; set {key} for all trials, and leave it out of the space"
            )


def _judges(objectives: Sequence[str], base: RunConfig) -> list[NamedReward]:
    """Returns the rewards that objectives are made of, without the one that the base trains on."""
    held_out, guard = base.reward.held_out, base.guard_rewards if _uses(objectives) else []
    if held_out is None or not {"held_out", GAIN} & set(objectives):
        return guard
    return [NamedReward(name=held_out, path=base.reward.held_out_path), *guard]


def _uses(objectives: Sequence[str]) -> bool:
    return any(one == GAIN or one.startswith(REWARD_PREFIX) for one in objectives)
