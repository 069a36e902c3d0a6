"""What Ray Train calls on each worker of a fit."""

from functools import partial
from typing import Any

import ray.train

from rlvid.fitting.worker import FitJob, FitWorker, Scores
from rlvid.train.progress import end_requested
from rlvid.train.reporter import Reporter


def fit_worker(job: FitJob, progress: Any) -> dict[str, Scores | None]:
    """Fits from the last state to the last step; worker 0 returns ``scores``, None where the fit was interrupted."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    reporter = Reporter(rank, progress)
    reporter.log_to(job.work / "logs" / f"worker-{rank:02d}.log")

    def tell(latest: dict[str, float]) -> None:
        reporter.step = int(latest["step"])
        if rank == 0:
            progress.put.remote(latest)

    def note(line: str) -> None:
        if rank == 0:
            progress.note.remote(line, "looks")

    with reporter.explain_errors():
        worker = FitWorker(job, rank, world, tell, note, partial(end_requested, progress))
        if rank == 0:
            progress.start.remote(worker.first_step)
        return {"scores": worker.finish() if worker.run() else None}
