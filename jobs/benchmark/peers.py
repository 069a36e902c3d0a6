"""One training step of each method, beside the same step driven as published code of other projects drives it.

    python -m jobs.benchmark peers --frames 16 --segments 4
    python -m jobs.benchmark peers --peers VADER,VideoX-Fun --out peers.json

Both sides have the same networks, noise and prompts; jobs/benchmark/published.py and released.py say, stage by stage,
how they differ and which files of which repository that is from. 3D U-Net: InstructVideo, VADER, UniRL (DRaFT),
ddpo-pytorch (and TRL's DDPO). Wan: VideoX-Fun, UniRL-Wan; the model is the built-in one on a CPU, and one of Wan's 1.3B
structure on a GPU.

On a CPU, a step of the U-Net at full size takes minutes, above all the one that is counted: --preset tiny takes one
minute in all. The first step of each side is counted and not timed: torch counts its operations, and the bytes of all
tensors that it holds at once beside the weights. Timed steps are taken in turns.

    x operations   published / rlvid: the work that rlvid leaves out
    x seconds      the same ratio of seconds, medians
    of the ideal   x seconds / x operations: 1 where all work that is left out becomes time
    x tensors      published / rlvid: bytes of tensors at the peak, weights left out
    x memory       the same of the device's peak (CUDA) or the process's (Linux), above the level before the steps
    gradients      the distance of the two gradients, as a part of rlvid's; the command fails where it is too large
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.benchmark.matchups import PEERS, RELEASED, matchups
from jobs.benchmark.options import add_step_options, add_threads, check_out, fill_in, limit_threads, make_parser
from jobs.benchmark.parts import reset_peak
from jobs.benchmark.step import distance, measure
from rlvid.algorithms.base import peak_memory
from rlvid.evaluate.tables.table import Grid

ALLOWED = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}
"""Largest distance of two gradients that rounding explains, by precision."""


def main(arguments: list[str]) -> int:
    """Measures, prints a table and keeps the numbers; returns 1 where the gradients of two sides differ."""
    options = parse(arguments)
    limit_threads(options)
    found: dict[str, Any] = {}
    for name, steps, sides in matchups(options, options.peers):
        reset_peak(steps.meter.device)
        before = peak_memory(steps.meter.device)
        measured = measure(steps, sides, options.steps)
        gradients = {side: each.pop("gradient") for side, each in measured.items()}
        found[name] = {"sides": measured, "before": before, "videos": len(steps.prompts), "frames": steps.model.frames}
        found[name]["ratios"] = {
            side: ratios(measured[RELEASED], measured[side], before) | {"gradients": distance(gradients[RELEASED], own)}
            for side, own in gradients.items()
            if side != RELEASED
        }
    settings = vars(options)
    code = show(settings, found, Console(width=190))
    if options.out:
        Path(options.out).write_text(json.dumps({"settings": settings, "peers": found}, indent=2), encoding="utf-8")
    return code


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with the preset's numbers where none are given; raises ValueError for those that cannot be."""
    parser = make_parser(__doc__, "peers")
    add_step_options(parser)
    parser.add_argument("--rollouts", type=int, default=4, help="videos in a step of ddpo")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=[*PEERS], help=", ".join(PEERS))
    add_threads(parser)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args(arguments)
    fill_in(options)
    options.out = options.out and str(options.out)
    if unknown := [name for name in options.peers if name not in PEERS]:
        raise ValueError(f"--peers {unknown[0]!r}: there is no such peer; allowed: {', '.join(PEERS)}")
    for name, least in {"batch": 1, "steps": 1, "rollouts": 2, "sampling_steps": 2}.items():
        if (given := getattr(options, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} {given}: must be at least {least}")
    if options.out:
        check_out(Path(options.out))
    return options


def ratios(theirs: dict[str, Any], ours: dict[str, Any], before: int) -> dict[str, float | None]:
    """Returns a published side's cost over rlvid's; None where the process's memory did not grow."""
    operations = sum(theirs["flops"].values()) / sum(ours["flops"].values())
    seconds = theirs["step"] / ours["step"]
    grown = [max(side["peaks"].values()) - before for side in (theirs, ours)]
    return {
        "operations": operations,
        "seconds": seconds,
        "of the ideal": seconds / operations,
        "tensors": theirs["live"] / ours["live"],
        "memory": grown[0] / grown[1] if min(grown) > 0 else None,
    }


def show(settings: dict[str, Any], found: dict[str, Any], console: Console) -> int:
    """Prints the table; returns 1 where the gradients of two sides differ by more than rounding."""
    allowed, failures, rows = ALLOWED[settings["precision"]], [], []
    for name, peer in found.items():
        for side, ratio in peer["ratios"].items():
            costs = zip(*(_costs(peer["sides"][each]) for each in (RELEASED, side)), strict=True)
            shares = [ratio[key] for key in ("operations", "seconds", "of the ideal", "tensors", "memory")]
            numbers = ["" if share is None else f"{share:.2f}" for share in shares]
            both = [each for pair in costs for each in pair]
            rows.append([name, side, str(peer["frames"]), *both, *numbers, f"{ratio['gradients']:.0e}"])
            if not ratio["gradients"] <= allowed:
                failures.append(f"{name}: its gradient is {ratio['gradients']:.1e} away from that of {side}")
    console.print(
        f"{settings['preset']}: frames of {settings['size']} x {settings['size']}, {settings['segments']} of a video "
        f"scored, {settings['sampling_steps']} steps of a chain, {settings['batch']} videos in a step "
        f"({settings['rollouts']} of ddpo), {settings['precision']} on {settings['device']}, threads: "
        f"{settings['threads']}",
        highlight=False,
        soft_wrap=True,
    )
    heads = ["published", "beside", "frames", "TFLOP", "rlvid", "s", "rlvid", "GiB", "rlvid"]
    heads += ["x operations", "x seconds", "of the ideal", "x tensors", "x memory", "gradients"]
    console.print(Grid(heads, rows, words=2).console("a step of published code, beside rlvid's (GiB: tensors)"))
    for failure in failures:
        console.print(f"DIFFERENT: {failure}; {settings['precision']} allows {allowed:g}", highlight=False)
    return int(bool(failures))


def _costs(side: dict[str, Any]) -> tuple[str, str, str]:
    """Returns a side's operations in TFLOP, seconds, and GiB of tensors."""
    return f"{sum(side['flops'].values()) / 1e12:.3g}", f"{side['step']:.2f}", f"{side['live'] / 2**30:.3g}"
