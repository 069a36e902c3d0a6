"""What Ray Train calls on each worker of a fit."""

from typing import Any

import ray
import ray.train

from rlvid.fitting.worker import FitJob, FitWorker, Scores
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

    def ended() -> bool:
        try:
            return bool(ray.get(progress.end_requested.remote(), timeout=1))
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):  # its node is lost, or slow
            return False

    with reporter.explain_errors():
        worker = FitWorker(job, rank, world, tell, ended)
        if rank == 0:
            progress.start.remote(worker.first_step)
        return {"scores": worker.finish() if worker.run() else None}
