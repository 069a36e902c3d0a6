"""One training step of the full-size model in bare torch, against the same parts driven as released code drives them.

    python -m jobs.benchmark step                      # full size on a GPU, reduced on a CPU
    python -m jobs.benchmark step --precision bfloat16 --compare sdpa,channels-last

Weights are random, for time and memory do not depend on them. InstructVideo as the paper has it: D = 20, tau = 0.6, the
last step with gradient, LoRA of rank 4, HPSv2's ViT-H-14 on one frame in four. Operations are counted by torch in the
first step of each side, which is not timed; a share is that of the rate at which this device multiplies matrices of
that precision. Peak memory is the device's (CUDA) or the process's (Linux), weights included. A measurement wants a
machine with nothing else to do.
"""

import argparse
import json
import statistics
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

from jobs.benchmark.options import add_step_options, check_out, fill_in, make_parser
from jobs.benchmark.parts import Bench, Calls, Meter, matrix_rate, prepare, reset_peak
from jobs.benchmark.tables import stages_of
from jobs.benchmark.variants import EXPLAINED, VARIANTS
from rlvid.algorithms.base import peak_memory
from rlvid.models.base import VideoModel
from rlvid.models.lora import lora_parameters
from rlvid.models.unet3d import DTYPES
from rlvid.train.engine import TorchEngine


class Sides(Protocol):
    """Several ways of one training step on the same networks, such as ``Bench``."""

    @property
    def meter(self) -> Meter:
        """Measures the stages of a step."""

    @property
    def model(self) -> VideoModel:
        """The networks, with an adapter."""

    @property
    def engine(self) -> TorchEngine:
        """The adapter's optimiser."""

    @property
    def prompts(self) -> list[str]:
        """A prompt for each video of a step."""

    def step(self, side: str, index: int, update: bool = True) -> None:
        """Runs a training step of a side; without ``update`` the gradient is kept."""


def gradient(bench: Sides) -> Tensor:
    """Returns the adapter's gradient, flat and on the CPU, and clears it."""
    parameters = lora_parameters(bench.model.denoiser)
    flat = torch.cat([p.grad.flatten().float().cpu() for p in parameters if p.grad is not None])
    bench.engine.optimizer.zero_grad(set_to_none=True)
    return flat


def measure(bench: Sides, sides: list[str], steps: int, count: bool = True) -> dict[str, dict[str, Any]]:
    """Medians of each side's stages over steps 1 to ``steps``, in turns, after step 0, which counts and warms up."""
    meter = bench.meter
    calls = Calls(bench.model, again=lambda: meter.current == "backward")
    found: dict[str, dict[str, Any]] = {side: {"seen": []} for side in sides}
    for side in sides:
        meter.peaks, meter.flops, calls.made = {}, {}, Counter()
        with meter.counting() if count else nullcontext():
            bench.step(side, 0, update=False)
        found[side]["first"] = sum(meter.read().values())
        made = {name: number / len(bench.prompts) for name, number in calls.made.items()}
        found[side] |= {"flops": meter.flops, "gradient": gradient(bench), "peaks": {}, "calls": made}
        found[side]["live"] = meter.live
    calls.remove()
    for index in range(1, steps + 1):
        for side in sides:
            meter.peaks = found[side]["peaks"]
            bench.step(side, index)
            found[side]["seen"].append(meter.read())
    for each in found.values():
        seen = each.pop("seen")
        each["seconds"] = {name: statistics.median(stages[name] for stages in seen) for name in seen[0]}
        each["step"] = statistics.median(sum(stages.values()) for stages in seen)
    return found


def measure_both(bench: Bench, steps: int) -> dict[str, Any]:
    """Measures rlvid's step and the released one: their ``sides``, and how far their gradients are apart."""
    sides = measure(bench, ["rlvid", "released"], steps)
    ours, theirs = (side.pop("gradient") for side in sides.values())
    return {"sides": sides, "gradient difference": distance(theirs, ours)}


def distance(a: Tensor, b: Tensor) -> float:
    """Returns the length of the difference, as a part of the length of ``b``."""
    return float((a - b).norm() / b.norm())


def main(arguments: list[str]) -> dict[str, Any]:
    """Measures, prints, and returns what it found."""
    options = parse(arguments)
    bench = prepare(options)
    rate = matrix_rate(bench.meter.device, DTYPES[options.precision])
    reset_peak(bench.meter.device)
    before = peak_memory(bench.meter.device)
    found: dict[str, Any] = {"settings": vars(options), "threads": torch.get_num_threads(), "rate": rate}
    found |= {**measure_both(bench, options.steps), "before": before, "variants": {}}
    for name in options.compare:
        with VARIANTS[name](bench) as changed:
            found["variants"][name] = measure(changed, ["rlvid"], options.steps, count=False)["rlvid"]["step"]
    show(found, Console(width=140))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with the preset's numbers where none are given; raises ValueError for those that cannot be."""
    parser = make_parser(__doc__, "step")
    add_step_options(parser)
    parser.add_argument("--compare", type=lambda text: text.split(","), default=[], help=", ".join(VARIANTS))
    parser.add_argument("--out", help="JSON file for the result")
    options = parser.parse_args(arguments)
    fill_in(options)
    unknown = [name for name in options.compare if name not in VARIANTS]
    if unknown or min(options.batch, options.steps) < 1:
        raise ValueError(
            f"--compare {','.join(options.compare)} --batch {options.batch} --steps {options.steps}: compare takes "
            f"{', '.join(VARIANTS)}, batch and steps at least 1"
        )
    if options.out:
        check_out(Path(options.out))
    return options


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the stages of both sides, their ratios, and the variants."""
    settings, sides = found["settings"], found["sides"]
    console.print(
        f"{settings['preset']}: {settings['batch']} x {settings['frames']} frames of {settings['size']} x "
        f"{settings['size']}, {settings['precision']} on {settings['device']}, {found['threads']} threads; matrix "
        f"products reach {found['rate'] / 1e12:.3g} TFLOP/s",
        highlight=False,
    )
    title = "rlvid, and released: the same parts, driven as released code does"
    console.print(stages_of(sides["rlvid"], sides["released"], found["rate"]).console(title))
    for side, each in sides.items():
        console.print(f"{side}, a video: {', '.join(f'{number:g} {name}' for name, number in each['calls'].items())}")
    console.print(ratios(found), highlight=False)
    for name, seconds in found["variants"].items():
        console.print(f"{EXPLAINED[name]}: {seconds:.2f} s, {seconds / sides['rlvid']['step']:.2f} x", highlight=False)


def ratios(found: dict[str, Any]) -> str:
    """Returns the extra cost of the published way, in one line."""
    ours, theirs, gib = found["sides"]["rlvid"], found["sides"]["released"], 2**30
    before, peaks = found["before"], [max(each["peaks"].values()) for each in (theirs, ours)]
    work = sum(theirs["flops"].values()) / sum(ours["flops"].values())
    beyond = [f"{(each - before) / gib:.2f}" for each in peaks]
    return (
        f"released / rlvid: {theirs['step'] / ours['step']:.2f} x seconds, {work:.2f} x operations, "
        f"{peaks[0] / max(1, peaks[1]):.2f} x peak memory ({beyond[0]} and {beyond[1]} GiB beyond the "
        f"{before / gib:.2f} of the idle process); their gradients differ by {found['gradient difference']:.1e}"
    )
