"""Measures a batch of GRPO: its calls of the denoiser, videos a second and peak memory, by how many steps are trained.

    python -m jobs.benchmark rollout
    python -m jobs.benchmark rollout --batch 8 --repeats 3 --out rollout.json sampling.steps=10

All ways make and train on the same prompts and noise, in turns in one process, on the built-in model:

    a call for each video and step   all steps random and trained, one video in a training pass (as ddpo-pytorch)
    all steps                        the same, the whole batch in a pass
    window of 4, one step            4 steps or 1 of each chain random and trained
    one step, same start             a prompt's videos are one until that step, and are computed once until then
    the last step, same start        the same, with the last random step, as in toy-grpo
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from jobs.benchmark.options import add_threads, check_out, limit_threads, make_parser, refuse
from jobs.benchmark.parts import Calls, reset_peak
from jobs.benchmark.record import processor
from rlvid.algorithms.base import Algorithm, Batch, Context, Stopwatch, peak_memory
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig, load_config
from rlvid.evaluate.tables.table import Grid
from rlvid.files import write_atomic
from rlvid.models.trained import load_trainable
from rlvid.reward.load import trained_reward
from rlvid.terminal import say
from rlvid.train.engine import TorchEngine
from rlvid.train.metrics import speeds
from rlvid.world.captions import prompt_set

WAYS = {
    "a call for each video and step": ["method.window=null", "train.micro_batch=1"],
    "all steps": ["method.window=null"],
    "window of 4": ["method.window=4"],
    "one step": ["method.window=1"],
    "one step, same start": ["method.window=1", "method.same_start=true"],
    "the last step, same start": ["method.window=1", "method.same_start=true", "method.window_range=[0.99,1]"],
}


def settings(options: argparse.Namespace, way: list[str]) -> RunConfig:
    """Returns a way's run, whose rollouts are of the whole batch."""
    size = f"train.batch_size={options.batch}"
    fixed = [size, f"train.group_size={options.batch // 2}", "train.workers=1", f"train.rollout_batch={options.batch}"]
    fixed += ["train.micro_batch=null", "method.window_range=[0,1]", "method.same_start=false"]
    refuse(options.overrides, [*fixed, "method.window"])
    return load_config("toy-grpo", [*options.overrides, *fixed, *way])


def measure(algorithm: Algorithm, engine: TorchEngine, batch: Batch) -> dict[str, float]:
    """Runs a batch; returns rows and calls of the denoiser, seconds and peak GiB of the process."""
    context = algorithm.context
    calls, made = Calls(context.model), [0]
    hook = context.model.denoiser.register_forward_pre_hook(lambda *_: made.__setitem__(0, made[0] + 1))
    reset_peak(context.model.device)
    before = peak_memory(context.model.device)
    with context.stopwatch.stage("step"):
        for update in algorithm.updates(batch):
            with context.stopwatch.stage("backward"):
                engine.backward(update.loss, update.step)
            if update.step:
                engine.step(0)
    hook.remove()
    calls.remove()
    found = {f"seconds/{name}": value for name, value in context.stopwatch.read().items()}
    found |= speeds(found, len(batch), samples_first=True)
    peak = (peak_memory(context.model.device) - before) / 2**30
    return found | {"rows": calls.made["denoiser evaluations"], "calls": made[0], "GiB": peak}


def main(arguments: list[str]) -> None:
    """Measures each way in turns, prints a table, and keeps the numbers."""
    parser = make_parser(__doc__, "rollout", overrides=True)
    parser.add_argument("--batch", type=int, default=16, help="videos, of two prompts")
    parser.add_argument("--repeats", type=int, default=2, help="turns after the first, which is not counted")
    add_threads(parser)
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    options = parser.parse_intermixed_args(arguments)
    if options.batch < 4 or options.batch % 2 or options.repeats < 1:
        raise ValueError(f"--batch {options.batch} must be even and 4 or more, --repeats {options.repeats} 1 or more")
    if options.out:
        check_out(options.out)
    limit_threads(options)
    runs = {name: settings(options, way) for name, way in WAYS.items()}
    first = next(iter(runs.values()))
    model, reward = load_trainable(first.model, first.seed, first.model.path), trained_reward(first.reward)
    prompts = [prompt for prompt in prompt_set("in_domain", 2) for _ in range(options.batch // 2)]
    batch = Batch(0, list(range(options.batch)), prompts, model.encode_prompts(prompts), None)
    engine = TorchEngine(model.denoiser, first.optimizer)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for turn in range(options.repeats + 1):
        for name, config in runs.items():
            context = Context(config, model, reward, None, Stopwatch(torch.device("cpu")))
            measured = measure(ALGORITHMS["grpo"](context), engine, batch)
            if turn:
                found[name].append(measured)
    medians = {name: {key: statistics.median(m[key] for m in each) for key in each[0]} for name, each in found.items()}
    say(table(medians, options.batch).markdown())
    if options.out:
        about = {"card": processor(), "threads": options.threads, "batch": options.batch, "ways": medians}
        write_atomic(options.out, json.dumps(about, indent=1).encode())


def table(medians: dict[str, dict[str, Any]], batch: int) -> Grid:
    """Returns the table of the ways."""
    heads = ["trained", "U-Net rows a video", "calls", "s a batch", "videos a s", "rollout", "training", "GiB"]
    rate = "speed/{}videos_per_second"
    return Grid(
        heads,
        [
            [name, f"{m['rows'] / batch:.0f}", f"{m['calls']:.0f}", f"{m['seconds/step']:.1f}"]
            + [f"{m[rate.format(part)]:.2f}" for part in ("", "rollout_", "training_")]
            + [f"{m['GiB']:.2f}"]
            for name, m in medians.items()
        ],
    )
