"""Measures a training step stage by stage, and the overhead of Ray and DeepSpeed over bare torch, in one run.

    python -m jobs.benchmark overhead              # the built-in model, one worker
    python -m jobs.benchmark overhead --steps 10 train.batch_size=4

Both sides run in one worker process in turns, on the same batches, so that they share every disturbance. Before them,
this process measures what ``rlvid plan --measure`` says.
"""

import copy
import json
import statistics
import time
from functools import partial
from typing import Any

from rich.console import Console

from jobs.benchmark.options import make_parser
from jobs.benchmark.workers import measure_in_workers
from rlvid.algorithms.base import Batch
from rlvid.config import RunConfig, load_config
from rlvid.config.methods.reward_gradient import kept_steps
from rlvid.evaluate.tables.table import Grid
from rlvid.metric_names import percent
from rlvid.plan.parts import outline_parts
from rlvid.plan.trial import run_trial
from rlvid.train.job import Job


def measure(job: Job, how: dict[str, Any]) -> None:
    """Runs in a Ray Train worker; writes its findings to ``how['result']``."""
    import torch

    from jobs.benchmark.parts import Calls
    from rlvid.algorithms.base import Stopwatch
    from rlvid.algorithms.catalogue import ALGORITHMS
    from rlvid.data.feed import own_rows
    from rlvid.train.engine import TorchEngine
    from rlvid.train.loop import run_step
    from rlvid.train.restore import temporary_folder
    from rlvid.train.worker import Worker

    with temporary_folder(None, job.run) as temporary, Worker(job, temporary, own_rows()) as worker:
        context = copy.copy(worker.algorithm.context)
        context.model, context.stopwatch = copy.copy(worker.model), Stopwatch(worker.model.device)
        context.model.denoiser = copy.deepcopy(worker.network)
        bare = ALGORITHMS[job.config.method.name](context)
        engine = TorchEngine(context.model.denoiser, job.config.optimizer)
        backward = [False]
        calls = Calls(context.model, again=lambda: backward[0])
        sides: dict[str, list[float]] = {"torch": [], "Ray + DeepSpeed": []}
        stages: list[dict[str, float]] = []
        for step in range(how["steps"] + 1):
            batch = worker.fetch(step)
            calls.made.clear()
            began = time.perf_counter()
            for update in bare.updates(batch):
                backward[0] = True
                engine.backward(update.loss, update.step)
                backward[0] = False
                if update.step:
                    engine.step(step)
            sides["torch"].append(time.perf_counter() - began)
            used = {name: calls.made[name] / len(batch) for name in ("denoiser evaluations", "frames decoded")}
            data = worker.stopwatch.read()["data"]

            worker.fetch = partial(_given, batch)  # type: ignore[method-assign]  # the feed brings it once
            began = time.perf_counter()
            updates, outcomes = run_step(worker, step)
            del worker.fetch
            seen = worker.stopwatch.read() | {"data": data}
            recorded = time.perf_counter()
            worker.record(step, updates, outcomes, recorded - began)
            ended = time.perf_counter()
            sides["Ray + DeepSpeed"].append(ended - began)
            stages.append(seen | {"record": ended - recorded})
        calls.remove()
        found = {
            "seconds": {name: statistics.median(values[1:]) for name, values in sides.items()},
            "stages": {name: statistics.median(s[name] for s in stages[1:]) for name in stages[0]},
            "calls": used,
            "threads": torch.get_num_threads(),
        }
        how["result"].write_text(json.dumps(found), encoding="utf-8")


def _given(batch: Batch, step: int) -> Batch:
    assert batch.step == step
    return batch


def main(arguments: list[str]) -> None:
    """Starts one worker, measures in it, prints the tables."""
    parser = make_parser(__doc__, "overhead", overrides=True)
    parser.add_argument("--steps", type=int, default=5, help="measured steps a side, after one to warm up")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: must be at least 1")
    console = Console()
    config = load_config("toy", ["name=benchmark", "train.workers=1", "output.videos_every=0", *options.overrides])
    planned = None
    if config.reward.remote is None or config.reward.remote.where != "actor":  # which needs Ray
        planned = run_trial(config, outline_parts(config)).step
    show(measure_in_workers(measure, config, options.steps) | {"planned": planned}, config, console)


def show(found: dict[str, Any], config: RunConfig, console: Console) -> None:
    """Prints what was found."""
    bare, whole = found["seconds"]["torch"], found["seconds"]["Ray + DeepSpeed"]
    times = found["stages"] | {"whole step, Ray + DeepSpeed": whole, "the same step, bare torch": bare}
    rows = [[name, f"{seconds:.3f}"] for name, seconds in times.items()]
    rows.append(["overhead", percent(whole / bare - 1)])
    if (planned := found["planned"]) is not None:
        rows.append(["the step as planned", f"{planned:.3f}"])
        rows.append(["planned beside measured", percent(planned / whole - 1)])
    title = f"one step of {config.train.batch_size} videos, {found['threads']} threads, medians"
    console.print(Grid(["stage", "seconds"], rows).console(title))
    console.print(
        f"frames decoded a video: {found['calls']['frames decoded']:g}; "
        f"denoiser evaluations: {found['calls']['denoiser evaluations']:g}"
    )
    if config.method.name != "instructvideo" or config.method.tau is None:
        return
    steps = kept_steps(config.sampling.steps, config.method.tau)
    branches = 1 if config.sampling.guidance == 1.0 else 2
    denoised = 1 if config.method.denoising > 0 else 0
    also = f" + {denoised} of the denoising loss" if denoised else ""
    console.print(f"expected: {config.reward.segments} frames (SegVR); {steps} steps x {branches} branches{also}")
    if config.train.checkpoint_activations:
        again = config.method.gradient_steps * branches + denoised
        console.print(f"beside them, the layers of {again} once more, backward")
