"""Weak scaling: W workers with one thread each on W times the videos, and what starting up takes.

    python -m jobs.benchmark scaling                       # one worker, then two
    python -m jobs.benchmark scaling --workers 1,4 --steps 5 train.batch_size=8 --address auto
    python -m jobs.benchmark scaling --stages 0,2,3 model.finetune=full    # plain data parallelism, ZeRO 2 and 3

``train.batch_size`` is that of one worker. A step that took as long with W workers as with one would be an efficiency
of 100 %. The machine itself may allow less: its cores share memory bandwidth, caches and clock. "Independent runs" are
W runs of one worker at the same time, which do the same work and never wait for each other; the mean of their steps
gives the machine's limit of the efficiency. Efficiency / limit is what rlvid itself keeps. Efficiency and limit are
relative to the first number of workers. Each run's step is the median of its measured steps.

"Share" is of means over these steps, as the training loop itself measures it: what the archive and TensorBoard keep
steps waiting, not what their threads do beside them. A median would leave out what comes in few steps.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from rich.console import Console

from jobs.benchmark.options import make_parser, refuse
from jobs.benchmark.workers import measure_in_workers
from rlvid.config import RunConfig, load_config
from rlvid.evaluate.tables.table import Grid
from rlvid.metric_names import percent
from rlvid.train.job import Job

_GATE_S = 600.0
"""Seconds that a run waits for the others to be ready."""


class Gate:
    """A Ray actor that lets runs pass once ``count`` of them have come."""

    def __init__(self, count: int) -> None:
        self._missing, self._open = count, asyncio.Event()

    async def enter(self) -> None:
        """Returns when the last run has come."""
        self._missing -= 1
        if self._missing <= 0:
            self._open.set()
        await self._open.wait()


def measure(job: Job, how: dict[str, Any]) -> None:
    """Runs in each Ray Train worker; worker 0 writes what it found to ``how['result']``.

    With a ``how['gate']``, the measured steps begin when all runs have warmed up.
    """
    began = time.time()
    import ray
    import torch

    from rlvid.data.feed import own_rows
    from rlvid.train.loop import run_step
    from rlvid.train.restore import temporary_folder
    from rlvid.train.worker import Worker

    imported = time.time()
    with temporary_folder(None, job.run) as temporary, Worker(job, temporary, own_rows()) as worker:
        ready = time.time()
        steps: list[float] = []
        stages: list[dict[str, float]] = []
        for step in range(how["steps"] + 1):
            if step == 1 and "gate" in how:
                ray.get(how["gate"].enter.remote(), timeout=_GATE_S)
            at = time.perf_counter()
            updates, outcomes = run_step(worker, step)
            worker.record(step, updates, outcomes, time.perf_counter() - at)
            steps.append(time.perf_counter() - at)
            stages.append(dict(worker.stopwatch.read()))  # of what is handed over after the step was measured
        if worker.rank:
            return
        found = {
            "start": {
                "Ray": how["connected"] - how["asked"],
                "worker group": began - how["fitted"],
                "imports": imported - began,
                "model, reward, engine": ready - imported,
            },
            "step": statistics.median(steps[1:]),
            "mean step": statistics.mean(steps[1:]),
            "stages": {name: statistics.mean(s[name] for s in stages[1:]) for name in ("archive", "tensorboard")},
            "threads": torch.get_num_threads(),
        }
        how["result"].write_text(json.dumps(found), encoding="utf-8")


def measure_apart(configs: list[RunConfig], steps: int, address: str | None) -> float:
    """Measures one-worker runs at the same time; returns the mean over runs of their median step in seconds."""
    import ray

    from rlvid.cluster.connect import start_ray

    start_ray(address)
    gate = ray.remote(num_cpus=0)(Gate).remote(len(configs))
    measured = partial(measure_in_workers, measure, steps=steps, address=address, gate=gate)
    with ThreadPoolExecutor(len(configs)) as pool:
        return statistics.mean(each["step"] for each in pool.map(measured, configs))


def measure_all(options: argparse.Namespace, numbers: list[int], own: list[str]) -> dict[int, dict[str, Any]]:
    """Measures each number of workers, with ``step`` of the run and of as many ``independent`` runs."""
    import ray

    batch, found = load_config("toy", [*own, "train.workers=1"]).train.batch_size, {}

    def settings(workers: int, name: str) -> RunConfig:
        split = [f"train.workers={workers}", f"train.batch_size={workers * batch}", f"name=scaling-{name}"]
        return load_config("toy", [*own, *split])

    for workers in numbers:
        found[workers] = measure_in_workers(measure, settings(workers, f"{workers}"), options.steps, options.address)
        ray.shutdown()
        found[workers]["independent"] = found[workers]["step"]
        if workers > 1:
            runs = [settings(1, f"{workers}-{run}") for run in range(workers)]
            found[workers]["independent"] = measure_apart(runs, options.steps, options.address)
            ray.shutdown()
    return found


def show(found: dict[int, dict[str, Any]], config: RunConfig, console: Console) -> None:
    """Prints a column for each number of workers; ``config`` is of one worker."""
    each, load, batch = list(found.values()), os.getloadavg()[0], config.train.batch_size
    threads, first = each[0]["threads"], each[0]
    efficiencies = [first["step"] / one["step"] for one in each]
    limits = [first["independent"] / one["independent"] for one in each]
    rows = {
        "step, s (median)": [f"{one['step']:.3f}" for one in each],
        "step of independent runs, s": [f"{one['independent']:.3f}" for one in each],
        "videos a second": [f"{workers * batch / one['step']:.3f}" for workers, one in found.items()],
        "efficiency": [percent(efficiency, 0) for efficiency in efficiencies],
        "machine's limit": [percent(limit, 0) for limit in limits],
        "efficiency / limit": [percent(a / b, 0) for a, b in zip(efficiencies, limits, strict=True)],
    }
    for name in ("archive", "tensorboard"):
        rows[f"share of the {name}"] = [percent(one["stages"][name] / one["mean step"], 2) for one in each]
    for name in each[0]["start"]:
        rows[f"start-up: {name}, s"] = [f"{one['start'][name]:.1f}" for one in each]
    rows["start-up, s"] = [f"{sum(one['start'].values()):.1f}" for one in each]
    heads = ["", *(f"{workers} worker{'s' * (workers > 1)}" for workers in found)]
    trained = f"ZeRO {config.train.zero_stage}, {config.model.finetune}"
    title = f"{trained}: {batch} videos a worker, {threads} threads each, {os.cpu_count()} cores, load {load:.1f}"
    console.print(Grid(heads, [[name, *cells] for name, cells in rows.items()]).console(title))


def main(arguments: list[str]) -> None:
    """Measures one number of workers after the other, and prints them side by side, a table for each ZeRO stage."""
    parser = make_parser(__doc__, "scaling", overrides=True)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, separated by commas (default: 1,2)")
    parser.add_argument(
        "--stages", help="ZeRO stages, separated by commas; 0 is plain data parallelism (default: the run's)"
    )
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one to warm up (default: 4)")
    parser.add_argument("--address", help="Ray cluster; default: Ray on this machine, started anew each time")
    options = parser.parse_intermixed_args(arguments)
    try:
        numbers = [int(number) for number in options.workers.split(",")]
    except ValueError:
        numbers = []
    stages = options.stages.split(",") if options.stages else []
    if unknown := [stage for stage in stages if stage not in ("0", "1", "2", "3")]:
        raise ValueError(f"--stages {unknown[0]!r}: allowed: 0, 1, 2, 3, separated by commas")
    if stages:
        refuse(options.overrides, ["train.zero_stage"])
    if not numbers or min(numbers) < 1 or options.steps < 1:
        raise ValueError("--workers takes whole numbers such as 1,2, and --steps a whole number, each 1 or more")
    own = ["data.count=16", "output.videos_every=0", "train.batch_size=4", *options.overrides]
    for settings in [[f"train.zero_stage={stage}"] for stage in stages] or [[]]:
        config = load_config("toy", [*own, *settings, "train.workers=1"])
        show(measure_all(options, numbers, [*own, *settings]), config, Console(width=120))
