"""From a config to a finished run: checks, encoding, Ray Train, and what is left in the run's folder.

A run's folder, ``{storage}/{name}``::

    config.yaml       the settings, as validated
    clips.txt         fingerprint of the clips
    step-000050/ ...  checkpoints
    tensorboard/      scalars and videos
    archive/          generated samples with their rewards, Parquet
    logs/             one full log a worker
    guard.jsonl, best/, ...   where a guard looked on, see rlvid.train.looks
"""

import fcntl
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from rlvid.config import RunConfig, parse_config
from rlvid.data.clips import EncodedClips
from rlvid.data.encode import model_fingerprint
from rlvid.data.sources import encoded_clips, sample_prompts
from rlvid.models.folders import model_folder, movable, resolved_shape
from rlvid.models.lora import check_targets
from rlvid.models.unet3d import denoiser_outline
from rlvid.reward.load import check_reward
from rlvid.train.checkpoint import find_checkpoints
from rlvid.train.looks import guard_prompts

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
    """Absolute path of the run's folder."""
    return Path(config.output.storage).expanduser().resolve() / config.name


def check(config: RunConfig) -> None:
    """What can be known to be wrong before a folder is made or Ray starts.

    Raises:
        ValueError: the model's folder is not one, segments do not fit its frames, no layer has the name of an adapter's
            target, a reward's file or function is not what it should be, or the clips or prompts are not there.
    """
    model_folder(config.model.path)
    frames, _ = resolved_shape(config.model.path, config.model.frames, config.model.size)
    if config.reward.segments > frames:
        raise ValueError(
            f"reward.segments = {config.reward.segments} exceeds the {frames} frames of a video; allowed: 1 to {frames}"
        )
    check_reward(config.reward, config.method.needs_gradient)
    if config.model.train == "lora":
        check_targets(denoiser_outline(config.model.path), config.model.lora.targets)
    if config.data.source == "samples":
        sample_prompts(config)
    elif config.data.source != "builtin":
        EncodedClips.open(Path(config.data.source).expanduser(), model_fingerprint(config.model))
    if config.guard.every and config.guard.prompts is not None:
        guard_prompts(config, [])


def prepare(config: RunConfig) -> Path:
    """Makes the run's folder, or checks that an existing one is of the same run; writes nothing into it.

    Raises:
        ValueError: the folder cannot be written, the disk is full, or the name belongs to another config.
    """
    folder = run_folder(config)
    known = folder / "config.yaml"
    if known.is_file():
        before = parse_config(yaml.safe_load(known.read_text(encoding="utf-8")))
        begun = (folder / "archive").is_dir()  # workers make it once they are ready; a failed start is no run yet
        if begun and before.fingerprint != config.fingerprint:
            raise ValueError(
                f"run {config.name!r} exists in {folder} with another config ({differences(before, config)}); "
                "choose another name=..., or delete the folder to start anew"
            )
    elif folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir()):
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


def _write_config(config: RunConfig, folder: Path) -> None:
    temporary = folder / "config.yaml.tmp"
    temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    os.replace(temporary, folder / "config.yaml")


def differences(before: RunConfig, now: RunConfig) -> str:
    """The settings that differ, as ``key: old -> new``, a few of them."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    changed = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    return ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else "")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def start_ray(address: str | None = None) -> None:
    """Connects to the cluster of ``address`` or RAY_ADDRESS, else starts Ray on this machine; quietly.

    Raises:
        ValueError: no cluster answers at the address.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        local: dict[str, Any] = {"include_dashboard": False} if target == "local" else {}
        with _silent_stderr():
            ray.init(address=target, log_to_driver=False, logging_level="ERROR", **local)
    except ConnectionError as error:
        raise ValueError(
            f"no Ray cluster answers at {target!r}; start one (`ray start --head`) or leave the address out"
        ) from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides what Ray's C++ parts write about themselves while they start; Python errors still come through."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def check_resources(config: RunConfig) -> bool:
    """Whether workers get a GPU each.

    Raises:
        ValueError: the cluster is too small for the workers.
    """
    import ray

    have = ray.cluster_resources()
    train = config.train
    gpus, cpus = have.get("GPU", 0), have.get("CPU", 0)
    use_gpu = gpus >= train.workers if train.use_gpu is None else train.use_gpu
    if use_gpu and gpus < train.workers:
        raise ValueError(
            f"train.workers = {train.workers} with train.use_gpu=true needs {train.workers} GPUs; "
            f"the cluster has {gpus:g}"
        )
    if train.workers * train.cpus_per_worker > cpus:
        raise ValueError(
            f"train.workers = {train.workers} at train.cpus_per_worker = {train.cpus_per_worker:g} needs "
            f"{train.workers * train.cpus_per_worker:g} CPU cores; the cluster has {cpus:g}; "
            f"set train.workers to at most {int(cpus // train.cpus_per_worker)}"
        )
    return use_gpu


def train(config: RunConfig, console: Console, address: str | None = None) -> Finished:
    """Runs or resumes a run to its last step.

    Raises:
        ValueError: bad input or a full cluster, before anything heavy starts.
        RuntimeError: a worker failed more often than allowed, with the worker's own error; or too many steps in a row
            were not finite.
    """
    check(config)
    folder = prepare(config)
    with _alone(folder):
        _write_config(config, folder)
        return _fit(config, folder, console, address)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the run's folder for this process; the hold ends with it, however it ends."""
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run {folder.name!r} in {folder} is being trained by another process; wait for its end, or choose "
                "another name=..."
            ) from None
        yield


def _fit(config: RunConfig, folder: Path, console: Console, address: str | None) -> Finished:
    start_ray(address)
    use_gpu = check_resources(config)
    clips = encoded_clips(config, console)
    keep_clips(folder, clips)

    import ray.train
    from ray.train.torch import TorchTrainer

    from rlvid.train.guard import check_room, watching, worker_gpus
    from rlvid.train.loop import train_worker
    from rlvid.train.progress import Board, ProgressLine

    check_room(config, use_gpu, ray.cluster_resources())
    board = Board.remote()
    cpus = config.train.cpus_per_worker
    environment = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
    if not use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    job = {
        "config": config.model_dump(), "clips": str(clips), "run": str(folder), "use_gpu": use_gpu, "board": board,
        "model": movable(config.model.path), "reward": config.reward.resolved().model_dump(),
    }  # fmt: skip
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": worker_gpus(config)} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures, controller_failure_limit=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.output.keep_checkpoints),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    guard = watching(config, folder, clips, job["model"], use_gpu, console)
    try:
        with guard as job["stop"], ProgressLine(board, config.train.steps, console):
            result = trainer.fit()
    except (ray.train.WorkerGroupError, ray.train.ControllerError) as error:
        raise RuntimeError(_reason(error, folder)) from error
    done = result.return_value
    if done["problem"]:
        raise RuntimeError(f"training stopped: {done['problem']}")
    last = find_checkpoints(folder)[-1]
    return Finished(folder, last.folder, done["first_step"], last.step, done["skipped"], done["seconds"])


def _reason(error: Exception, folder: Path) -> str:
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    lines = [line.strip() for line in str(causes[0]).splitlines() if line.strip()]
    return (
        f"training stopped: {lines[-1]} (full logs: {_shown(folder / 'logs')}; start the same command again to resume)"
    )


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
