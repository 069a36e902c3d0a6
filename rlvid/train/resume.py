"""The parts of a checkpoint that a resumed run can use: all, or the weights alone after another split of the work.

======================================================  ==========================================================
between the checkpoint and now                          what carries over
======================================================  ==========================================================
nothing changed                                         all, bit for bit
other workers or micro-batches, ZeRO 0 before and now   all: every draw belongs to a sample, the sums round otherwise
other workers under ZeRO 1 to 3, or another stage       the weights and the method's state, if train.resume=weights
any other key of the run                                nothing: it is another run
======================================================  ==========================================================
"""

from typing import Any, Literal

from rlvid.config import RunConfig
from rlvid.config.section import Section

_SPLIT = ("workers", "micro_batch", "rollout_batch", "zero_stage")
"""Keys of ``train`` that say how the work is split, and not what is computed."""


def carries_over(before: RunConfig, now: RunConfig, *, has_checkpoint: bool = True) -> Literal["all", "weights"]:
    """Returns which parts of a checkpoint made under ``before`` a run under ``now`` can use.

    Args:
        before: settings of the checkpoint, or of the run's folder while there is no checkpoint.
        now: settings of the run that resumes.
        has_checkpoint: whether there is a checkpoint; else every split starts at step 0 alike.

    Raises:
        ValueError: the settings are of another run, or the optimiser's state is of another split of the work.
    """
    split = {key: getattr(before.train, key) for key in _SPLIT}
    if now.model_copy(update={"train": now.train.model_copy(update=split)}).fingerprint != before.fingerprint:
        raise ValueError(f"another config ({differences(before, now)})")
    stages, workers = {before.train.zero_stage, now.train.zero_stage}, {before.train.workers, now.train.workers}
    if not has_checkpoint or stages == {0} or (len(stages) == 1 and len(workers) == 1):
        return "all"
    if now.train.resume == "weights":
        return "weights"
    raise ValueError(
        f"a checkpoint of {before.train.workers} workers under ZeRO stage {before.train.zero_stage}, whose optimiser "
        f"state does not fit {now.train.workers} under stage {now.train.zero_stage}; set "
        f"train.workers={before.train.workers} train.zero_stage={before.train.zero_stage}, or train.resume=weights to "
        "continue from the weights alone"
    )


def notice(before: RunConfig, now: RunConfig, step: int) -> str | None:
    """Returns a notice for a run that resumes with another split of the work; None if nothing is lost."""
    if carries_over(before, now) == "weights":
        return (
            f"WARNING: continues after step {step} from the weights alone (train.resume=weights): the optimiser's "
            "moments start at zero, so the result differs from an uninterrupted run"
        )
    if before.train.workers != now.train.workers:
        return (
            f"continues after step {step} with {now.train.workers} workers instead of {before.train.workers}: the same "
            "result up to rounding, no longer bit for bit"
        )
    return None


def differences(before: Section, now: Section) -> str:
    """Returns the settings that differ, as ``key: old -> new``, a few of them."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    changed = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    return ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else "")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
