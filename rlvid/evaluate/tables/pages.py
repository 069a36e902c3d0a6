"""Evaluation results as tables: Markdown, CSV, JSON, LaTeX, Parquet, and on the console."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import fill

import pyarrow as pa
from pyarrow import parquet
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlvid.escape import csv_text, markdown_text
from rlvid.evaluate.results.rows import METRICS, Row, rows_table
from rlvid.evaluate.results.summary import Comparison, Summary, compare_all, comparisons_table, summarise
from rlvid.evaluate.tables.table import Cell, Grid, json_text, latex_page, marked
from rlvid.files import write_atomic
from rlvid.metric_names import KNOWN, NONE, REWARD_PREFIX, Metric, metric_of, set_title

_GAINS = ("reward", "held_out", "oracle_score")
"""Metrics whose gains stand below a table, beside further rewards."""
_LEAST_FIRST = (
    "clipsim", "oracle_sharpness", "oracle_background", "oracle_colour", "oracle_motion", "oracle_subject",
    "consistency", "motion",
)  # fmt: skip
"""Metrics that a narrow console does without, in this order."""
_GAIN_LEGEND = (
    "Gains are paired by video (same prompt, same noise), with the 95 % interval of a bootstrap over prompts."
)


def markdown(
    rows: Iterable[Row],
    summaries: list[Summary],
    comparisons: list[Comparison] | None = None,
    facts: Mapping[str, object] | None = None,
    *,
    level: int = 1,
) -> str:
    """Writes the evaluation in Markdown: one table for each number of steps, gains below it, a legend at the end.

    Args:
        rows: the videos; tells which columns are one and the same measurement.
        summaries: of ``rows``.
        comparisons: of each tuned model with the base.
        facts: what the reader must know of the run (seed, guidance, hardware, ...), shown at the top.
        level: of the page's heading.
    """
    metrics = shown_metrics(summaries)
    lines = [f"{'#' * level} Evaluation", ""]
    if facts:
        lines += [*(f"- {markdown_text(f'{key}: {value}')}" for key, value in facts.items()), ""]
    for steps in dict.fromkeys(s.steps for s in summaries):
        here = [s for s in summaries if s.steps == steps]
        lines += [f"{'#' * level}# {steps} sampling steps", "", _grid(here, metrics).markdown(), ""]
        notes = [*gain_lines(comparisons or [], steps), *_broken_lines(here)]
        lines += [*(f"- {markdown_text(note)}" for note in notes), ""] if notes else []
    lines += [_legend(list(rows), metrics, bool(comparisons)), ""]
    return "\n".join(lines)


def shown_metrics(summaries: list[Summary]) -> list[Metric]:
    """Returns the metrics for which any model has a number; further rewards follow the run's two."""
    keys = dict.fromkeys([*KNOWN, *(key for s in summaries for key in s.mean)])
    extra = [key for key in keys if key.startswith(REWARD_PREFIX)]
    ordered = ["reward", "held_out", *extra, *(key for key in keys if key not in ("reward", "held_out", *extra))]
    return [m for m in map(metric_of, ordered) if m.tabled and any(s.used.get(m.key) for s in summaries)]


def score_rows(summaries: Sequence[Summary], metrics: Sequence[Metric]) -> list[tuple[Summary, list[Cell]]]:
    """Returns each summary of one number of steps, set by set, with its row's cells; the best of a set are bold."""
    rows = []
    for name in dict.fromkeys(s.set for s in summaries):
        here = [s for s in summaries if s.set == name]
        best = {m.key: m.best({s.model: s.mean[m.key] for s in here}) for m in metrics}
        for s in here:
            texts = {m.key: m.mean(s.mean[m.key], s.std[m.key] if m.spread else math.nan) for m in metrics}
            rows.append((s, [Cell(text, s.model in best[key]) for key, text in texts.items()]))
    return rows


def _grid(summaries: list[Summary], metrics: list[Metric]) -> Grid:
    """Returns the table of one number of steps."""
    rows: list[list[Cell | str]] = [
        [set_title(s.set), s.model, str(s.count), *cells] for s, cells in score_rows(summaries, metrics)
    ]
    return Grid(["Prompts", "Model", "Videos", *(m.name for m in metrics)], rows, words=2)


def latex(summaries: list[Summary], comparisons: list[Comparison] | None = None) -> str:
    """Writes LaTeX tables (booktabs): for each number of steps the scores, and the gains over the base."""
    metrics, parts = shown_metrics(summaries), []
    for steps in dict.fromkeys(s.steps for s in summaries):
        here = [s for s in summaries if s.steps == steps]
        parts.append(
            _grid(here, metrics).latex(f"Scores with {steps} sampling steps: mean ± standard deviation over videos.")
        )
        gained = [c for c in comparisons or [] if c.steps == steps and c.pairs]
        for name in dict.fromkeys(c.set for c in gained):
            caption = (
                f"Difference to the base with {steps} sampling steps, {set_title(name)}; 95 % interval by a bootstrap."
            )
            parts.append(_gain_grid([c for c in gained if c.set == name], metrics).latex(caption))
    return latex_page(parts)


def _gain_grid(comparisons: list[Comparison], metrics: list[Metric]) -> Grid:
    """Returns the gains of one prompt set: a row per metric, a column per model; shares are fractions of 1."""
    models = list(dict.fromkeys(c.tuned for c in comparisons))
    found = {(c.metric, c.tuned): c for c in comparisons}
    gains = {
        key: replace(metric_of(key[0]), unit="", digits=3).gain(c.difference, c.low, c.high) for key, c in found.items()
    }
    compared = {c.metric for c in comparisons}
    rows = [
        [metric.name, *(gains.get((metric.key, model), NONE) for model in models)]
        for metric in metrics
        if metric.key in compared
    ]
    return Grid(["Metric", *models], rows)


def render_table(
    summaries: list[Summary], comparisons: list[Comparison] | None = None, *, steps: int, width: int = 120
) -> Table:
    """Returns the table of one number of sampling steps for the console, gains below it.

    What does not fit into ``width`` columns is left out: the reward's deviation first, then metrics, which are named.

    Raises:
        ValueError: nothing was evaluated with ``steps``.
    """
    here = [s for s in summaries if s.steps == steps]
    if not here:
        evaluated = ", ".join(str(s) for s in dict.fromkeys(s.steps for s in summaries)) or "none"
        raise ValueError(f"render_table: no summary has steps = {steps}; there are: {evaluated}")
    metrics = [replace(m, spread=m.key == "reward") for m in shown_metrics(here) if m.short]
    notes = [*gain_lines(comparisons or [], steps), *_broken_lines(here)]
    table = _console_table(here, metrics, notes)
    if _width(table) > width:
        metrics = [replace(m, spread=False) for m in metrics]
        table = _console_table(here, metrics, notes)
    left_out = list[str]()
    for key in _LEAST_FIRST:
        if _width(table) <= width:
            break
        left_out += [m.name for m in metrics if m.key == key]
        metrics = [m for m in metrics if m.key != key]
        told = f"left out for want of width: {', '.join(left_out)}; evaluation.md has them"
        table = _console_table(here, metrics, [told, *notes])
    return table


def _width(table: Table) -> int:
    """Returns the columns of the console that a table needs, without the lines below it."""
    return Console(width=1000).measure(table).maximum


def _console_table(here: list[Summary], metrics: list[Metric], notes: list[str]) -> Table:
    """Returns a table for the console, of models evaluated with the same number of sampling steps."""
    steps = here[0].steps
    table = Table(
        title=f"Evaluation, {steps} sampling steps", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        caption=escape("\n".join(notes)) or None, caption_justify="left", caption_style="",
        padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    for heading in ("prompts", "model"):
        table.add_column(heading, no_wrap=True)
    for metric in metrics:
        table.add_column(metric.short, justify="right", no_wrap=True)
    before = None
    for summary, cells in score_rows(here, metrics):
        if before is not None and before != summary.set:
            table.add_section()
        values = marked(cells, "[bold]{}[/bold]", escape)
        table.add_row("" if before == summary.set else escape(set_title(summary.set)), escape(summary.model), *values)
        before = summary.set
    return table


def summaries_csv(summaries: list[Summary]) -> str:
    """Returns a line per (model, set, steps), with mean, std and count of every metric; empty where there is none."""
    metrics = list(summaries[0].mean) if summaries else METRICS
    names = [f"{m}_{part}" for m in metrics for part in ("mean", "std", "used")]
    lines: list[list[object]] = [["model", "set", "steps", "videos", "broken", *names]]
    for s in summaries:
        numbers = [n for m in metrics for n in (s.mean[m], s.std[m], s.used[m])]
        lines.append([s.model, s.set, s.steps, s.count, s.broken, *numbers])
    return csv_text(lines)


def write_results(
    folder: str | Path, rows: Iterable[Row], *, base: str | None = None, facts: Mapping[str, object] | None = None
) -> list[Path]:
    """Writes ``evaluation.md``, ``.csv``, ``.json``, ``.tex`` and ``.parquet``, ``comparison.parquet`` and ``.csv``.

    Each is written atomically.

    Args:
        folder: made if it is missing.
        rows: videos of any number of models.
        base: name of the model that the others are compared with; default: the first, when there are several.
        facts: see ``markdown``.

    Returns:
        Their paths.

    Raises:
        ValueError: no rows, or no model is called ``base``; see also ``compare``.
    """
    rows = list(rows)
    summaries, comparisons = summarise(rows), compare_all(rows, base)
    contents = {
        "evaluation.md": markdown(rows, summaries, comparisons, facts).encode(),
        "evaluation.csv": summaries_csv(summaries).encode(),
        "evaluation.json": json_text(
            {
                "facts": {key: str(value) for key, value in (facts or {}).items()},
                "summaries": list(map(asdict, summaries)),
                "comparisons": list(map(asdict, comparisons)),
            }
        ).encode(),
        "evaluation.tex": latex(summaries, comparisons).encode(),
        "evaluation.parquet": _parquet(rows_table(rows)),
        "comparison.parquet": _parquet(comparisons_table(comparisons)),
        "comparison.csv": _comparisons_csv(comparisons).encode(),
    }
    for name, data in contents.items():
        write_atomic(Path(folder) / name, data)
    return [Path(folder) / name for name in contents]


def _comparisons_csv(comparisons: list[Comparison]) -> str:
    """Returns the rows of ``comparison.parquet``, a line each."""
    table = comparisons_table(comparisons)
    return csv_text([table.schema.names, *(row.values() for row in table.to_pylist())])


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def gain_lines(comparisons: Iterable[Comparison], steps: int) -> list[str]:
    """Returns a line per tuned model and set: ``in domain: reward +0.123 [0.110, 0.135] (1.3 base std); ...``."""
    comparisons = list(comparisons)
    lines: dict[tuple[str, str, str], list[str]] = {}
    for c in comparisons:
        metric = metric_of(c.metric)
        if c.steps == steps and c.pairs and (c.metric in _GAINS or c.metric.startswith(REWARD_PREFIX)):
            spread = f" ({c.in_base_std:.1f} base std)".replace("-0.0 ", "0.0 ") if math.isfinite(c.in_base_std) else ""
            lines.setdefault((c.set, c.base, c.tuned), []).append(
                f"{metric.spoken} {metric.gain(c.difference, c.low, c.high)}{spread}"
            )
    return [f"{set_title(s)}, {tuned} over {base}: " + "; ".join(t) for (s, base, tuned), t in lines.items()]


def _broken_lines(summaries: list[Summary]) -> list[str]:
    return [
        f"{set_title(s.set)}, {s.model}: {s.broken} of {s.count} videos have no finite reward and are left out"
        for s in summaries
        if s.broken
    ]


def _legend(rows: list[Row], metrics: list[Metric], gains: bool) -> str:
    shown, paragraphs = {m.key for m in metrics}, {"": list[str](), "diversity": [], "oracle": []}
    for metric in KNOWN.values():
        kind = metric.key.partition("_")[0]
        if kind not in paragraphs or metric.key in shown:
            paragraphs.get(kind, paragraphs[""]).append(metric.meaning)
    pairs = [(row.clipsim, row.held_out) for row in rows if math.isfinite(row.held_out)]
    same = "CLIPSIM is measured with the held-out reward's own model here: the two columns are one measurement."
    alike = bool(pairs) and all(math.isclose(a, b, abs_tol=1e-6) for a, b in pairs)
    first, *others = (fill(" ".join(filter(None, each)), 120) for each in paragraphs.values())
    return "\n\n".join(filter(None, [first, same if alike else "", *others, _GAIN_LEGEND if gains else ""]))
