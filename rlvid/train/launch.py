"""Launches training: starts Ray Train's workers, waits for them, and returns the run's last checkpoint."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rlvid.cluster.connect import start_ray
from rlvid.cluster.nodes import BOOTSTRAP, check_files, check_nodes, check_resources, fits_now, needed, nodes_possible
from rlvid.config import RunConfig
from rlvid.config.train import SHOWN_VIDEOS
from rlvid.data.sources import training_set
from rlvid.data.training_set import TrainingSet
from rlvid.interrupt import kept
from rlvid.runs.checkpoints import find_checkpoints
from rlvid.storage import Mirror, is_uri, run_mirror
from rlvid.terminal import short
from rlvid.train.fit import fit_again, reason, run_fit
from rlvid.train.guard_folder import GuardLog, guard_prompts
from rlvid.train.job import Job
from rlvid.train.preflight import cut_captions, open_run, record_clips, repair

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


@dataclass(frozen=True)
class TrainResult:
    """The result of one start of training.

    Attributes:
        folder: the run's.
        checkpoint: folder of the last one.
        first_step: of this start.
        last_step: of the last checkpoint.
        skipped: steps with a loss or gradient that was not finite.
        seconds: of this start.
        prompts: those of the videos in TensorBoard.
    """

    folder: Path
    checkpoint: Path
    first_step: int
    last_step: int
    skipped: int
    seconds: float
    prompts: tuple[str, ...]


def train(config: RunConfig, console: Console, address: str | None = None) -> TrainResult:
    """Runs or resumes a run to its last step.

    Raises:
        ValueError: bad input or a full cluster, before anything heavy starts.
        RuntimeError: a worker failed more often than allowed, with the worker's own error; or too many steps in a row
            were not finite.
    """
    stored = is_uri(config.output.storage)

    def put_aside(damaged: dict[str, str]) -> None:
        repair(config, run_mirror(config.output.storage, config.name), console, damaged)

    with (
        open_run(config, console) as (mirror, config),
        kept(lambda: _last_checkpoint(mirror.folder, resumable=not stored)),
    ):
        start_ray(address)
        import ray.train

        from rlvid.data.embeddings import kept_embeddings
        from rlvid.train.archivist import end_archivist, start_archivist
        from rlvid.train.ceiling import run_ceiling
        from rlvid.train.feeding import RunFeed
        from rlvid.train.floor import floor_prompts, with_measured_floor
        from rlvid.train.guard import watching
        from rlvid.train.progress import ProgressActor, ProgressLine

        folder = mirror.folder
        use_gpu, has_room = _check_cluster(config, folder, console)
        clips = _clips_of(config, mirror, console)
        prompts = clips.first_captions(SHOWN_VIDEOS)
        judged = _judged(config, folder, clips)
        measured = floor_prompts(config, clips)
        texts = kept_embeddings(
            config, clips, [*prompts, *judged, *measured], RunFeed(config, clips, folder).video_captions, console
        )
        further = {"encodes": "videos" in clips.kinds, "texts": texts}
        progress = ProgressActor.remote()  # type: ignore[attr-defined]
        job = Job.of(config, run=folder, use_gpu=use_gpu, progress=progress, **further)
        job = with_measured_floor(job, measured, console)
        config = job.config
        job = replace(job, measured_ceiling=run_ceiling(job, clips, console))
        mirror.push()
        archivist, whole = start_archivist(config, folder, progress), False
        try:
            with (
                watching(config, folder, clips, use_gpu, console, job.texts) as stop,
                ProgressLine(progress, config.train.steps, console),
            ):
                watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "").lower() in ("1", "true")
                job = replace(job, archivist=archivist, prompts=prompts, stop=stop, watched=watched)
                trainer = _trainer(job, clips, wait=not has_room)
                console.print(f"starting {config.train.workers} worker(s)", highlight=False)
                again = partial(fit_again, trainer.fit, config.train.max_failures, put_aside)
                done = run_fit(again, progress, config.train.grace_period, console)
                whole = True
        except (ray.train.WorkerGroupError, ray.train.ControllerError, ray.exceptions.RayActorError) as error:
            raise RuntimeError(reason(error, folder, progress, not stored)) from error
        finally:
            end_archivist(archivist, console, whole)
        if done["problem"]:
            raise RuntimeError(f"training stopped: {done['problem']}")
        run_mirror(config.output.storage, config.name)
        last = find_checkpoints(folder, resumable=not stored)[-1]
        return TrainResult(
            folder, last.folder, done["first_step"], last.step, done["skipped"], done["seconds"], prompts
        )


def _last_checkpoint(folder: Path, resumable: bool) -> str:
    """Describes an interrupted run by its last checkpoint."""
    found = find_checkpoints(folder, resumable)
    if found:
        return f"run {folder.name} has a checkpoint after step {found[-1].step}, in {short(folder)}"
    return f"run {folder.name} has no checkpoint yet and starts at step 0" if resumable else "its checkpoints are kept"


def _check_cluster(config: RunConfig, folder: Path, console: Console) -> tuple[bool, bool]:
    """Checks that the cluster can take the run; whether workers get GPUs, and whether its nodes are there already.

    Raises:
        ValueError: it cannot.
    """
    from rlvid.train.guard import check_room

    use_gpu = check_resources(config)
    check_nodes(config.output.storage if is_uri(config.output.storage) else str(folder.parent), config.name)
    check_room(config, use_gpu, nodes_possible())
    has_room = fits_now(config, use_gpu)
    if not has_room:
        console.print("waiting for the autoscaler to start nodes", highlight=False)
    return use_gpu, has_room


def _clips_of(config: RunConfig, mirror: Mirror, console: Console) -> TrainingSet:
    """Encodes or finds the clips of a run, and records which they are."""
    clips = training_set(config, console)
    record_clips(mirror.folder, clips)
    videos = [source.open() for source in clips.sources if source.kind == "videos"]
    check_files((each.rows([0])["source"][0].as_py() for each in videos), "data.source")
    for line in cut_captions(config, clips):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    mirror.push()
    return clips


def _judged(config: RunConfig, folder: Path, clips: TrainingSet) -> list[str]:
    """Returns the guard's prompts; without a guard, none.

    Raises:
        ValueError: the run has evaluations of other prompts or settings.
    """
    if not config.guard.every:
        return []
    prompts = guard_prompts(config, clips.first_captions(config.guard.count))
    GuardLog(folder, prompts, config)
    return prompts


def _trainer(job: Job, clips: TrainingSet, wait: bool) -> "TorchTrainer":
    """Makes Ray Train's trainer of a job; with ``wait`` its workers wait for room as long as it takes."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from rlvid.train.begin import train_worker
    from rlvid.train.feeding import RunFeed

    config = job.config
    environment = {
        "OMP_NUM_THREADS": str(max(1, int(config.train.cpus_per_worker))),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the reporter logs what is printed; Ray would log it again
    }
    if not job.use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return TorchTrainer(
        partial(train_worker, job),
        **RunFeed.of(config, clips, job.run, job.texts).trainer_arguments,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=job.use_gpu,
            resources_per_worker=needed(config, job.use_gpu),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=job.storage or str(job.run.parent),
            failure_config=ray.train.FailureConfig(
                max_failures=config.train.max_failures,
                # Minutes that workers may wait for room: for ever where an autoscaler is to bring nodes.
                controller_failure_limit=-1 if BOOTSTRAP.is_file() or wait else max(3, config.train.max_failures),
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.output.keep_checkpoints),
            worker_runtime_env={"env_vars": environment},
        ),
    )
