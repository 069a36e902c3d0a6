"""Ray Train's record of a run's checkpoints, corrected before each start.

Ray Train resumes from what ``checkpoint_manager_snapshot.json`` names, and gives up for good where that file is cut off
or names a checkpoint that is gone. So before each start the checkpoints themselves count: those that are not whole are
put aside, and the record is written anew from the others.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from operator import methodcaller
from pathlib import Path
from typing import Any

from pyarrow import fs

from rlvid.config import RunConfig
from rlvid.config.reward_names import absolute, is_function
from rlvid.data.clips import digest
from rlvid.files import read_mapping, size_and_ends, write_atomic
from rlvid.runs.checkpoints import (
    CheckpointRef,
    checkpoint_name,
    flaw,
    latest_checkpoint,
    step_of,
)
from rlvid.storage import Mirror
from rlvid.train.resume import carries_over

RECORD = "checkpoint_manager_snapshot.json"
_OF_A_MODEL = {".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model"}


def reward_digest(path: str | None) -> str | None:
    """Returns a digest of a reward's file, or of the weights, settings and vocabularies of its folder.

    None where there is none, as with a function or an address.
    """
    place = absolute(path)
    if place is None or path == "random" or is_function(place) or not Path(place).exists():
        return None
    folder, files = Path(place), [Path(place)]
    if folder.is_dir():
        found = (each for each in folder.rglob("*") if each.suffix in _OF_A_MODEL and each.is_file())
        files = sorted(each for each in found if each.name != "report.json")
    names = [each.relative_to(folder).as_posix() for each in files]
    shown = zip(names, files, strict=True)
    return digest([[name, size_and_ends(file)] for name, file in shown if not f"/{name}".count("/.")])


def check_resume(run: Path, before: RunConfig, now: RunConfig, resumable: bool = True) -> None:
    """Checks that a run may continue under ``now``; ``before`` are the settings in its folder.

    Raises:
        ValueError: it may not; see ``rlvid.train.resume.carries_over``.
    """
    latest = latest_checkpoint(run, resumable)
    try:
        carries_over(latest[0] if latest else before, now, has_checkpoint=latest is not None)
    except ValueError as error:
        raise ValueError(
            f"run {now.name!r} exists in {run} with {error}; choose another name=..., or delete the folder to "
            "start anew"
        ) from None


def repair_record(mirror: Mirror, damaged: dict[str, str] | None = None) -> list[str]:
    """Leaves a run with whole checkpoints alone, and Ray Train with a record of them; returns a line on each other.

    A checkpoint that is not whole is renamed ``step-000050.damaged``. One that Ray Train never counted, since the run
    was stopped while it was written, is deleted.

    Args:
        mirror: the run's, brought to the store's state; nobody trains the run.
        damaged: name -> what is wrong, of checkpoints that workers found damaged.
    """
    run, stored = mirror.folder, mirror.sizes()
    counted = recorded(run)
    there = {p.name for p in run.iterdir()} if stored is None else {name.partition("/")[0] for name in stored}
    names = sorted(name for name in there | set(damaged or {}) | set(counted or []) if step_of(name) is not None)
    whole, lines = list[CheckpointRef](), list[str]()
    for name in names:
        sizes = None if stored is None else _below(name, stored)
        why = (damaged or {}).get(name) or flaw(run / name, sizes=sizes)
        if why is None:
            whole.append(CheckpointRef(run / name, step_of(name) or 0))
        elif name not in there:
            lines.append(f"checkpoint {name} is missing")
        elif counted is not None and name not in {*counted, *(damaged or {})}:
            shutil.rmtree(run / name, ignore_errors=True)
            mirror.delete(methodcaller("startswith", f"{name}/"))
            lines.append(f"checkpoint {name} was not finished when the run was stopped, and was deleted")
        else:
            aside = _free(f"{name}.damaged", there)
            mirror.rename(name, aside)
            lines.append(f"checkpoint {name} is damaged ({why}) and was renamed to {aside}")
    whole.sort(key=lambda found: found.step)
    step = f"continues after step {whole[-1].step}" if whole else "starts at step 0, because there is no other"
    if names or (run / RECORD).exists():
        text = json.dumps(_record([found.step for found in whole]))
        write_atomic(run / RECORD, text.encode())
    mirror.push()
    return [f"{line}; the run {step}" for line in lines]


def recorded(run: Path) -> list[str] | None:
    """Names of the checkpoints that Ray Train's record counts; None where there is no record, or a damaged one."""
    with suppress(ValueError, KeyError, TypeError):
        return [str(result["checkpoint_dir_name"]) for result in read_mapping(run / RECORD)["checkpoint_results"]]
    return None


def recorded_step(store: fs.FileSystem, path: str) -> int:
    """Returns the step of the checkpoint that Ray Train resumes from, by its record in a store; 0 without a record."""
    if store.get_file_info(path).type != fs.FileType.File:
        return 0
    with store.open_input_stream(path) as file:
        latest = json.loads(file.read())["latest_checkpoint_result"]
    return 0 if latest is None else step_of(latest["checkpoint_dir_name"]) or 0


def _below(folder: str, sizes: Mapping[str, int]) -> dict[str, int]:
    return {name.removeprefix(f"{folder}/"): size for name, size in sizes.items() if name.startswith(f"{folder}/")}


def _free(name: str, taken: set[str]) -> str:
    """Returns the name, with a number where it is taken."""
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


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
