"""What a run's folder says of its earlier starts: the latest checkpoint, and Ray Train's own record of checkpoints.

Ray Train resumes from what ``checkpoint_manager_snapshot.json`` names, and writes that file in place: a kill or a full
disk at that moment leaves it cut off, and a run that Ray Train would never start again. Every checkpoint is on disk by
then, so the record is made anew from what is there.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from rlvid.config import RunConfig, parse_config
from rlvid.train.checkpoint import checkpoint_name, find_checkpoints, read_state
from rlvid.train.resume import carries_over

log = logging.getLogger("rlvid.train")

RECORD = "checkpoint_manager_snapshot.json"


def latest_checkpoint(run: Path, resumable: bool = True) -> tuple[RunConfig, int] | None:
    """Settings and step of a run's latest whole checkpoint, if it has one.

    Here and below, without ``resumable`` the folder mirrors an object store and lacks what only workers need.
    """
    found = find_checkpoints(run, resumable)
    return (parse_config(read_state(found[-1].folder)["config"]), found[-1].step) if found else None


def check_resume(run: Path, before: RunConfig, now: RunConfig, resumable: bool = True) -> None:
    """Checks that a run that has begun may go on under ``now``; ``before`` are the settings in its folder.

    Raises:
        ValueError: it may not; see ``rlvid.train.resume.carries_over``.
    """
    latest = latest_checkpoint(run, resumable)
    try:
        carries_over(latest[0] if latest else before, now, begun=latest is not None)
    except ValueError as error:
        raise ValueError(
            f"run {now.name!r} exists in {run} with {error}; choose another name=..., or delete the folder to "
            "start anew"
        ) from None


def mend_record(run: Path, resumable: bool = True) -> bool:
    """Makes Ray Train's record anew if it is cut off, from the whole checkpoints; returns whether it did.

    All workers have written the checkpoints that are there when Ray Train writes the record.
    """
    path = run / RECORD
    if not path.is_file() or _is_readable(path):
        return False
    part = path.with_name(f"{RECORD}.tmp")
    steps = [found.step for found in find_checkpoints(run, resumable)]
    part.write_text(json.dumps(_record(steps)), encoding="utf-8")
    os.replace(part, path)
    log.warning("%s was cut off and has been made anew", path)
    return True


def _is_readable(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False


def _record(steps: list[int]) -> dict[str, Any]:
    """In the layout of Ray 2.60; ``Worker.save`` reports ``{"step": step}`` with each checkpoint."""
    import ray

    results = [{"version": 0, "checkpoint_dir_name": checkpoint_name(s), "metrics": {"step": s}} for s in steps]
    lists = (
        "pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names",
        "timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names",
    )  # fmt: skip
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(1, len(steps) + 1)),
        "latest_checkpoint_result": results[-1] if results else None,
        "current_report_index": len(steps),
        **{name: [] for name in lists},
    }
