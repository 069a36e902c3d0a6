"""Weak scaling: W workers with one thread each on W times the videos, and what starting up takes.

    python -m jobs.benchmark scaling                       # one worker, then two
    python -m jobs.benchmark scaling --workers 1,4 --steps 5 train.batch_size=8 --address auto

``train.batch_size`` is that of one worker. A step that took as long with W workers as with one would be an efficiency
of 100 %. "Share" is of the mean step, as the training loop itself measures it: what the archive and TensorBoard keep a
step waiting, not what their threads do beside it.
"""

import json
import os
import statistics
import time
from typing import Any

from rich.console import Console

from jobs.benchmark.options import make_parser
from jobs.benchmark.workers import measure_in_workers
from rlvid.config import load_config
from rlvid.evaluate.tables.table import Grid
from rlvid.metric_names import percent
from rlvid.train.job import Job


def measure(job: Job, how: dict[str, Any]) -> None:
    """Runs in each Ray Train worker; worker 0 writes what it found to ``how['result']``."""
    began = time.time()
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
            "stages": {name: statistics.mean(s[name] for s in stages[1:]) for name in ("archive", "tensorboard")},
            "threads": torch.get_num_threads(),
        }
        how["result"].write_text(json.dumps(found), encoding="utf-8")


def show(found: dict[int, dict[str, Any]], batch: int, console: Console) -> None:
    """Prints a column for each number of workers."""
    each, load = list(found.values()), os.getloadavg()[0]
    threads, first = each[0]["threads"], each[0]["step"]
    rows = {
        "step, s (median)": [f"{one['step']:.3f}" for one in each],
        "videos a second": [f"{workers * batch / one['step']:.3f}" for workers, one in found.items()],
        "efficiency": [percent(first / one["step"], 0) for one in each],
    }
    for name in ("archive", "tensorboard"):
        rows[f"share of the {name}"] = [percent(one["stages"][name] / one["step"], 2) for one in each]
    for name in each[0]["start"]:
        rows[f"start-up: {name}, s"] = [f"{one['start'][name]:.1f}" for one in each]
    rows["start-up, s"] = [f"{sum(one['start'].values()):.1f}" for one in each]
    heads = ["", *(f"{workers} worker{'s' * (workers > 1)}" for workers in found)]
    title = f"{batch} videos a worker, {threads} threads each, {os.cpu_count()} cores, load {load:.1f}"
    console.print(Grid(heads, [[name, *cells] for name, cells in rows.items()]).console(title))


def main(arguments: list[str]) -> None:
    """Measures one number of workers after the other, and prints them side by side."""
    parser = make_parser(__doc__, "scaling", overrides=True)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, separated by commas (default: 1,2)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one to warm up (default: 4)")
    parser.add_argument("--address", help="Ray cluster; default: Ray on this machine, started anew each time")
    options = parser.parse_intermixed_args(arguments)
    try:
        numbers = [int(number) for number in options.workers.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or options.steps < 1:
        raise ValueError("--workers takes whole numbers such as 1,2, and --steps a whole number, each 1 or more")
    own = ["data.count=16", "output.videos_every=0", "train.batch_size=4", *options.overrides]
    batch = load_config("toy", [*own, "train.workers=1"]).train.batch_size
    import ray

    found = {}
    for workers in numbers:
        split = [f"train.workers={workers}", f"train.batch_size={workers * batch}", f"name=scaling-{workers}"]
        config = load_config("toy", [*own, *split])
        found[workers] = measure_in_workers(measure, config, options.steps, options.address)
        ray.shutdown()
    show(found, batch, Console(width=120))
