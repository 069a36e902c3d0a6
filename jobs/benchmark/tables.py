"""Prints measurements, a line per part, and writes them as Markdown tables for docs/costs.md."""

from collections.abc import Iterator
from typing import Any

from jobs.benchmark.record import Record
from jobs.benchmark.variants import EXPLAINED
from rlvid.evaluate.tables.table import Grid
from rlvid.metric_names import percent

GIB = 2**30
_COLUMNS = ("seconds", "TFLOP", "share of the rate", "peak GiB")


def brief(name: str, found: dict[str, Any]) -> str:
    """Returns the result of a part in a few words."""
    if "out of memory" in found:
        return "out of memory"
    if name == "rate":
        return f"{found['rate'] / 1e12:.3g} TFLOP/s"
    if name == "step":
        ours, theirs = (found["sides"][side]["step"] for side in ("rlvid", "released"))
        return f"{ours:.3f} s, as released code does it {theirs:.3f} s ({theirs / ours:.2f} x)"
    if name == "compile":
        on, off = found["on"], found["off"]
        return f"{on['step']:.3f} s, without {off['step']:.3f} s; the first step took {on['first']:.1f} s"
    said = f"{found['step']:.3f} s, peak {peak(found)} GiB"
    if "planned" in found:
        said += f", planned {peak(found, 'planned')}"
    return said


def stages_of(ours: dict[str, Any], theirs: dict[str, Any], rate: float | None) -> Grid:
    """Returns the table of rlvid's step beside the released one, stage by stage; shares are of the matrix ``rate``."""
    a, b, empty = _stage_cells(ours, rate), _stage_cells(theirs, rate), [""] * len(_COLUMNS)
    stages = sorted(dict.fromkeys([*b, *a]), key="step".__eq__)  # the whole comes last
    heads = ["stage", *_COLUMNS, *(f"released: {column}" for column in _COLUMNS)]
    return Grid(heads, [[stage, *a.get(stage, empty), *b.get(stage, empty)] for stage in stages])


def _stage_cells(side: dict[str, Any], rate: float | None) -> dict[str, list[str]]:
    """Returns the cells of each stage of a side, and of its whole ``step``."""

    def cells(seconds: float, flops: int, memory: int) -> list[str]:
        share = percent(flops / max(seconds, 1e-9) / rate, 0) if flops and rate else ""
        return [f"{seconds:.3f}", f"{flops / 1e12:.3g}" if flops else "", share, f"{memory / GIB:.2f}"]

    flops, peaks = side["flops"], side["peaks"]
    found = {name: cells(seconds, flops.get(name, 0), peaks.get(name, 0)) for name, seconds in side["seconds"].items()}
    return found | {"step": cells(side["step"], sum(flops.values()), max(peaks.values()))}


def tables(record: Record) -> str:
    """Returns all recorded measurements as Markdown."""
    return "\n".join(
        ["", *machine(record), _video(record), *_step(record), *_memory(record), *_videos(record), *_changes(record)]
    )


def machine(record: Record) -> Iterator[str]:
    """Yields the device and its software, its rate, and what was left out."""
    setup = record.setup
    software = [f"torch {setup['torch']}", f"Python {setup['python']}", f"commit {setup['commit']}"]
    if "driver" in setup:
        software[:0] = [f"driver {setup['driver']}", f"CUDA {setup['cuda']}"]
    yield f"{setup['card']}; {', '.join(software)}."
    yield f"Networks: {setup['preset']}, {setup['precision']}; medians of {setup['steps']} steps."
    if "rate" in record.parts:
        yield f"Products of matrices reach {record.parts['rate']['rate'] / 1e12:.3g} TFLOP/s."
    for name, why in record.left_out.items():
        yield f"Not measured: {name} ({why})."


def _video(record: Record) -> str:
    setup = record.setup
    size = f"{setup['size']} x {setup['size']}"
    return f"A video: {setup['frames']} frames of {size}, {setup['segments']} of them rewarded."


def _step(record: Record) -> Iterator[str]:
    if "sides" not in (found := record.parts.get("step", {})):
        return
    ours, theirs = found["sides"]["rlvid"], found["sides"]["released"]
    yield from ("", stages_of(ours, theirs, record.parts.get("rate", {}).get("rate")).markdown())
    work = sum(theirs["flops"].values()) / max(1, sum(ours["flops"].values()))
    yield ""
    yield (
        f"Released / rlvid: {theirs['step'] / ours['step']:.2f} x seconds, {work:.2f} x operations; their gradients "
        f"differ by {found['gradient difference']:.1e}. Before the step {found['before'] / GIB:.2f} GiB are in use."
    )


def _memory(record: Record) -> Iterator[str]:
    """Yields each stage's peak beside the plan's, of one video."""
    found = record.parts.get("videos-1", {})
    if "planned" not in found:
        return
    rows = [
        [stage, f"{measured / GIB:.2f}", f"{planned / GIB:.2f}", f"{measured / planned:.2f}"]
        for stage, planned in found["planned"].items()
        if (measured := found["peaks"].get(stage))
    ]
    yield from _table(["peak of", "measured GiB", "planned GiB", "measured / planned"], rows)


def _videos(record: Record) -> Iterator[str]:
    rows = []
    parts = [name.split("-") for name in record.parts if name.startswith(("videos-", "kept-"))]
    for kind, number in sorted(parts, key=lambda part: (part[0], int(part[1]))):
        found = record.parts[f"{kind}-{number}"]
        cells = ["out of memory", "", "", ""]
        if "out of memory" not in found:
            seconds = found["step"]
            cells = [f"{seconds:.3f}", f"{seconds / int(number):.3f}", peak(found), peak(found, "planned")]
        rows.append([number, "kept" if kind == "kept" else "recomputed", *cells])
    yield from _table(["videos at once", "activations", "s a step", "s a video", "peak GiB", "planned GiB"], rows)


def _changes(record: Record) -> Iterator[str]:
    """torch.compile, and the step with one thing changed."""
    rows = []
    if "on" in (found := record.parts.get("compile", {})):
        on, off = found["on"], found["off"]
        note = f"first step {on['first']:.1f} s; gradients differ by {found['gradient difference']:.1e}"
        rows.append(["torch.compile", f"{on['step']:.3f}", f"{on['step'] / off['step']:.2f}", peak(on), note])
    base = record.parts.get("step", {}).get("sides", {}).get("rlvid", {}).get("step")
    for name in EXPLAINED:
        found = record.parts.get(name, {})
        if name == "compile" or not found:
            continue
        if "out of memory" in found:
            rows.append([EXPLAINED[name], "out of memory", "", "", ""])
        else:
            ratio = f"{found['step'] / base:.2f}" if base else ""
            rows.append([EXPLAINED[name], f"{found['step']:.3f}", ratio, peak(found), ""])
    yield from _table(["changed", "s a step", "x seconds", "peak GiB", ""], rows)


def peak(found: dict[str, Any], of: str = "peaks") -> str:
    """Returns the largest peak of all stages, in GiB."""
    return f"{max(found[of].values()) / GIB:.2f}"


def _table(heads: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Nothing where there are no rows."""
    if rows:
        yield from ("", Grid(heads, rows).markdown())
