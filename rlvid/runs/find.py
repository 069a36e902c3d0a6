"""Finds a run by its folder, name or URI, and a checkpoint of it."""

import logging
import shlex
from pathlib import Path

from rlvid.config import RunConfig
from rlvid.files import damaged
from rlvid.runs.checkpoints import CheckpointRef, checkpoint_folders, find_checkpoints, flaw, read_settings
from rlvid.runs.guard_log import find_best
from rlvid.storage import home, is_uri, run_mirror, split_uri

log = logging.getLogger("rlvid.evaluate")


def find_run(run: str | Path, step: int | None = None) -> tuple[RunConfig, CheckpointRef]:
    """Returns a run's settings and one of its checkpoints, the latest by default.

    Args:
        run: see ``find_checkpoints_of``.
        step: of the checkpoint.

    Raises:
        ValueError: no such run, or no such checkpoint in it, or the store cannot be reached.
    """
    config, found = find_checkpoints_of(run)
    return config, choose(found, step)


def choose(found: list[CheckpointRef], step: int | None) -> CheckpointRef:
    """Returns the checkpoint of a step, or the newest one, of a run; its trained weights match their checksums.

    Newer ones that are damaged are passed over, and named in the log.

    Raises:
        ValueError: there is none of that step, or it is damaged.
    """
    run = found[-1].folder.parent
    if step is None:
        return _newest(run, found)
    chosen = next((c for c in found if c.step == step), None)
    if chosen is None:
        steps = ", ".join(str(c.step) for c in found)
        raise ValueError(f"run {run}: no checkpoint of step {step}; it has: {steps}")
    check_whole(chosen)
    return chosen


def check_whole(found: CheckpointRef) -> None:
    """Raises ValueError where what evaluation needs of a checkpoint is not as it was written."""
    if why := flaw(found.folder, resumable=False, read=True):
        raise damaged(f"checkpoint {found.folder}", why, "name another step, or train the run again")


def _newest(run: Path, found: list[CheckpointRef]) -> CheckpointRef:
    """Returns the newest whole checkpoint; newer folders of checkpoints that are not whole are named in the log."""
    passed = list[str]()
    for each in sorted(dict.fromkeys([*found, *checkpoint_folders(run)]), key=lambda each: each.step, reverse=True):
        why = flaw(each.folder, resumable=False, read=True)
        if why is None:
            for line in passed:
                log.error("%s; step %d is used", line, each.step)
            return each
        passed.append(f"checkpoint {each.folder} is not whole ({why})")
    raise ValueError(f"{passed[0]}, and there is no other; train the run again")


def find_checkpoints_of(run: str | Path) -> tuple[RunConfig, list[CheckpointRef]]:
    """Returns a run's settings and all its checkpoints, oldest first, with the guard's best if training deleted it.

    Args:
        run: the run's folder, or the name of one under ``runs``, or the run's URI; what it holds of the model is
            fetched then.

    Raises:
        ValueError: no such run, or no checkpoint in it, or the store cannot be reached.
    """
    if is_uri(run):
        run = run_mirror(*split_uri(run)).folder
    folder = run_folder_of(run)
    if folder is None:
        raise ValueError(_no_run(str(run)))
    config = read_settings(folder)
    kept, best = find_checkpoints(folder, resumable=False), find_best(folder)
    found = sorted([*kept, *([best] if best and best.step not in {c.step for c in kept} else [])], key=lambda c: c.step)
    if not found:
        broken = [f"{each.folder.name}: {flaw(each.folder, resumable=False)}" for each in checkpoint_folders(folder)]
        if broken:
            each = ", ".join(broken)
            raise ValueError(f"run {folder}: no checkpoint is whole ({each}); start the run's `rlvid train` again")
        raise ValueError(
            f"run {folder}: no checkpoint; it has: none yet, and one is written every {config.output.checkpoint_every} "
            "steps (output.checkpoint_every) and at the end; wait for it, or start the run's `rlvid train` again"
        )
    return config, found


def _no_run(run: str) -> str:
    """Returns the error for a run that is not found, with the names that exist."""
    known = ", ".join(sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))) or "none"
    there = next((p for p in (Path(run), Path("runs") / run) if p.is_dir()), None)
    if there is None:
        return f"run {run!r}: no such folder, and no such run under runs (there: {known})"
    if (there / "model_index.json").is_file():
        what = "is a model, as `rlvid export` writes one, and no run; name the run that it is of"
        setting = shlex.quote(f"model.path={there}")
        return f"run {run!r}: {what} (under runs there are: {known}), or train from it with {setting}"
    what = "is no run, for it has no config.yaml; name a folder that `rlvid train` wrote"
    return f"run {run!r}: {what}, or a name under runs (there: {known})"


def run_folder(config: RunConfig) -> Path:
    """Returns the absolute path of a run's folder on this machine."""
    return home(config.output.storage) / config.name


def run_folder_of(run: str | Path) -> Path | None:
    """Returns the folder of a run by its path or by its name under ``runs``; None where there is none."""
    return next((p for p in (Path(run), Path("runs") / run) if (p / "config.yaml").is_file()), None)
