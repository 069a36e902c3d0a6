"""Measures how costs grow with the work, and fits exponents: nothing may grow faster than linearly.

    python -m jobs.benchmark growth                                  # all quantities, small grids
    python -m jobs.benchmark growth archive report --out growth.json
    python -m jobs.benchmark growth clips --sizes 1000 1000000
    python -m jobs.benchmark growth --whole                          # whole grids: hours

    frames       of the video of two training steps, 32 x 32 pixels; bare torch
    size         sides of such a video's 8 frames; exponents are over pixels
    clips        encoded clips of a training set, of which Ray Data feeds 64 steps of 8
    archive      rows of a run's archive, written with merged files, then read
    evaluation   videos that `rlvid evaluate` makes and scores
    tables       videos of which `rlvid evaluate` writes tables and bootstraps
    report       videos of `rlvid report`
    sweeps       trials of a sweep; search and report, without trainings

Networks are miniatures, and each size is a process of its own. Seconds are of its CPU, so that work of others counts
little; those of clips' feed are of the clock, because Ray's processes share the work. The exponent is the slope of a
line through (log size, log cost) over the upper half of the sizes, with its standard error; fewer than three sizes have
none, and give no verdict. That of memory is of the rise of the process's resident set since the stage began; of clips'
feed it is of the largest Ray worker's whole memory, which must not grow. An exponent that is above the limit by more
than its error is a finding. The command then returns 1, unless the reason is known: attention compares every pixel of a
frame with every other.

`--out` keeps each size once it is measured. The same command goes on from there.
"""

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from jobs.benchmark.growth_fit import FLAT, IN_FIT, LIMIT, Growth, Stages, draw, growths, table
from jobs.benchmark.options import check_out, make_parser
from jobs.benchmark.record import Record, commit, open_record, processor
from rlvid.faults import one_line
from rlvid.interrupt import kept
from rlvid.terminal import say


@dataclass(frozen=True)
class Quantity:
    """The sizes of a quantity.

    Attributes:
        grid: of the default.
        whole: further sizes of the whole grid.
        power: of a size, which is the work.
        flat: the stage whose memory must not grow, if there is one.
        multiple: of which sizes are.
        reason: why the cost grows faster than linearly, where that is known.
    """

    grid: tuple[int, ...]
    whole: tuple[int, ...] = ()
    power: int = 1
    flat: str = ""
    multiple: int = 1
    reason: str = ""


ATTENTION = "attention compares every pixel of a frame with every other"
QUANTITIES = {
    "frames": Quantity((8, 16, 32, 64)),
    "size": Quantity((32, 48, 64, 96, 128), power=2, multiple=4, reason=ATTENTION),
    "clips": Quantity((100, 1000, 10_000), (100_000, 1_000_000), flat="feed"),
    "archive": Quantity((1000, 3000, 10_000, 30_000), (100_000, 300_000, 1_000_000)),
    "evaluation": Quantity((100, 200, 400), (1000, 3000, 10_000, 30_000, 100_000), multiple=2),
    "tables": Quantity((100, 300, 1000, 3000), (10_000, 30_000, 100_000), multiple=2),
    "report": Quantity((100, 200, 400, 800), (2000, 4000, 10_000), multiple=2),
    "sweeps": Quantity((10, 20, 40, 80, 160), (320, 640, 1000)),
}
"""All quantities; ``growth_work.WORK`` does their work."""


def measured(name: str, size: int) -> Stages:
    """Measures a size in a process of its own, with files in a temporary folder.

    Raises:
        RuntimeError: the process failed, or was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.benchmark.growth_work"])
    with tempfile.TemporaryDirectory(prefix="rlvid-growth-") as folder:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(sender, name, size, folder))
        process.start()
        sender.close()
        try:
            found: dict[str, Any] = receiver.recv()
        except EOFError:
            process.join()
            found = {"error": f"its process ended with {process.exitcode}"}
        finally:
            receiver.close()
            process.terminate()
            process.join()
    if "error" in found:
        raise RuntimeError(f"{name}, {size:,}: {found['error']}")
    return found


def _measure(sender: Connection, name: str, size: int, folder: str) -> None:
    from jobs.benchmark.growth_work import measure  # is loaded already, in this process alone

    try:
        sender.send(measure(name, size, Path(folder)))
    except Exception as error:  # of whatever kind, the other process says it
        sender.send({"error": one_line(error)})


def main(arguments: list[str]) -> int:
    """Measures the missing sizes, prints the table and the findings; returns 1 if one has no known reason."""
    options = parse(arguments)
    setup = {
        "card": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "commit": options.commit or commit(),
    }  # fmt: skip
    record = open_record(options.out, setup)
    with kept(f"the sizes that ended are in {options.out}"):
        for name in options.quantities:
            for size in sizes_of(name, options):
                if (key := f"{name} {size}") not in record.parts:
                    stages = measured(name, size)
                    record.keep(key, {"quantity": name, "size": size, "stages": stages})
                    say(f"{name}, {size:,}: {', '.join(_brief(stage, each) for stage, each in stages.items())}")
    found = growths_of(record)
    say(table(found).markdown())
    findings = [(line, QUANTITIES[each.name].reason) for each in found for line in each.findings]
    for line, reason in findings:
        say(f"FINDING: {line}{f' ({reason})' if reason else ''}")
    few, enough = ([each.name for each in found if each.undecided is few] for few in (True, False))
    if few:
        say(f"too few sizes for a verdict: {', '.join(dict.fromkeys(few))}; measure {IN_FIT} sizes or more")
    if enough and not findings:
        say(
            f"no {'other ' * bool(few)}exponent is above {LIMIT:g} by more than its error, nor that of a worker's "
            f"memory above {FLAT:g}"
        )
    picture = options.out.with_suffix(".png")
    draw(picture, found)
    say(f"numbers: {options.out}, picture: {picture}")
    return int(not all(reason for _, reason in findings))


def growths_of(record: Record) -> list[Growth]:
    """Returns the growth of all quantities with measured sizes."""
    found = list[Growth]()
    for name, about in QUANTITIES.items():
        sizes = {part["size"]: part["stages"] for part in record.parts.values() if part["quantity"] == name}
        found += growths(name, sizes, about.power, about.flat)
    return found


def _brief(stage: str, found: Mapping[str, float]) -> str:
    return f"{stage} {found['seconds']:.3g} s, peak {found['peak'] / 2**20:.0f} MiB"


def sizes_of(name: str, options: argparse.Namespace) -> tuple[int, ...]:
    """Returns the sizes of a quantity that are asked for."""
    about = QUANTITIES[name]
    return tuple(options.sizes or about.grid + (about.whole if options.whole else ()))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the options; raises ValueError for those that cannot be."""
    parser = make_parser(__doc__, "growth")
    parser.add_argument("quantities", nargs="*", metavar="QUANTITY", help="default: all")
    parser.add_argument("--whole", action="store_true", help="the whole grids")
    parser.add_argument("--sizes", type=int, nargs="+", help="sizes of one quantity, in place of its grid")
    parser.add_argument("--out", type=Path, default=Path("growth.json"), help="default: growth.json, and growth.png")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    options = parser.parse_intermixed_args(arguments)
    if unknown := [name for name in options.quantities if name not in QUANTITIES]:
        raise ValueError(f"growth {unknown[0]!r}: allowed: {', '.join(QUANTITIES)}")
    options.quantities = [name for name in QUANTITIES if name in options.quantities or not options.quantities]
    if options.sizes:
        if len(options.quantities) != 1:
            raise ValueError("--sizes: these are of one quantity; name it, as in growth clips --sizes 1000 100000")
        multiple = QUANTITIES[options.quantities[0]].multiple
        if wrong := [size for size in options.sizes if size < 1 or size % multiple]:
            raise ValueError(f"--sizes {wrong[0]}: {options.quantities[0]} takes positive multiples of {multiple}")
        options.sizes.sort()
    check_out(options.out, picture=True)
    return options
