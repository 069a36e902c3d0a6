"""Measures steps of a Wan model of 1.3B on this GPU, with torch alone and without Ray, beside `rlvid plan`.

    python -m jobs.benchmark gpu-wan --out h100-wan.json              # again with the same file: only what is missing
    python -m jobs.benchmark gpu-wan --out h100-wan.json --show       # the tables of a file, on any machine
    python -m jobs.benchmark gpu-wan --preset tiny --device cpu       # miniatures, to try every line

The run is wan-1.3b-hpsv2 (InstructVideo) on one video, with random weights, random embeddings of prompts, and HPSv2's
ViT-H on four frames. A part is FRAMESxHEIGHTxWIDTH and, after a slash, the chunks that the decoder's gradient goes back
through (`model.decode_window`): 1, 4 or all; `offload` keeps all, and their caches in the CPU's memory. `rate` is how
fast this device multiplies matrices. Seconds are of a common step. With a window, every 25th step also measures the
gradient's share; the peak is that step's, too.

Each part is printed and written to the file as soon as it is there. What does not fit into --minutes is left out and
named; the same command measures it later. A part that needs more memory than there is says so.
"""

import argparse
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.benchmark.options import make_parser
from jobs.benchmark.parts import Adapter, Meter, matrix_rate
from jobs.benchmark.prediction import STAGES
from jobs.benchmark.record import Record
from jobs.benchmark.step import measure
from jobs.benchmark.tables import GIB, machine, peak
from jobs.benchmark.timed import add_options, check_options, run
from rlvid import randomness
from rlvid.algorithms.base import Batch, Context
from rlvid.algorithms.instructvideo import InstructVideo
from rlvid.config import RunConfig, load_config
from rlvid.config.model import ModelConfig
from rlvid.evaluate.tables.table import Grid
from rlvid.metric_names import percent
from rlvid.models.lora import lora_parameters
from rlvid.models.trained import load_trainable
from rlvid.models.unet3d import DTYPES
from rlvid.models.wan import WanModel
from rlvid.models.wan_parts import decode_settings
from rlvid.plan.plan import make_plan
from rlvid.reward.load import load_reward
from rlvid.train.engine import TorchEngine

RATE = "rate"
SHAPES = {"full": ("17x256x256", "33x480x832", "81x480x832"), "tiny": ("17x16x16", "21x16x32")}
WINDOWS = {
    "all": (),
    "1": ("model.decode_window=1",),
    "offload": ("model.decode_offload=true",),
    "4": ("model.decode_window=4",),
}
PROMPT = "a dog runs over the grass"


def part_names(preset: str) -> list[str]:
    """Returns the names of all parts."""
    return [RATE, *(f"{shape}/{window}" for window in WINDOWS for shape in SHAPES[preset])]


def config_of(part: str, precision: str, tiny: Path | None) -> RunConfig:
    """Returns the run of a part; ``tiny`` is a miniature's folder."""
    shape, _, window = part.partition("/")
    frames, height, width = shape.split("x")
    reward = ["reward.name=builtin"] if tiny else ["reward.name=hpsv2", "reward.path=random"]
    changed = [
        f"model.path={tiny or 'random-wan-1.3b'}", f"model.frames={frames}", f"model.height={height}",
        f"model.width={width}", f"model.precision={precision}", "reward.mixture=[]", *reward,
        f"reward.precision={precision}", "reward.checkpoint_activations=false", "train.batch_size=1", *WINDOWS[window],
    ]  # fmt: skip
    return load_config("wan-1.3b-hpsv2", changed)


def measured_stage(planned: str) -> str:
    """Returns the stage of a step in which a stage of the plan is measured: the decoder's backward pass is its own."""
    if planned in ("gradient share", "backward through the reward", "backward through the decoder"):
        return "decode"
    return next(stage for stage in STAGES if planned.startswith(stage))


class WanStep:
    """Training steps of a run, as ``measure`` takes them: the networks, and one clip of noise with its prompt."""

    def __init__(self, config: RunConfig, model: WanModel, reward: Any, engine: TorchEngine, meter: Meter) -> None:
        self.model, self.engine, self.meter, self.prompts = model, engine, meter, [PROMPT]
        self._method = InstructVideo(Context(config, model, reward, None, meter))
        latents = randomness.normal(model.latent_shape, 0, "posterior", [(0,)])
        text_BLD = model.encode_prompts(self.prompts)
        model.negative(text_BLD)
        reward.text_features(self.prompts)
        self._batch = Batch(0, [0], self.prompts, text_BLD, latents.to(meter.device))

    def step(self, side: str, index: int, update: bool = True) -> None:
        """Runs a step; without ``update`` the gradient is kept."""
        for part in self._method.updates(replace(self._batch, step=index)):
            with self.meter.stage("backward"):
                self.engine.backward(part.loss, part.step)
        if update:
            with self.meter.stage("optimiser"):
                self.engine.step(index)


class WanSession:
    """Networks and adapter that all parts share; every part has a video of another size."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._tiny = options, None
        if options.preset == "tiny":
            from rlvid.toy.tiny_wan import save_tiny_wan

            self._tiny = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self._tiny)  # not before: counting reads the structures in it again
            save_tiny_wan(self._tiny)
        device = torch.device(options.device)
        config = self.config(part_names(options.preset)[1])
        loaded = load_trainable(config.model, config.seed, config.model.path, device)
        assert isinstance(loaded, WanModel)
        for parameter in lora_parameters(loaded.denoiser):
            torch.nn.init.normal_(parameter, std=0.02)  # an adapter whose B is zero would leave A without gradient
        self._loaded, self._meter = loaded, Meter(device)
        of_reward = {"precision": options.precision, "checkpoint_activations": False, "path": config.reward.path}
        self._reward = load_reward(config.reward.name, device, **of_reward)
        self._engine = TorchEngine(loaded.denoiser, config.optimizer, config.model.precision)
        self._adapter = Adapter(self._engine)

    def config(self, part: str) -> RunConfig:
        """Returns the run of a part."""
        return config_of(part, self._options.precision, self._tiny)

    def restore(self) -> None:
        """See ``jobs.benchmark.timed.Session``."""
        self._adapter.restore()
        self._meter.read()

    def part(self, name: str) -> dict[str, Any]:
        """Measures a part: seconds and bytes by stage, and what the plan says of both."""
        if name == RATE:
            side = 128 if self._tiny else None
            return {RATE: matrix_rate(self._meter.device, DTYPES[self._options.precision], side)}
        config = self.config(name)
        plan = make_plan(config)
        steps = WanStep(config, self._sized(config.model), self._reward, self._engine, self._meter)
        found = measure(steps, ["rlvid"], self._options.steps, count=False)["rlvid"]
        del found["gradient"]
        if config.model.decode_window is not None:
            self._meter.peaks = found["peaks"]
            steps.step("rlvid", 0)
            self._meter.read()
        planned = dict.fromkeys(STAGES, 0)
        for stage, size in plan.stages.items():
            of = measured_stage(stage)
            planned[of] = max(planned[of], sum(plan.resident.values()) + size)
        return found | {"planned": planned, "planned flops": sum(plan.flops.values())}

    def _sized(self, spec: ModelConfig) -> WanModel:
        """Returns the same networks for videos of another size, and for another way through the decoder."""
        loaded, shape = self._loaded, {name: getattr(spec, name) for name in ("frames", "height", "width")}
        decode = decode_settings(spec)
        model = WanModel(
            loaded.denoiser, loaded.vae, loaded.text, **shape, shift=loaded.path.shift, decode=decode
        )  # freezes all weights
        for parameter in lora_parameters(model.denoiser):
            parameter.requires_grad_(True)
        return model


def least(name: str, record: Record, steps: int) -> float:
    """Returns seconds that a part takes at least: half of those of the same video with the fastest other window."""
    shape = name.partition("/")[0]
    known = [found["step"] for part, found in record.parts.items() if part.startswith(f"{shape}/") and "step" in found]
    return min(known, default=0.0) * (steps + 1) / 2


def main(arguments: list[str]) -> int:
    """See ``jobs.benchmark.timed.run``."""
    options = parse(arguments)
    return run(options, lambda: WanSession(options), partial(least, steps=options.steps), brief, tables)


def brief(name: str, found: dict[str, Any]) -> str:
    """Returns the result of a part in a few words."""
    if "out of memory" in found:
        return "out of memory"
    if name == RATE:
        return f"{found[RATE] / 1e12:.3g} TFLOP/s"
    return f"{found['step']:.3f} s, peak {peak(found)} GiB, planned {peak(found, 'planned')}"


def tables(record: Record) -> str:
    """Returns all recorded measurements as Markdown."""
    return "\n".join(["", *machine(record), *_sizes(record), *_stages(record)])


def _sizes(record: Record) -> Iterator[str]:
    rate = record.parts.get(RATE, {}).get(RATE)
    rows = []
    for name, found in record.parts.items():
        if name == RATE:
            continue
        shape, _, window = name.partition("/")
        if "out of memory" in found:
            rows.append([shape, window, "out of memory", "", "", "", ""])
            continue
        flops = found["planned flops"]
        share = percent(flops / found["step"] / rate, 0) if rate else ""
        rows.append(
            [shape, window, f"{found['step']:.3f}", f"{flops / 1e12:.3g}", share, peak(found), peak(found, "planned")]
        )
    heads = ["video", "window", "s a step", "planned TFLOP", "share of the rate", "peak GiB", "planned GiB"]
    yield from ("", Grid(heads, rows, words=2).markdown())


def _stages(record: Record) -> Iterator[str]:
    """Yields seconds and the peak of each stage, beside the plan's peak."""
    rows = []
    for name, found in record.parts.items():
        if "planned" in found:
            for stage in STAGES:
                measured, planned = found["peaks"][stage], found["planned"][stage]
                rows.append(
                    [name, stage, f"{found['seconds'][stage]:.3f}", f"{measured / GIB:.2f}", f"{planned / GIB:.2f}",
                     f"{measured / planned:.2f}"]
                )  # fmt: skip
    if rows:
        heads = ["video", "stage", "s", "peak GiB", "planned GiB", "measured / planned"]
        yield from ("", Grid(heads, rows, words=2).markdown())


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; raises ValueError for those that cannot be."""
    parser = make_parser(__doc__, "gpu-wan")
    names = {preset: part_names(preset) for preset in SHAPES}
    add_options(parser, list(SHAPES), ",".join(names["full"]), "benchmark-gpu-wan.json", minutes=10)
    options = parser.parse_args(arguments)
    check_options(options, names[options.preset])
    options.precision = options.precision or ("bfloat16" if options.device.startswith("cuda") else "float32")
    return options
