"""Measures what feeding a training takes as the training set grows, and what a slow source costs.

    python -m jobs.benchmark feed                                     # 1,000 prompts and 1,000 clips
    python -m jobs.benchmark feed --prompts 1000 1000000 --clips 1000 100000 --out feed.json
    python -m jobs.benchmark feed --prompts --clips 1000 --slow 0 2   # seconds that each share takes to read

Each line is a training in a process of its own. Prompts go to DDPO, which starts from noise; clips to InstructVideo
without denoising. The sets are made in a temporary folder first: 100,000 clips of the built-in model take 2.3 GB.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmark.options import check_out, make_parser
from jobs.benchmark.record import processor
from rlvid.evaluate.tables.table import Grid
from rlvid.files import write_atomic
from rlvid.runs.scalars import read_scalars
from rlvid.terminal import say

_STAGES = ("step", "data", "archive")
_IN_PART = 256
_FIRST_STEP = "rlvid.train step 0 "


def write_prompt_file(path: Path, count: int) -> None:
    """Writes a file of different prompts."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            file.write(f"a red star number {number} moving to the left on a white background\n")


def repeat_clips(few: Path, count: int, out: Path) -> None:
    """Makes a folder of ``count`` clips that repeats the clips of another one."""
    from rlvid.data.clips import digest, read_meta
    from rlvid.data.row_files import write_rows

    meta = read_meta(few)
    assert meta is not None, few
    rows = pa.concat_tables([pq.read_table(path) for path in sorted(few.glob("part-*.parquet"))])
    out.mkdir()
    parts = list[tuple[str, int, int]]()
    for first in range(0, count, _IN_PART):
        indices = list(range(first, min(first + _IN_PART, count)))
        table = rows.take([index % rows.num_rows for index in indices])
        path = out / f"part-{len(parts):05d}.parquet"
        write_rows(table.set_column(0, "index", pa.array(indices, pa.int64())), path)
        parts.append((path.name, table.num_rows, path.stat().st_size))
    changed = {"clips": count, "parts": parts, "fingerprint": digest([meta["fingerprint"], count])}
    write_atomic(out / "meta.json", json.dumps(meta | changed).encode())


def trained(arguments: list[str], run: Path, slow: float = 0.0) -> dict[str, float]:
    """Trains in a process of its own; returns the seconds to the first step, the worker's peak GiB and medians."""
    program = ["jobs.benchmark.slow_feed", str(slow)] if slow else ["rlvid", "train"]
    began = time.time()
    command = [sys.executable, "-m", *program, *arguments]
    # Forks would count the pages that they share as their own memory.
    environment = os.environ | {"COLUMNS": "1000", "RLVID_FORK_WORKERS": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise ValueError(f"the training failed: {' '.join((done.stdout + done.stderr).split())[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if "slower than training" in line]
    for line in lines:
        say(f"it said: {line.strip()}")
    found = scalars(run)
    return found | {"first step": first_step(run) - began - found.pop("of the first step"), "said": float(len(lines))}


def scalars(run: Path) -> dict[str, float]:
    """Returns medians of a run's scalars without its first step, and the seconds of that."""
    tags = [*(f"seconds/{stage}" for stage in _STAGES), "cost/peak_memory_gib"]
    events = read_scalars(run / "tensorboard", lambda tag: tag in tags)
    found = {stage: statistics.median(list(events[f"seconds/{stage}"].values())[1:]) for stage in _STAGES}
    peak = max(events["cost/peak_memory_gib"].values())
    return found | {"peak GiB": peak, "of the first step": events["seconds/step"][0]}


def first_step(run: Path) -> float:
    """Returns the time at which worker 0 had finished its first step."""
    log = (run / "logs" / "worker-00.log").read_text(encoding="utf-8")
    line = next(line for line in log.splitlines() if _FIRST_STEP in line)
    return datetime.strptime(" ".join(line.split()[:2]), "%Y-%m-%d %H:%M:%S,%f").timestamp()


def measurements(options: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields what was measured, a training at a time."""
    common = [f"output.storage={folder / 'runs'}", f"train.steps={options.steps}", "train.workers=1", "guard.every=0"]
    common += [
        "train.zero_stage=0",
        "train.group_size=1",
        "output.videos_every=0",
        f"output.checkpoint_every={options.steps}",
    ]
    common += options.overrides
    for count in options.prompts:
        file = folder / f"{count}.txt"
        write_prompt_file(file, count)
        for again in ("", "-again"):
            name = f"prompts-{count}{again}"
            own = [f"name={name}", "data.source=prompts", f"data.prompts={file}"]
            found = trained(["toy-ddpo", "method.same_start=false", *own, *common], folder / "runs" / name)
            yield {"source": f"prompts{', known before' if again else ''}", "rows": count, **found}
    if options.clips:
        few = _few_clips(folder, options.overrides)
    for count in options.clips:
        clips = folder / f"clips-{count}"
        repeat_clips(few, count, clips)
        for slow in options.slow:
            for every in (1, 0):
                name = f"clips-{count}-{slow:g}-{every}"
                settings = [
                    f"name={name}",
                    f"data.source={clips}",
                    f"output.archive_every={every}",
                    "method.denoising=0",
                ]
                found = trained(["toy", *settings, *common], folder / "runs" / name, slow)
                source = f"clips{f', {slow:g} s a share' if slow else ''}{'' if every else ', no archive'}"
                yield {"source": source, "rows": count, **found}


def _few_clips(folder: Path, overrides: list[str]) -> Path:
    """Encodes sixteen clips of the built-in renderer; returns their folder."""
    from rlvid.config import load_config
    from rlvid.data.sources import encode_builtin

    model = load_config("toy", [each for each in overrides if each.startswith("model.")]).model
    return encode_builtin(16, 0, model, folder / "few").folder


def main(arguments: list[str]) -> None:
    """Measures, prints a table, and keeps the numbers."""
    parser = make_parser(__doc__, "feed")
    parser.add_argument("overrides", nargs="*", help="settings of the trainings, as for rlvid train")
    parser.add_argument("--prompts", type=int, nargs="*", default=[1000], help="numbers of prompts")
    parser.add_argument("--clips", type=int, nargs="*", default=[1000], help="numbers of encoded clips")
    parser.add_argument("--slow", type=float, nargs="*", default=[0.0], help="seconds that a share takes to read")
    parser.add_argument("--steps", type=int, default=6, help="steps of each training; the first one is not counted")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 2:
        raise ValueError(f"--steps {options.steps}: must be at least 2, because the first one is not counted")
    for name in ("prompts", "clips"):
        if wrong := [count for count in getattr(options, name) if count < 1]:
            raise ValueError(f"--{name} {wrong[0]}: must be at least 1; --{name} alone leaves these trainings out")
    if wrong := [seconds for seconds in options.slow if not 0 <= seconds < math.inf]:
        raise ValueError(f"--slow {wrong[0]:g}: must be a number of seconds, 0 or more")
    if options.out:
        check_out(options.out)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for each in measurements(options, Path(temporary)):
            found.append(each)
            say(f"{each['source']}, {each['rows']:,} rows: first step after {each['first step']:.1f} s")
            if options.out:
                kept = {"card": processor(), "cores": os.cpu_count(), "steps": options.steps, "trainings": found}
                write_atomic(options.out, json.dumps(kept, indent=1).encode())
    say(table(found).markdown())


def table(found: list[dict[str, Any]]) -> Grid:
    """Returns the table of the measurements."""
    heads = ["source", "rows", "s to the first step", "worker's peak GiB", *(f"s a step: {each}" for each in _STAGES)]
    return Grid(
        heads,
        [
            [each["source"], f"{each['rows']:,}", f"{each['first step']:.1f}", f"{each['peak GiB']:.2f}"]
            + [f"{each[stage]:.3f}" for stage in _STAGES]
            for each in found
        ],
    )
