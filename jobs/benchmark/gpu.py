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
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from jobs.benchmark.options import PRESETS, fill_in, make_parser
from jobs.benchmark.parts import Adapter, Bench, matrix_rate, prepare
from jobs.benchmark.prediction import PeakPrediction
from jobs.benchmark.record import Record
from jobs.benchmark.step import distance, measure, measure_both
from jobs.benchmark.tables import brief, tables
from jobs.benchmark.timed import add_options, check_options, run
from jobs.benchmark.variants import VARIANTS, compiled
from rlvid.algorithms.base import peak_memory
from rlvid.models.unet3d import DTYPES

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
        self._adapter = Adapter(self.bench.engine)

    @cached_property
    def prediction(self) -> PeakPrediction:
        """What the plan predicts; it takes half a minute at full size."""
        return PeakPrediction(self.options)

    def restore(self) -> None:
        """Restores the adapter, makes a new optimiser, and frees the memory of the last part."""
        self._adapter.restore()
        self.bench.meter.read()

    def part(self, name: str) -> dict[str, Any]:
        """Measures a part."""
        return PARTS[name](self)

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
    """See ``jobs.benchmark.timed.run``."""
    options = parse(arguments)
    return run(options, lambda: Session(options), partial(expected, options=options), brief, tables)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; raises ValueError for those that cannot be."""
    parser = make_parser(__doc__, "gpu")
    add_options(parser, list(PRESETS), ",".join(PARTS), "benchmark-gpu.json", minutes=8)
    options = parser.parse_args(arguments)
    check_options(options, list(PARTS))
    options.batch = 1
    fill_in(options)
    return options
