"""Evaluation results as tables: Markdown, CSV, JSON, Parquet, and on the console."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from rich import box
from rich.markup import escape
from rich.table import Table

from rlvid.evaluate import write_whole
from rlvid.evaluate.evaluate import METRICS, Comparison, Row, Summary, compare, summarise


@dataclass(frozen=True)
class Column:
    """How a metric is shown: headings (long, short), with ± std or not, in percent or not; whether more is better.

    Without a short heading, the console does not show it.
    """

    metric: str
    title: str
    short: str
    spread: bool = False
    percent: bool = False
    ranked: bool = True


COLUMNS = (
    Column("reward", "Reward", "reward", spread=True),
    Column("held_out", "Held-out reward", "held-out", spread=True),
    Column("clipsim", "CLIPSIM", "CLIPSIM"),
    Column("consistency", "Temporal consistency", "cons."),
    Column("consistency_all_pairs", "… of all pairs", ""),
    Column("consistency_vbench", "… of VBench", ""),
    Column("flickering", "Flickering", "", ranked=False),
    Column("motion", "Motion", "motion", ranked=False),
    Column("oracle_subject", "Subject", "subj.", percent=True),
    Column("oracle_colour", "Colour", "colour", percent=True),
    Column("oracle_background", "Background", "ground", percent=True),
    Column("oracle_motion", "Motion direction", "dir.", percent=True),
    Column("oracle_sharpness", "Sharpness", "sharp."),
    Column("oracle_score", "Oracle score", "oracle"),
)
_GAINS = {"reward": "reward", "held_out": "held-out reward", "oracle_score": "oracle score"}

_LEGEND = """\
Reward and held-out reward: mean ± standard deviation over videos of the mean score of all frames; only the first was
trained on. CLIPSIM: mean over frames of the cosine of image and prompt. Temporal consistency: mean cosine of
consecutive frames; of all pairs of frames (TGVE); as VBench has it, half with the frame before and half with the first,
negative ones as 0. Flickering: VBench's, 1 less the mean absolute difference of consecutive 8-bit frames. Motion: mean
absolute difference of consecutive frames in pixel values of [0, 1]; a frozen video has a consistency and a flickering
of 1 and a motion of 0, so read them together."""
_ORACLE_LEGEND = """\
Subject, colour, background and motion direction: share of videos that show what the prompt asks for, as the oracle
reads it from the pixels. Sharpness: 1 for a clean rendering. Oracle score: those four hits times the closeness to a
clean rendering; it is never trained on."""
_GAIN_LEGEND = "Gains are paired by video (same prompt, same noise), with the 95 % interval of a bootstrap over videos."


def markdown(
    rows: Iterable[Row],
    summaries: list[Summary],
    comparisons: list[Comparison] | None = None,
    facts: Mapping[str, object] | None = None,
    *,
    level: int = 1,
) -> str:
    """The evaluation as a Markdown page: one table for each number of steps, gains below it, a legend at the end.

    Args:
        rows: the videos; tells which columns are one and the same measurement.
        summaries: of ``rows``.
        comparisons: of each tuned model with the base.
        facts: what the reader must know of the run (seed, guidance, hardware, ...), shown at the top.
        level: of the page's heading.
    """
    columns = shown_columns(summaries)
    lines = [f"{'#' * level} Evaluation", ""]
    if facts:
        lines += [*(f"- {_cell(key)}: {_cell(value)}" for key, value in facts.items()), ""]
    for steps in dict.fromkeys(s.steps for s in summaries):
        here = [s for s in summaries if s.steps == steps]
        best = _best(here, columns)
        lines += [f"{'#' * level}# {steps} DDIM steps", ""]
        lines.append("| " + " | ".join(["Prompts", "Model", "Videos", *(c.title for c in columns)]) + " |")
        lines.append("| " + " | ".join(["---", "---", *["---:"] * (1 + len(columns))]) + " |")
        for summary in _by_set(here):
            values = [f"**{t}**" if (id(summary), c.metric) in best else t for c, t in _texts(summary, columns)]
            named = [_cell(_set_title(summary.set)), _cell(summary.model), str(summary.count)]
            lines.append("| " + " | ".join([*named, *values]) + " |")
        lines.append("")
        notes = [*gain_lines(comparisons or [], steps), *_broken_lines(here)]
        lines += [*(f"- {_cell(note)}" for note in notes), ""] if notes else []
    lines += [*_legend(list(rows), columns, bool(comparisons)), ""]
    return "\n".join(lines)


def render_table(summaries: list[Summary], comparisons: list[Comparison] | None = None, *, steps: int) -> Table:
    """The table of one number of DDIM steps for the console, gains below it; needs about 120 columns.

    Raises:
        ValueError: nothing was evaluated with ``steps``.
    """
    here = [s for s in summaries if s.steps == steps]
    if not here:
        evaluated = ", ".join(str(s) for s in dict.fromkeys(s.steps for s in summaries)) or "none"
        raise ValueError(f"render_table: no summary has steps = {steps}; there are: {evaluated}")
    columns = [replace(c, spread=c.metric == "reward") for c in shown_columns(here) if c.short]  # to fit 120 columns
    notes = [*gain_lines(comparisons or [], steps), *_broken_lines(here)]
    table = Table(
        title=f"Evaluation, {steps} DDIM steps", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        caption=escape("\n".join(notes)) or None, caption_justify="left", caption_style="",
        padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    for heading in ("prompts", "model"):
        table.add_column(heading, no_wrap=True)
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    best, before = _best(here, columns), None
    for summary in _by_set(here):
        if before is not None and before != summary.set:
            table.add_section()
        values = [f"[bold]{t}[/bold]" if (id(summary), c.metric) in best else t for c, t in _texts(summary, columns)]
        table.add_row("" if before == summary.set else _set_title(summary.set), escape(summary.model), *values)
        before = summary.set
    return table


def csv_text(summaries: list[Summary]) -> str:
    """One line for each (model, set, steps), with mean, std and count of every metric; empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f"{m}_{part}" for m in METRICS for part in ("mean", "std", "used")]
    writer.writerow(["model", "set", "steps", "videos", "broken", *names])
    for s in summaries:
        numbers = [n for m in METRICS for n in (_empty(s.mean[m]), _empty(s.std[m]), s.used[m])]
        writer.writerow([s.model, s.set, s.steps, s.count, s.broken, *numbers])
    return out.getvalue()


def json_text(
    summaries: list[Summary], comparisons: list[Comparison] | None = None, facts: Mapping[str, object] | None = None
) -> str:
    """``{"facts", "summaries", "comparisons"}`` as strict JSON, null where there is no number."""
    content = {
        "facts": {key: str(value) for key, value in (facts or {}).items()},
        "summaries": [asdict(s) for s in summaries],
        "comparisons": [asdict(c) for c in comparisons or []],
    }
    return json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def rows_table(rows: Iterable[Row]) -> pa.Table:
    """All videos, one a row, without their frames; null where there is no number."""
    rows = list(rows)
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(f.name, kinds[f.type]) for f in fields(Row) if f.type in kinds])
    columns = [pa.array([_without_nan(getattr(row, f.name)) for row in rows], f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def write_results(
    folder: str | Path, rows: Iterable[Row], *, base: str | None = None, facts: Mapping[str, object] | None = None
) -> list[Path]:
    """Writes ``evaluation.md``, ``.csv``, ``.json`` and ``.parquet``, each whole or not at all.

    Args:
        folder: made if it is missing.
        rows: videos of any number of models.
        base: name of the model that the others are compared with; default: the first, when there are several.
        facts: see ``markdown``.

    Returns:
        The four paths.

    Raises:
        ValueError: no rows, or no model is called ``base``; see also ``compare``.
    """
    rows = list(rows)
    summaries, comparisons = summarise(rows), compare_all(rows, base)
    sink = io.BytesIO()
    parquet.write_table(rows_table(rows), sink)
    contents = {
        "evaluation.md": markdown(rows, summaries, comparisons, facts).encode(),
        "evaluation.csv": csv_text(summaries).encode(),
        "evaluation.json": json_text(summaries, comparisons, facts).encode(),
        "evaluation.parquet": sink.getvalue(),
    }
    for name, data in contents.items():
        write_whole(Path(folder) / name, data)
    return [Path(folder) / name for name in contents]


def compare_all(rows: Iterable[Row], base: str | None = None) -> list[Comparison]:
    """Every other model compared with ``base`` (default: the first model); see ``rlvid.evaluate.evaluate.compare``."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    if not by_model:
        raise ValueError("compare_all: no rows; evaluate at least one model")
    base = next(iter(by_model)) if base is None else base
    if base not in by_model:
        raise ValueError(f"compare_all: base = {base!r} was not evaluated; models: {', '.join(by_model)}")
    return [c for model, group in by_model.items() if model != base for c in compare(by_model[base], group)]


def shown_columns(summaries: list[Summary]) -> list[Column]:
    """The columns for which any model has a number."""
    return [c for c in COLUMNS if any(s.used[c.metric] for s in summaries)]


def gain_lines(comparisons: Iterable[Comparison], steps: int) -> list[str]:
    """One line for each tuned model and prompt set: ``in domain: reward +0.123 [0.110, 0.135] (1.3 base std); ...``."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for c in comparisons:
        if c.steps == steps and c.metric in _GAINS and c.pairs:
            interval = f" [{c.low:.3f}, {c.high:.3f}]" if math.isfinite(c.low) else ""
            spread = f" ({c.in_base_std:.1f} base std)" if math.isfinite(c.in_base_std) else ""
            text = f"{_GAINS[c.metric]} {c.difference:+.3f}{interval}{spread}"
            lines.setdefault((c.set, c.base, c.tuned), []).append(text.replace("-0.000", "+0.000"))
    return [f"{_set_title(s)}, {tuned} over {base}: " + "; ".join(t) for (s, base, tuned), t in lines.items()]


def _broken_lines(summaries: list[Summary]) -> list[str]:
    return [
        f"{_set_title(s.set)}, {s.model}: {s.broken} of {s.count} videos have no finite reward and are left out"
        for s in summaries
        if s.broken
    ]


def _legend(rows: list[Row], columns: list[Column], gains: bool) -> list[str]:
    lines = [_LEGEND]
    pairs = [(row.clipsim, row.held_out) for row in rows if math.isfinite(row.held_out)]
    if pairs and all(math.isclose(a, b, abs_tol=1e-6) for a, b in pairs):
        lines.append(
            "CLIPSIM is measured with the held-out reward's own model here: the two columns are one measurement."
        )
    if any(c.metric.startswith("oracle_") for c in columns):
        lines.append(_ORACLE_LEGEND)
    if gains:
        lines.append(_GAIN_LEGEND)
    return ["\n\n".join(lines)]


def _by_set(summaries: list[Summary]) -> list[Summary]:
    order = list(dict.fromkeys(s.set for s in summaries))
    return sorted(summaries, key=lambda s: order.index(s.set))


def _texts(summary: Summary, columns: list[Column]) -> list[tuple[Column, str]]:
    return [(c, _text(summary, c)) for c in columns]


def _text(summary: Summary, column: Column) -> str:
    mean, std = summary.mean[column.metric], summary.std[column.metric]
    if not math.isfinite(mean):
        return "–"
    if column.percent:
        return f"{100 * mean:.0f} %"
    return f"{mean:.3f} ± {std:.3f}" if column.spread and math.isfinite(std) else f"{mean:.3f}"


def _best(summaries: list[Summary], columns: list[Column]) -> set[tuple[int, str]]:
    """(id of summary, metric) of the cells that are best of their set, as far as the shown digits tell."""
    best = set()
    for name in dict.fromkeys(s.set for s in summaries):
        group = [s for s in summaries if s.set == name]
        for column in columns:
            digits = 2 if column.percent else 3
            means = {id(s): round(s.mean[column.metric], digits) for s in group if s.used[column.metric]}
            if column.ranked and len(set(means.values())) > 1:
                best |= {(key, column.metric) for key, value in means.items() if value == max(means.values())}
    return best


def _set_title(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _empty(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def _without_nan(value: object) -> object:
    """The same structure with None for every float that is not finite."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
