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
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from jobs.benchmark.parts import DTYPES, Bench, Meter, matrix_rate, prepare, reset_peak
from jobs.benchmark.variants import EXPLAINED, VARIANTS
from rlvid.algorithms.base import peak_memory
from rlvid.models.lora import lora_parameters
from rlvid.models.unet3d import UNet3DModel

PRESETS: dict[str, dict[str, int]] = {
    "full": {"frames": 16, "size": 256, "segments": 4, "sampling_steps": 20},
    # The full-size networks on a small video.
    "reduced": {"frames": 8, "size": 64, "segments": 2, "sampling_steps": 20},
    "tiny": {"frames": 4, "size": 16, "segments": 1, "sampling_steps": 5},  # miniatures of the networks
}


def gradient(bench: Bench) -> Tensor:
    """Returns the adapter's gradient, flat and on the CPU, and clears it."""
    parameters = lora_parameters(bench.model.denoiser)
    flat = torch.cat([p.grad.flatten().float().cpu() for p in parameters if p.grad is not None])
    bench.engine.optimizer.zero_grad(set_to_none=True)
    return flat


def measure(bench: Bench, sides: list[str], steps: int, count: bool = True) -> dict[str, dict[str, Any]]:
    """Returns medians of each side's stages over ``steps``, taken in turns after a step that counts and warms up."""
    meter, calls = bench.meter, Calls(bench.model, bench.meter)
    found: dict[str, dict[str, Any]] = {side: {"seen": []} for side in sides}
    for side in sides:
        meter.peaks, meter.flops, calls.made = {}, {}, Counter()
        with meter.counting() if count else nullcontext():
            bench.step(side, 0, update=False)
        found[side]["first"] = sum(meter.read().values())
        made = {name: number / len(bench.prompts) for name, number in calls.made.items()}
        found[side] |= {"flops": meter.flops, "gradient": gradient(bench), "peaks": {}, "calls": made}
    calls.remove()
    for index in range(steps):
        for side in sides:
            meter.peaks = found[side]["peaks"]
            bench.step(side, index)
            found[side]["seen"].append(meter.read())
    for each in found.values():
        seen = each.pop("seen")
        each["seconds"] = {name: statistics.median(stages[name] for stages in seen) for name in seen[0]}
        each["step"] = statistics.median(sum(stages.values()) for stages in seen)
    return found


class Calls:
    """Videos that go through the denoiser and frames through the decoder, and those once more in the backward pass."""

    def __init__(self, model: UNet3DModel, meter: Meter) -> None:
        self.made, self._meter = Counter[str](), meter
        parts = {"denoiser evaluations": model.denoiser, "frames decoded": model.vae.decoder}
        self._hooks = [part.register_forward_pre_hook(self._counter(name)) for name, part in parts.items()]

    def _counter(self, name: str) -> Any:
        def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
            again = " again" if self._meter.current == "backward" else ""
            self.made[name + again] += len(inputs[0])

        return count

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def main(arguments: list[str]) -> dict[str, Any]:
    """Measures, prints, and returns what it found."""
    options = parse(arguments)
    bench = prepare(options)
    rate = matrix_rate(bench.meter.device, DTYPES[options.precision])
    reset_peak(bench.meter.device)
    before = peak_memory(bench.meter.device)
    sides = measure(bench, ["rlvid", "released"], options.steps)
    ours, theirs = (sides[side].pop("gradient") for side in ("rlvid", "released"))
    found: dict[str, Any] = {"settings": vars(options), "threads": torch.get_num_threads(), "rate": rate}
    found |= {"sides": sides, "before": before}
    found["gradient difference"] = float((ours - theirs).norm() / ours.norm())
    found["variants"] = {}
    for name in options.compare:
        with VARIANTS[name](bench) as changed:
            found["variants"][name] = measure(changed, ["rlvid"], options.steps, count=False)["rlvid"]["step"]
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2), encoding="utf-8")
    show(found, Console(width=110))
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the options, by default the preset's; raises ValueError for invalid ones."""
    parser = argparse.ArgumentParser(
        "python -m jobs.benchmark step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="default: full on a GPU, else reduced")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    for name in ("frames", "size", "segments", "sampling-steps"):
        parser.add_argument(f"--{name}", type=int, help="default: the preset's")
    parser.add_argument("--batch", type=int, default=1, help="videos in a step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each side")
    parser.add_argument("--compare", type=lambda text: text.split(","), default=[], help=", ".join(VARIANTS))
    parser.add_argument("--out", help="JSON file for the result")
    options = parser.parse_args(arguments)
    gpu = options.device.startswith("cuda")
    options.preset = options.preset or ("full" if gpu else "reduced")
    options.precision = options.precision or ("bfloat16" if gpu else "float32")
    for name, value in PRESETS[options.preset].items():
        setattr(options, name, getattr(options, name) or value)
    unknown = [name for name in options.compare if name not in VARIANTS]
    if unknown or min(options.batch, options.steps) < 1:
        raise ValueError(
            f"--compare {','.join(options.compare)} --batch {options.batch} --steps {options.steps}: compare takes "
            f"{', '.join(VARIANTS)}, batch and steps at least 1"
        )
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
    for side, each in sides.items():
        table = Table("stage", *(Column(name, justify="right") for name in ("seconds", "TFLOP", "share", "peak GiB")))
        table.title = {"rlvid": "rlvid", "released": "the same parts, driven as released code does"}[side]
        for stage, seconds in each["seconds"].items():
            table.add_row(stage, *cells(seconds, each["flops"].get(stage, 0), found["rate"], each["peaks"][stage]))
        table.add_section()
        total = sum(each["flops"].values())
        table.add_row("step", *cells(each["step"], total, found["rate"], max(each["peaks"].values())))
        console.print(table)
        console.print("a video: " + ", ".join(f"{number:g} {name}" for name, number in each["calls"].items()))
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


def cells(seconds: float, flops: int, rate: float, memory: int) -> list[str]:
    """Returns the cells of a row of the table."""
    share = f"{100 * flops / max(seconds, 1e-9) / rate:.0f} %" if flops else ""
    return [f"{seconds:.3f}", f"{flops / 1e12:.3g}" if flops else "", share, f"{memory / 2**30:.2f}"]
