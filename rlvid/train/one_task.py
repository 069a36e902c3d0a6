"""Work of a run in one Ray task, before its workers start."""

from collections.abc import Callable
from typing import Any, TypeVar

from rlvid.cluster.nodes import needed
from rlvid.faults import describe, one_line
from rlvid.train.job import Job

Result = TypeVar("Result")


def in_one_task(work: Callable[..., Result], job: Job, *arguments: Any, setting: str, lost: str) -> Result:
    """Returns ``work(job, *arguments)``, computed in one task that has the room of a worker.

    Args:
        work: a function of a module.
        job: of the run; its workers do not run yet.
        arguments: further ones.
        setting: the key and its value that the work is for, for errors.
        lost: why the task may have been lost, for errors.

    Raises:
        ValueError: as ``work``.
        RuntimeError: the task failed.
    """
    import ray

    need = needed(job.config, job.use_gpu)
    # DEFAULT: not in the placement group of a trial, which has no room for it.
    task = ray.remote(
        num_cpus=need["CPU"], num_gpus=need.get("GPU", 0), max_retries=job.config.train.max_failures, max_calls=1,
        scheduling_strategy="DEFAULT",
    )(work)  # fmt: skip
    running = task.remote(job, *arguments)
    try:
        result: Result = ray.get(running)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise RuntimeError(f"{setting}: {describe(error.cause or error)}") from error
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"{setting}: the task was lost: {lost} ({one_line(error)})") from error
    except KeyboardInterrupt:
        ray.cancel(running, force=True)
        raise
    return result
