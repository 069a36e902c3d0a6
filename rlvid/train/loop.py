"""The training loop of every worker. It knows no method by name: a method is a generator of losses."""

import time
from collections.abc import Generator
from typing import Any

import ray.train

from rlvid.algorithms.base import Update
from rlvid.train.engine import StepOutcome
from rlvid.train.job import Job
from rlvid.train.reporter import Reporter
from rlvid.train.restore import damage, resume_point, temporary_folder
from rlvid.train.worker import Worker


def train(job: Job, shares: Generator[dict[str, Any]]) -> dict[str, Any]:
    """Trains from the latest checkpoint of the run to its last step.

    Args:
        job: of the run.
        shares: this worker's rows of the feed, see ``rlvid.data.feed.rows``.

    Returns:
        What this worker did: the first step of this start, skipped steps, seconds. Or ``damaged``, if the checkpoint
        is: its name -> what is wrong; then nothing was done.
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    reporter = Reporter(rank, job.progress, job.config.reward.timeout)
    with reporter.explain_errors(), temporary_folder(job.storage, job.run) as temporary:
        with resume_point() as checkpoint:
            if checkpoint and (damaged := damage(checkpoint, rank, world)):
                return {"damaged": damaged}
            worker = Worker(job, temporary, shares, checkpoint.folder if checkpoint else None, reporter)
        return run_steps(worker)


def run_steps(worker: Worker) -> dict[str, Any]:
    """Runs a worker's steps to the last one, with checkpoints between them; returns the worker's summary."""
    config = worker.config
    with worker, worker.reporter.explain_errors():  # the traceback is in the log that the worker sends to a store
        for step in range(worker.first_step, config.train.steps):
            if worker.out_of_time or worker.stopped:
                break
            started = time.perf_counter()
            updates, outcomes = run_step(worker, step)
            worker.record(step, updates, outcomes, time.perf_counter() - started)
            if worker.problem:
                break
            leaving = worker.preempted()
            if worker.checkpoint_due(step) or leaving:
                worker.save(step + 1)
        return worker.summary()


def run_step(worker: Worker, step: int) -> tuple[list[Update], list[StepOutcome]]:
    """Runs one batch: back-propagates every loss of the method; returns updates and outcomes of optimiser steps."""
    updates, outcomes = [], []
    for update in worker.algorithm.updates(worker.fetch(step)):
        with worker.stopwatch.stage("backward"):
            worker.engine.backward(update.loss, update.step)
        updates.append(update)
        if update.step:
            with worker.stopwatch.stage("sync"):
                outcomes.append(worker.engine.step(step))
    return updates, outcomes
