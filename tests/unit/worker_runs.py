"""Runs of seconds on Ray's workers, many of them in one start: the product's own worker loop and checkpoints."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from runs import QUIET, LocalShard, Trajectory

from rlvid.config import RunConfig
from rlvid.data.embeddings import kept_embeddings
from rlvid.data.sources import training_set
from rlvid.data.training_set import TrainingSet
from rlvid.models.trained import trained_state
from rlvid.train.job import Job


def trajectories(
    jobs: dict[str, Job],
    begun: list[Job],
    clips: dict[str, TrainingSet],
    starts: Mapping[str, Path],
    ends: Mapping[str, Path],
) -> None:
    """Runs the product's worker loop for several jobs in the same processes; worker 0 writes the adapters.

    Args:
        jobs: by a name.
        begun: runs for others to continue, each with a checkpoint in Ray Train's storage after its last step.
        clips: of each run, by its name.
        starts: folder of the checkpoint from which a job resumes, by the job's name.
        ends: folder to which a job's checkpoint after its last step goes.
    """
    import ray.train
    from torch import distributed

    from rlvid.data.feed import own_rows
    from rlvid.train.begin import train_worker
    from rlvid.train.loop import run_step
    from rlvid.train.restore import ResumePoint, damage, temporary_folder
    from rlvid.train.worker import Worker

    context, report = ray.train.get_context(), ray.train.report
    rank, world = context.get_world_rank(), context.get_world_size()

    def feed(job: Job, first_step: int = 0) -> None:
        ray.train.get_dataset_shard = lambda _: LocalShard(job.config, clips[job.config.name], rank, first_step)

    for name, job in jobs.items():
        start, norms = starts.get(name), []
        feed(job, 0 if start is None else int(start.name.partition("-")[2]))
        if start is not None:
            assert damage(ResumePoint(start.name, start), rank, world) == {}
        with temporary_folder(None, job.run) as temporary, Worker(job, temporary, own_rows(), start) as worker:
            for step in range(worker.first_step, job.config.train.steps):
                updates, outcomes = run_step(worker, step)
                worker.record(step, updates, outcomes, 0.0)
                norms += [outcome.gradient_norm for outcome in outcomes]
            if name in ends:
                ray.train.report = partial(_keep, ends[name])
                worker.save(job.config.train.steps)
                ray.train.report = report
            with worker.engine.gathered():
                state = trained_state(worker.network, job.config.model)
            if worker.rank == 0:
                torch.save((state, norms), f"{job.run}.pt")
        distributed.barrier()
    ray.train.get_checkpoint = lambda: None  # they would resume from one another's
    for job in begun:
        feed(job)
        train_worker(job)


def _keep(folder: Path, metrics: dict[str, Any], checkpoint: Any, checkpoint_dir_name: str) -> None:
    """Copies this worker's part of a checkpoint, as Ray Train brings the parts of all workers together."""
    with checkpoint.as_directory() as part:
        shutil.copytree(part, folder, dirs_exist_ok=True)


def on_workers(
    folder: Path,
    workers: int,
    runs: dict[str, RunConfig],
    begun: list[RunConfig],
    *,
    starts: Mapping[str, Path] | None = None,
    ends: Mapping[str, Path] | None = None,
) -> dict[str, Trajectory]:
    """Returns each run's result on so many Ray workers; those of ``begun`` have one checkpoint, after their last step.

    Runs of one model have the same clips. ``starts`` and ``ends`` are those of ``trajectories``.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from rlvid.train.archivist import start_archivist
    from rlvid.train.progress import ProgressActor

    name = f"{next(iter(runs))}-on-{workers}"
    shared = {"use_gpu": False, "progress": ProgressActor.remote()}
    models = {run.model.path: run for run in reversed(runs.values())}
    of_models = {path: training_set(run, QUIET) for path, run in models.items()}
    texts = {path: kept_embeddings(run, of_models[path], [], list, QUIET) for path, run in models.items()}
    clips = {run.name: of_models[run.model.path] for run in runs.values()}
    clips |= {run.name: training_set(run, QUIET) for run in begun}
    jobs = {
        key: Job.of(run, run=folder / f"{name}-{key}", texts=texts[run.model.path], **shared)
        for key, run in runs.items()
    }
    places = {run.name: folder / "runs" / run.name for run in begun}
    others = [
        Job.of(run, run=places[run.name], archivist=start_archivist(run, places[run.name], None), **shared)
        for run in begun
    ]
    TorchTrainer(
        partial(trajectories, jobs, others, clips, starts or {}, ends or {}),
        scaling_config=ray.train.ScalingConfig(num_workers=workers),
        run_config=ray.train.RunConfig(name=name, storage_path=str(folder / "ray")),
    ).fit()
    for run in begun:
        own, checkpoint = folder / "runs" / run.name, f"step-{run.train.steps:06d}"
        shutil.copytree(folder / "ray" / name / checkpoint, own / checkpoint)
        (own / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")), encoding="utf-8")
    return {key: torch.load(f"{job.run}.pt", weights_only=True) for key, job in jobs.items()}
