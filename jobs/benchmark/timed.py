"""Parts of a benchmark, measured one after the other within so many minutes; each is kept as soon as it is there."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from jobs.benchmark.options import check_out
from jobs.benchmark.record import Record, TooLong, at_most, open_record, setup
from rlvid.interrupt import kept
from rlvid.models.unet3d import DTYPES
from rlvid.terminal import say


class Session(Protocol):
    """The networks that all parts share."""

    def restore(self) -> None:
        """Makes every part begin with the same adapter, a new optimiser, and free memory."""

    def part(self, name: str) -> dict[str, Any]:
        """Measures a part."""


def run(
    options: argparse.Namespace,
    make: Callable[[], Session],
    least: Callable[[str, Record], float],
    brief: Callable[[str, dict[str, Any]], str],
    tables: Callable[[Record], str],
) -> int:
    """Measures what is missing, prints the tables; returns 1 if a part failed otherwise than for lack of memory.

    With ``options.show`` it prints the tables alone. The other arguments are as for ``measure_missing``; ``tables``
    shows a record.
    """
    if options.show:
        say(tables(Record.read(options.out)))
        return 0
    record = open_record(options.out, setup(options))
    failed = measure_missing(record, options, make, lambda name: least(name, record), brief)
    say(tables(record))
    return int(failed)


def measure_missing(
    record: Record,
    options: argparse.Namespace,
    make: Callable[[], Session],
    least: Callable[[str], float],
    brief: Callable[[str, dict[str, Any]], str],
) -> bool:
    """Measures the parts of ``options.parts`` that the record lacks; returns whether one failed.

    Lack of memory is a result. A part that fails otherwise, or has no time, is left out, with the reason.

    Args:
        record: gets each part.
        options: ``parts``, ``minutes`` and ``out``.
        make: builds the networks, where a part is missing.
        least: seconds that a part takes at least.
        brief: a part's result in a few words.
    """
    began, failed = time.monotonic(), False
    missing = [name for name in options.parts if name not in record.parts]
    for name in options.parts:
        if name in record.parts:
            say(f"{name}: is in {options.out} already")
    if missing:
        torch.backends.cudnn.benchmark = False  # its trials would count as a step's first seconds
        with kept(f"the parts that ended are in {options.out}"):
            session = make()
            say(f"networks: ready after {time.monotonic() - began:.0f} s")
            for name, left in in_time(missing, record, options.minutes, began, least):
                failed |= not measured(name, session, record, left, brief)
    return failed


def in_time(
    missing: Sequence[str], record: Record, minutes: float, began: float, least: Callable[[str], float]
) -> Iterator[tuple[str, float]]:
    """Yields the parts that fit into the minutes, and the seconds that are left to each; the others are named."""
    for name in missing:
        left = minutes * 60 - (time.monotonic() - began)
        if (need := least(name)) >= left:
            why = f"takes {need:.0f} s or more, and {max(0, left):.0f} of {60 * minutes:g} are left"
            record.leave_out(name, why)
            say(f"{name}: left out, {why}")
        else:
            yield name, left


def measured(
    name: str, session: Session, record: Record, left: float, brief: Callable[[str, dict[str, Any]], str]
) -> bool:
    """Measures one part and keeps what came of it; False where it failed."""
    began = time.monotonic()
    session.restore()
    try:
        with at_most(left) as clock:
            found = session.part(name)
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


def add_options(parser: argparse.ArgumentParser, presets: Sequence[str], parts: str, out: str, minutes: float) -> None:
    """Adds the options of a benchmark of a GPU."""
    parser.add_argument("--preset", choices=presets, default="full", help="default: full")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--precision", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each part, after one to warm up")
    parser.add_argument(
        "--minutes", type=float, default=minutes, help=f"no part runs on after them (default: {minutes:g})"
    )
    parser.add_argument("--parts", help=f"of {parts} (default: all, in this order)")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--show", action="store_true", help="print the tables of --out and measure nothing")


def check_options(options: argparse.Namespace, parts: Sequence[str]) -> None:
    """Splits ``options.parts``; raises ValueError for options that cannot be."""
    options.parts = options.parts.split(",") if options.parts else list(parts)
    if unknown := [name for name in options.parts if name not in parts]:
        raise ValueError(f"--parts {unknown[0]!r}: allowed: {', '.join(parts)}")
    if options.steps < 1 or not 0 < options.minutes < float("inf"):
        raise ValueError(f"--steps {options.steps} --minutes {options.minutes:g}: steps at least 1, minutes above 0")
    gpu = torch.cuda.is_available()
    if options.device != "cpu" and not options.show and not (gpu and options.device.startswith("cuda")):
        raise ValueError(
            f"--device {options.device!r}: torch {torch.__version__} sees {'no' if not gpu else 'a'} GPU; allowed: "
            "cuda where there is one, or cpu with --preset tiny"
        )
    check_out(options.out)
