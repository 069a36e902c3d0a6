"""From a config to a finished run: checks, encoding, Ray Train, and what is left in the run's folder.

A run's folder, ``{storage}/{name}``::

    config.yaml       the settings, as validated
    clips.txt         fingerprint of the clips
    step-000050/ ...  checkpoints
    tensorboard/      scalars and videos
    archive/          generated samples with their rewards, Parquet
    logs/             one full log a worker
    guard.jsonl, best/, ...   where a guard looked on, see rlvid.train.guard_folder
"""

import logging
import os
import shutil
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from rlvid.cluster.connect import start_ray
from rlvid.cluster.nodes import BOOTSTRAP, check_nodes, check_resources, fits_now, needed, nodes_possible
from rlvid.config import RunConfig
from rlvid.data.clips import EncodedClips
from rlvid.data.encode import model_fingerprint
from rlvid.data.sources import encoded_clips, sample_prompts
from rlvid.files import held, write_whole
from rlvid.interrupt import kept
from rlvid.models.folders import movable, resolved_shape
from rlvid.models.lora import check_targets
from rlvid.models.stored import check_model
from rlvid.models.text_limit import model_text_limit, notices
from rlvid.models.unet3d import denoiser_outline
from rlvid.reward.load import check_reward
from rlvid.reward.text_limit import reward_text_limits
from rlvid.runs.checkpoints import find_checkpoints, latest_checkpoint, read_settings
from rlvid.storage import Mirror, home, is_uri, run_mirror
from rlvid.train.fit import fit_again, reason, run_fit
from rlvid.train.guard_folder import guard_prompts
from rlvid.train.record import check_resume, settle
from rlvid.train.resume import notice

log = logging.getLogger("rlvid.train")

_MIN_FREE_BYTES = 200 * 2**20


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, the last checkpoint, its first and last step this time, and what was skipped."""

    folder: Path
    checkpoint: Path
    first_step: int
    last_step: int
    skipped: int
    seconds: float


def run_folder(config: RunConfig) -> Path:
    """Absolute path of the run's folder on this machine."""
    return home(config.output.storage) / config.name


def check(config: RunConfig) -> None:
    """What can be known to be wrong before a folder is made or Ray starts.

    Raises:
        ValueError: the model's folder is not one, segments do not fit its frames, no layer has the name of an adapter's
            target, a reward's file or function is not what it should be, or the clips or prompts are not there.
    """
    check_model(config.model.path)
    frames, _ = resolved_shape(config.model.path, config.model.frames, config.model.size)
    if config.reward.segments > frames:
        raise ValueError(
            f"reward.segments = {config.reward.segments} exceeds the {frames} frames of a video; allowed: 1 to {frames}"
        )
    check_reward(config.reward, config.method.needs_gradient)
    if config.model.finetune == "lora":
        check_targets(denoiser_outline(config.model.path), config.model.lora.targets)
    if config.data.source == "samples":
        sample_prompts(config)
    elif config.data.source != "builtin":
        EncodedClips.open(Path(config.data.source).expanduser(), model_fingerprint(config.model))
    if config.guard.every and is_uri(config.output.storage):
        raise ValueError(
            f"guard.every = {config.guard.every}: the guard looks at checkpoints in a folder, and output.storage = "
            f"{config.output.storage!r} is a store of objects; set guard.every=0, or a folder that all nodes mount"
        )
    if config.guard.every and config.guard.prompts is not None:
        guard_prompts(config, [])


def in_a_job(folder: Path) -> bool:
    """Whether a folder lies where Ray puts the copy of the working directory that a job runs in."""
    return "working_dir_files" in folder.parts


def prepare(config: RunConfig) -> Path:
    """Makes the run's folder, or checks that an existing one is of the same run; writes nothing into it.

    Raises:
        ValueError: the folder cannot be written, the disk is full, or the name belongs to another config.
    """
    folder = run_folder(config)
    if in_a_job(folder):
        raise ValueError(
            f"output.storage = {config.output.storage!r} lies in the job's own folder, which the cluster deletes; give "
            "an absolute path that all nodes share, or s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
        )
    known = folder / "config.yaml"
    if known.is_file():
        try:
            before = read_settings(folder)
        except ValueError as error:
            raise ValueError(f"{error}; bring the file back, or choose another name=...") from None
        begun = (folder / "archive").is_dir()  # workers make it once they are ready; a failed start is no run yet
        if begun:
            check_resume(folder, before, config, resumable=not is_uri(config.output.storage))
    elif folder.is_dir() and any(not _of_a_killed_start(entry) for entry in folder.iterdir()):
        raise ValueError(f"{folder} exists and is not a run of rlvid; choose another name=... or output.storage=...")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(
            f"output.storage = {config.output.storage!r}: {folder} cannot be written ({error.strerror}); "
            "choose a folder that you may write to"
        ) from error
    if free < _MIN_FREE_BYTES:
        raise ValueError(
            f"output.storage = {config.output.storage!r}: {free >> 20} MiB are free and a run needs at least "
            f"{_MIN_FREE_BYTES >> 20}; free some space or choose another folder"
        )
    return folder


def keep_clips(folder: Path, clips: Path) -> None:
    """Notes which clips a run trains on.

    Raises:
        ValueError: the run has begun with others, such as of prompts that were edited since.
    """
    note, now = folder / "clips.txt", EncodedClips.open(clips).meta["fingerprint"]
    if (folder / "archive").is_dir() and note.is_file() and note.read_text(encoding="utf-8") != now:
        raise ValueError(
            f"run {folder.name!r} began with other clips than those in {clips} now are; bring them (or the prompts "
            "they were sampled from) back, or choose another name=..."
        )
    note.write_text(now, encoding="utf-8")


def cut_captions(config: RunConfig, clips: Path) -> list[str]:
    """A line on the captions and the guard's prompts that the text encoder or a reward reads in part only."""
    limits = [model_text_limit(config.model.path), *reward_text_limits(config.reward)]
    captions = EncodedClips.open(clips).captions
    own = guard_prompts(config, []) if config.guard.every and config.guard.prompts is not None else []
    return [*notices(limits, captions, "captions"), *notices(limits, own, "guard.prompts")]


def _of_a_killed_start(entry: Path) -> bool:
    """Whether a file is one that a first start leaves when it is killed before it has written the settings."""
    return entry.name[0] == "." or entry.name.endswith(".tmp")


def _write_config(config: RunConfig, folder: Path) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_whole(folder / "config.yaml", text.encode())


def _settle(config: RunConfig, mirror: Mirror, console: Console, damaged: dict[str, str] | None = None) -> None:
    """Puts damaged checkpoints aside; prints their names, and what a run with another split of work keeps.

    Raises:
        ValueError: the checkpoint that is left is of a split that cannot be carried over.
    """
    for line in settle(mirror, damaged):
        console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)
    latest = latest_checkpoint(mirror.folder, resumable=not is_uri(config.output.storage))
    if latest and (text := notice(latest[0], config, latest[1])):
        console.print(text, style="bold" if text.startswith("WARNING") else None, markup=False, soft_wrap=True)


def train(config: RunConfig, console: Console, address: str | None = None) -> Finished:
    """Runs or resumes a run to its last step.

    Raises:
        ValueError: bad input or a full cluster, before anything heavy starts.
        RuntimeError: a worker failed more often than allowed, with the worker's own error; or too many steps in a row
            were not finite.
    """
    check(config)
    mirror = run_mirror(config.output.storage, config.name)
    folder = prepare(config)
    with _alone(folder):
        _settle(config, mirror, console)
        _write_config(config, folder)
        mirror.push()
        with kept(lambda: _kept(folder, not is_uri(config.output.storage))):
            return _fit(config, mirror, console, address)


def _kept(folder: Path, here: bool) -> str:
    """What an interrupted run has: its last checkpoint."""
    found = find_checkpoints(folder, resumable=here)
    if not found:
        return f"run {folder.name} has no checkpoint yet and begins at step 0" if here else "its checkpoints are kept"
    return f"run {folder.name} stands after step {found[-1].step}, in {_shown(folder)}"


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Holds the run's folder for this process; the hold ends with it, however it ends."""
    way = "wait for its end, or choose another name=..."
    otherwise = f"run {folder.name!r} in {folder} is being trained by another process; {way}"
    return held(folder / ".lock", otherwise, folder / "guard")


def _fit(config: RunConfig, mirror: Mirror, console: Console, address: str | None) -> Finished:
    folder, stored = mirror.folder, is_uri(config.output.storage)
    start_ray(address)
    from rlvid.train.guard import check_room, watching

    use_gpu = check_resources(config)
    check_nodes(config.output.storage if stored else str(folder.parent), config.name)
    check_room(config, use_gpu, nodes_possible())
    if not (enough := fits_now(config, use_gpu)):
        console.print("waiting for nodes that the cluster's autoscaler is to bring", highlight=False)
    clips = encoded_clips(config, console)
    keep_clips(folder, clips)
    for line in cut_captions(config, clips):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    mirror.push()

    import ray.train
    from ray.train.torch import TorchTrainer

    from rlvid.train.loop import train_worker
    from rlvid.train.progress import Board, ProgressLine

    board = Board.remote()
    cpus = config.train.cpus_per_worker
    environment = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
    if not use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    job = {
        "config": config.model_dump(), "clips": str(clips), "run": str(folder), "use_gpu": use_gpu, "board": board,
        "model": movable(config.model.path), "reward": config.reward.resolved().model_dump(),
        "watched": os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "").lower() in ("1", "true"),
        "storage": config.output.storage if stored else None,
        "clips_storage": config.output.storage if stored and config.data.source in ("builtin", "samples") else None,
    }  # fmt: skip
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=use_gpu,
            resources_per_worker=needed(config, use_gpu),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.output.storage if stored else str(folder.parent),
            failure_config=ray.train.FailureConfig(
                max_failures=config.train.max_failures,
                # Minutes that workers may wait for room: for ever where an autoscaler is to bring nodes.
                controller_failure_limit=-1 if BOOTSTRAP.is_file() or not enough else max(3, config.train.max_failures),
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.output.keep_checkpoints),
            worker_runtime_env={"env_vars": environment},
        ),
    )

    def fit() -> Any:
        """Trains from the newest checkpoint whose bytes are those that were written."""
        while damaged := (result := trainer.fit()).return_value.get("damaged"):
            _settle(config, run_mirror(config.output.storage, config.name), console, damaged)
        return result

    guard = watching(config, folder, clips, job["model"], use_gpu, console)
    try:
        with guard as job["stop"], ProgressLine(board, config.train.steps, console):
            result = run_fit(lambda: fit_again(fit, config.train.max_failures), board, console)
    except (ray.train.WorkerGroupError, ray.train.ControllerError, ray.exceptions.RayActorError) as error:
        raise RuntimeError(reason(error, folder, board)) from error
    done = result.return_value
    if done["problem"]:
        raise RuntimeError(f"training stopped: {done['problem']}")
    run_mirror(config.output.storage, config.name)
    last = find_checkpoints(folder, resumable=not stored)[-1]
    return Finished(folder, last.folder, done["first_step"], last.step, done["skipped"], done["seconds"])


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
