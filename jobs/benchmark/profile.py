"""Names the ten largest costs of a training step on a built-in model, by stage and operator.

    python -m jobs.benchmark profile
    python -m jobs.benchmark profile toy-wan --batch 4 sampling.steps=50

A step in bare torch, after one to warm up, under torch's profiler. The seconds are those of the operator itself,
without the operators that it calls; "shapes" are those of the inputs that cost most of them. Source latents are noise:
costs do not depend on their values. The profiler itself adds a few per cent.
"""

import argparse
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from jobs.benchmark.options import add_threads, limit_threads, make_parser, refuse
from rlvid import randomness
from rlvid.algorithms.base import Algorithm, Batch, Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig, load_config
from rlvid.config.model import BUILT_IN
from rlvid.evaluate.tables.table import Grid
from rlvid.metric_names import percent
from rlvid.models.trained import load_trainable
from rlvid.reward.load import trained_reward
from rlvid.terminal import say
from rlvid.train.engine import TorchEngine
from rlvid.world.captions import prompt_set

_STAGE = "stage: "
_VIDEOS = 8


class RecordedStopwatch(Stopwatch):
    """A stopwatch whose stages the profiler sees."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block under it, and marks it for the profiler."""
        with record_function(_STAGE + name), super().stage(name):
            yield


def prepare(config: RunConfig) -> tuple[Algorithm, TorchEngine, Batch]:
    """Returns the method of a run, its engine, and a batch with noise for source latents.

    The batch is of step 1: step 0 also measures ``decode/gradient_share``, which most steps do not.
    """
    model = load_trainable(config.model, config.seed, config.model.path)
    context = Context(config, model, trained_reward(config.reward), None, RecordedStopwatch(model.device))
    size = config.train.batch_size
    prompts = prompt_set("in_domain", size)
    latents = randomness.normal(model.latent_shape, config.seed, "posterior", [(serial,) for serial in range(size)])
    batch = Batch(1, list(range(size)), prompts, model.encode_prompts(prompts), latents)
    return ALGORITHMS[config.method.name](context), TorchEngine(model.denoiser, config.optimizer), batch


def step(algorithm: Algorithm, engine: TorchEngine, batch: Batch) -> dict[str, float]:
    """Takes a training step; returns the seconds of its stages."""
    watch = algorithm.context.stopwatch
    for update in algorithm.updates(batch):
        with watch.stage("backward"):
            engine.backward(update.loss, update.step)
        if update.step:
            with watch.stage("optimiser"):
                engine.step(0)
    return watch.read()


def costs(events: Any) -> dict[tuple[str, str], tuple[float, int, str]]:
    """Returns seconds, calls and costliest shapes of each operator in each stage, the most expensive ones first."""
    stages = [event for event in events if event.name.startswith(_STAGE)]
    seconds: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    calls: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.name.startswith(_STAGE):
            continue
        within = [each for each in stages if each.time_range.start <= event.time_range.start < each.time_range.end]
        stage = within[-1].name.removeprefix(_STAGE) if within else "between"
        shapes = ", ".join(str(shape) for shape in event.input_shapes[:2] if shape)
        seconds[stage, event.name][shapes] += event.self_cpu_time_total / 1e6
        calls[stage, event.name] += 1
    found = {key: (sum(of.values()), calls[key], of.most_common(1)[0][0]) for key, of in seconds.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def table(found: dict[tuple[str, str], tuple[float, int, str]], most: int) -> Grid:
    """Returns the table of the largest costs, with the rest in its last row."""
    whole = sum(seconds for seconds, _, _ in found.values())
    rows = [
        [stage, name, str(calls), f"{seconds:.3f}", percent(seconds / whole), shapes]
        for (stage, name), (seconds, calls, shapes) in list(found.items())[:most]
    ]
    rest = list(found.values())[most:]
    left = sum(seconds for seconds, _, _ in rest)
    rows.append(["", "the rest", str(sum(calls for _, calls, _ in rest)), f"{left:.3f}", percent(left / whole), ""])
    return Grid(["stage", "operator", "calls", "seconds", "share", "shapes"], rows)


def main(arguments: list[str]) -> None:
    """Profiles a step, and prints its stages and its largest costs."""
    options = parse(arguments)
    limit_threads(options)
    config = settings(options)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler prints that there is no GPU
    prepared = prepare(config)
    step(*prepared)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        stages = step(*prepared)
    seconds = ", ".join(f"{name} {each:.2f}" for name, each in stages.items())
    videos = config.train.batch_size
    say(f"a step of {videos} videos, {options.threads} thread{'s' * (options.threads > 1)}, seconds: {seconds}")
    say(table(costs(profiler.events()), options.most).markdown())


def settings(options: argparse.Namespace) -> RunConfig:
    """Returns the run that is profiled; its batch is by default ``_VIDEOS`` at most in whole groups, or one group.

    Raises:
        ValueError: the settings do not fit each other or the batch, or the model is no built-in one.
    """
    given = [*options.overrides, "train.workers=1", "train.micro_batch=null"]
    refuse(options.overrides, ["train.batch_size", "train.workers", "train.micro_batch"])
    try:
        batch = options.batch
        if batch is None:
            group = load_config(options.config, given).train.group_size
            batch = max(1, _VIDEOS // group) * group
        config = load_config(options.config, [*given, f"train.batch_size={batch}"])
    except ValueError as error:
        if "train.batch_size" not in str(error):
            raise
        raise ValueError(f"{error} (--batch sets train.batch_size here)") from None
    if config.model.path not in BUILT_IN:
        raise ValueError(f"model.path = {config.model.path}: this part profiles {', '.join(BUILT_IN)}")
    return config


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the options; raises ValueError for values out of range."""
    parser = make_parser(__doc__, "profile")
    parser.add_argument("config", nargs="?", default="toy", help="a description of a run on a built-in model")
    parser.add_argument("overrides", nargs="*", help="settings to change, as for rlvid train")
    parser.add_argument("--batch", type=int, help=f"videos (default: {_VIDEOS}, or what groups allow)")
    parser.add_argument("--most", type=int, default=10, help="costs that are named")
    add_threads(parser)
    options = parser.parse_intermixed_args(arguments)
    for name in ("batch", "most"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name} {number}: must be at least 1")
    return options
