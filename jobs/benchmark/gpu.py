"""Measures a full-size step on this GPU, with torch alone and without Ray, in under 8 minutes on an H100.

    python -m jobs.benchmark gpu --out h100.json                      # again with the same file: only what is missing
    python -m jobs.benchmark gpu --out h100.json --show               # the tables of a file, on any machine
    python -m jobs.benchmark gpu --preset tiny --device cpu           # miniatures, to try every line

The networks are ModelScopeT2V and HPSv2's ViT-H at full size with random weights, the video is 16 x 256 x 256 in
bfloat16; see `python -m jobs.benchmark step --help`. Parts, in this order:

    rate        how fast this device multiplies matrices
    step        one step of InstructVideo, stage by stage, and the same step as released code does it
    videos-N    steps of N videos at once, and their memory beside what `rlvid plan` says
    kept-N      the same without activation checkpointing
    others      rlvid's step with one thing changed, as `python -m jobs.benchmark step --compare`
    compile     the denoiser's layers under torch.compile: the time to compile, and a step; it may take the minutes
                that are left

Each part is printed and written to the file as soon as it is there. What does not fit into --minutes is left out and
named; the same command measures it later. A part that needs more memory than there is says so.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from jobs.benchmark.options import PRESETS, check_out, fill_in, make_parser
from jobs.benchmark.parts import Bench, matrix_rate, prepare
from jobs.benchmark.prediction import PeakPrediction
from jobs.benchmark.record import Record, TooLong, at_most, open_record, setup
from jobs.benchmark.step import distance, measure, measure_both
from jobs.benchmark.tables import brief, tables
from jobs.benchmark.variants import VARIANTS, compiled
from rlvid.algorithms.base import peak_memory
from rlvid.interrupt import kept
from rlvid.models.lora import lora_parameters
from rlvid.models.unet3d import DTYPES
from rlvid.terminal import say

BACKENDS = {"tiny": "eager"}
"""What torch.compile compiles with; the default needs a C++ compiler and minutes."""
_COMPILE = 60.0
"""Seconds that torch.compile takes at least at full size."""

Part = Callable[["Session"], dict[str, Any]]


class Session:
    """Networks, adapter and plan that all parts share; every part finds the adapter as it was at the start."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.bench = options, prepare(options)
        self.device = self.bench.meter.device
        self._adapter = [parameter.detach().clone() for parameter in lora_parameters(self.bench.model.denoiser)]

    @cached_property
    def prediction(self) -> PeakPrediction:
        """What the plan predicts; it takes half a minute at full size."""
        return PeakPrediction(self.options)

    def restore(self) -> None:
        """Restores the adapter, makes a new optimiser, and frees the memory of the last part."""
        bench = self.bench
        parameters = lora_parameters(bench.model.denoiser)
        with torch.no_grad():
            for parameter, before in zip(parameters, self._adapter, strict=True):
                parameter.grad = None
                parameter.copy_(before)
        bench.engine.optimizer.state.clear()
        bench.meter.read()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def steps(self, bench: Bench) -> dict[str, Any]:
        """Stages, peaks and seconds of rlvid's own step."""
        return measure(bench, ["rlvid"], self.options.steps, count=False)["rlvid"]


def rate(session: Session) -> dict[str, Any]:
    side = 128 if session.options.preset == "tiny" else None
    return {"rate": matrix_rate(session.device, DTYPES[session.options.precision], side)}


def step(session: Session) -> dict[str, Any]:
    return {"before": peak_memory(session.device), **measure_both(session.bench, session.options.steps)}


def videos(session: Session, number: int, recompute: bool) -> dict[str, Any]:
    found = session.steps(session.bench.with_clips(number, recompute))
    del found["gradient"]
    return found | {"videos": number, "recompute": recompute, "planned": session.prediction(number, recompute)}


def torch_compile(session: Session) -> dict[str, Any]:
    off = session.steps(session.bench)
    session.restore()
    with compiled(session.bench, BACKENDS.get(session.options.preset, "inductor")) as changed:
        on = session.steps(changed)
    difference = distance(on.pop("gradient"), off.pop("gradient"))
    return {"off": off, "on": on, "gradient difference": difference}


def variant(session: Session, name: str) -> dict[str, Any]:
    with VARIANTS[name](session.bench) as changed:
        found = session.steps(changed)
    del found["gradient"]
    return found


PARTS: dict[str, Part] = {
    "rate": rate,
    "step": step,
    **{f"videos-{n}": partial(videos, number=n, recompute=True) for n in (1, 2, 4)},
    **{f"kept-{n}": partial(videos, number=n, recompute=False) for n in (1, 2, 4)},
    **{name: partial(variant, name=name) for name in VARIANTS if name != "compile"},
    "compile": torch_compile,
}


def expected(name: str, record: Record, options: argparse.Namespace) -> float:
    """Returns seconds that a part takes at least, by the seconds of a step if they are known."""
    if "step" not in record.parts:
        return 0.0
    one = record.parts["step"]["sides"]["rlvid"]["step"] * (options.steps + 1)
    if name == "compile":
        return 2 * one + (0.0 if options.preset in BACKENDS else _COMPILE)
    return one * (int(name.split("-")[1]) if name.startswith(("videos-", "kept-")) else 1)


def main(arguments: list[str]) -> int:
    """Measures what is missing, prints the tables; returns 1 if a part failed otherwise than for lack of memory."""
    options = parse(arguments)
    if options.show:
        say(tables(Record.read(options.out)))
        return 0
    began = time.monotonic()
    record = open_record(options.out, setup(options))
    missing = [name for name in options.parts if name not in record.parts]
    for name in options.parts:
        if name in record.parts:
            say(f"{name}: is in {options.out} already")
    failed = False
    if missing:
        torch.backends.cudnn.benchmark = False  # its trials would count as a step's first seconds
        with kept(f"the parts that ended are in {options.out}"):
            session = Session(options)
            say(f"networks: ready after {time.monotonic() - began:.0f} s")
            for name, left in in_time(missing, record, options, began):
                failed |= not measured(name, session, record, left)
    say(tables(record))
    return int(failed)


def in_time(
    missing: list[str], record: Record, options: argparse.Namespace, began: float
) -> Iterator[tuple[str, float]]:
    """Yields the parts that fit into the minutes, and the seconds that are left to each; the others are named."""
    for name in missing:
        left = options.minutes * 60 - (time.monotonic() - began)
        if (need := expected(name, record, options)) >= left:
            why = f"takes {need:.0f} s or more, and {max(0, left):.0f} of {60 * options.minutes:g} are left"
            record.leave_out(name, why)
            say(f"{name}: left out, {why}")
        else:
            yield name, left


def measured(name: str, session: Session, record: Record, left: float) -> bool:
    """Measures one part and keeps what came of it; False where it failed."""
    began = time.monotonic()
    session.restore()
    try:
        with at_most(left) as clock:
            found = PARTS[name](session)
    except torch.OutOfMemoryError as error:
        found = {"out of memory": one_line(error)}
    except (TooLong, RuntimeError) as error:
        why = f"stopped after {left:.0f} s" if clock.over else f"failed: {one_line(error)}"
        record.leave_out(name, why)
        say(f"{name}: {why}")
        return clock.over
    found["took"] = time.monotonic() - began
    record.keep(name, found)
    say(f"{name}: {brief(name, found)} ({found['took']:.0f} s)")
    return True


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; raises ValueError for those that cannot be."""
    parser = make_parser(__doc__, "gpu")
    gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=PRESETS, default="full", help="default: full")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--precision", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each part, after one to warm up")
    parser.add_argument("--minutes", type=float, default=8, help="no part runs on after them (default: 8)")
    parser.add_argument("--parts", help=f"of {','.join(PARTS)} (default: all, in this order)")
    parser.add_argument("--out", type=Path, default=Path("benchmark-gpu.json"), help="default: benchmark-gpu.json")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--show", action="store_true", help="print the tables of --out and measure nothing")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",") if options.parts else list(PARTS)
    if unknown := [name for name in options.parts if name not in PARTS]:
        raise ValueError(f"--parts {unknown[0]!r}: allowed: {', '.join(PARTS)}")
    if options.steps < 1 or not 0 < options.minutes < float("inf"):
        raise ValueError(f"--steps {options.steps} --minutes {options.minutes:g}: steps at least 1, minutes above 0")
    if options.device != "cpu" and not options.show and not (gpu and options.device.startswith("cuda")):
        raise ValueError(
            f"--device {options.device!r}: torch {torch.__version__} sees {'no' if not gpu else 'a'} GPU; allowed: "
            "cuda where there is one, or cpu with --preset tiny"
        )
    check_out(options.out)
    options.batch = 1
    fill_in(options)
    return options
