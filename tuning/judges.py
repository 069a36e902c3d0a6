"""The rewards that judge trials: the base description's held-out reward, and those of its guard.

They are independent of what trials learn only if no trial trains on one of them.
"""

from collections.abc import Sequence

from rlvid.config import RunConfig
from rlvid.metric_names import REWARD_PREFIX, metric_key

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
    """Checks that a trial does not train on a reward that judges it.

    Raises:
        ValueError: it does.
    """
    if not _uses(objectives):
        return
    for judge in base.guard_rewards:
        if (judge.name, judge.path) in run.reward.parts:
            raise ValueError(
                f"a trial trains on {judge.label}, a reward of the base's guard, which judges all trials; leave it out "
                f"of guard.rewards, or {GAIN} and {REWARD_PREFIX}NAME out of objectives and metric"
            )


def _uses(objectives: Sequence[str]) -> bool:
    return any(one == GAIN or one.startswith(REWARD_PREFIX) for one in objectives)
