"""Evaluation results as tables: Markdown, CSV, JSON, LaTeX, Parquet, and on the console."""

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from rich import box
from rich.markup import escape
from rich.table import Table

from rlvid.escape import csv_text, markdown_text
from rlvid.evaluate.results.rows import METRICS, REWARD_PREFIX, Row, rows_table
from rlvid.evaluate.results.summary import Comparison, Summary, compare_all, comparisons_table, summarise
from rlvid.evaluate.tables.names import Column, best_of, gain_text, set_title, shown_columns, text_of
from rlvid.evaluate.tables.table import Cell, Grid, latex_page
from rlvid.files import write_whole

_GAINS = {"reward": "reward", "held_out": "held-out reward", "oracle_score": "oracle score"}

_LEGEND = """\
Reward and held-out reward: mean ± standard deviation over videos of the mean score of all frames; only the first was
trained on. CLIPSIM: mean over frames of the cosine of image and prompt. Temporal consistency: mean cosine of
consecutive frames; of all pairs of frames (TGVE); as VBench has it, half with the frame before and half with the first,
negative ones as 0. Flickering: VBench's, 1 less the mean absolute difference of consecutive 8-bit frames. Motion: mean
absolute difference of consecutive frames in pixel values of [0, 1]; a frozen video has a consistency and a flickering
of 1 and a motion of 0, so read them together."""
_DIVERSITY_LEGEND = "Diversity: mean CLIP distance of a video to the other videos of its prompt."
_ORACLE_LEGEND = """\
Subject, colour, background and motion direction: share of videos that show what the prompt asks for, as the oracle
reads it from the pixels. Sharpness: 1 for a clean rendering. Oracle score: those four hits times the closeness to a
clean rendering; it is never trained on."""
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
        lines += [*(f"- {markdown_text(f'{key}: {value}')}" for key, value in facts.items()), ""]
    for steps in dict.fromkeys(s.steps for s in summaries):
        here = [s for s in summaries if s.steps == steps]
        lines += [f"{'#' * level}# {steps} DDIM steps", "", _grid(here, columns).markdown(), ""]
        notes = [*gain_lines(comparisons or [], steps), *_broken_lines(here)]
        lines += [*(f"- {markdown_text(note)}" for note in notes), ""] if notes else []
    lines += [*_legend(list(rows), columns, bool(comparisons)), ""]
    return "\n".join(lines)


def _grid(summaries: list[Summary], columns: list[Column]) -> Grid:
    """The table of one number of steps."""
    best = best_of(summaries, columns)
    rows = [
        [
            *(Cell(text) for text in (set_title(s.set), s.model, str(s.count))),
            *(Cell(text, (id(s), column.metric) in best) for column, text in _texts(s, columns)),
        ]
        for s in _by_set(summaries)
    ]
    return Grid(["Prompts", "Model", "Videos", *(c.title for c in columns)], rows, words=2)


def latex(summaries: list[Summary], comparisons: list[Comparison] | None = None) -> str:
    """A page of LaTeX tables (booktabs): for each number of steps the scores, and what was gained over the base."""
    columns, parts = shown_columns(summaries), []
    for steps in dict.fromkeys(s.steps for s in summaries):
        here = [s for s in summaries if s.steps == steps]
        parts.append(
            _grid(here, columns).latex(f"Scores with {steps} DDIM steps: mean ± standard deviation over videos.")
        )
        gained = [c for c in comparisons or [] if c.steps == steps and c.pairs]
        for name in dict.fromkeys(c.set for c in gained):
            caption = (
                f"Difference to the base with {steps} DDIM steps, {set_title(name)}; 95 % interval by a bootstrap."
            )
            parts.append(_gain_grid([c for c in gained if c.set == name], columns).latex(caption))
    return latex_page(parts)


def _gain_grid(comparisons: list[Comparison], columns: list[Column]) -> Grid:
    """What was gained with one prompt set: a row a metric, a column a model."""
    models = list(dict.fromkeys(c.tuned for c in comparisons))
    texts = {(c.metric, c.tuned): gain_text(c.difference, c.low, c.high) for c in comparisons}
    metrics = {c.metric for c in comparisons}
    rows = [
        [Cell(column.title), *(Cell(texts.get((column.metric, model), "–")) for model in models)]
        for column in columns
        if column.metric in metrics
    ]
    return Grid(["Metric", *models], rows)


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
    best, before = best_of(here, columns), None
    for summary in _by_set(here):
        if before is not None and before != summary.set:
            table.add_section()
        values = [f"[bold]{t}[/bold]" if (id(summary), c.metric) in best else t for c, t in _texts(summary, columns)]
        table.add_row("" if before == summary.set else escape(set_title(summary.set)), escape(summary.model), *values)
        before = summary.set
    return table


def summaries_csv(summaries: list[Summary]) -> str:
    """One line for each (model, set, steps), with mean, std and count of every metric; empty where there is none."""
    metrics = list(summaries[0].mean) if summaries else METRICS
    names = [f"{m}_{part}" for m in metrics for part in ("mean", "std", "used")]
    lines: list[list[object]] = [["model", "set", "steps", "videos", "broken", *names]]
    for s in summaries:
        numbers = [n for m in metrics for n in (s.mean[m], s.std[m], s.used[m])]
        lines.append([s.model, s.set, s.steps, s.count, s.broken, *numbers])
    return csv_text(lines)


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


def write_results(
    folder: str | Path, rows: Iterable[Row], *, base: str | None = None, facts: Mapping[str, object] | None = None
) -> list[Path]:
    """Writes ``evaluation.md``, ``.csv``, ``.json``, ``.tex`` and ``.parquet``, ``comparison.parquet`` and ``.csv``.

    Each is written whole or not at all.

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
        "evaluation.json": json_text(summaries, comparisons, facts).encode(),
        "evaluation.tex": latex(summaries, comparisons).encode(),
        "evaluation.parquet": _parquet(rows_table(rows)),
        "comparison.parquet": _parquet(comparisons_table(comparisons)),
        "comparison.csv": _comparisons_csv(comparisons).encode(),
    }
    for name, data in contents.items():
        write_whole(Path(folder) / name, data)
    return [Path(folder) / name for name in contents]


def _comparisons_csv(comparisons: list[Comparison]) -> str:
    """The rows of ``comparison.parquet``, a line each."""
    table = comparisons_table(comparisons)
    return csv_text([table.schema.names, *(row.values() for row in table.to_pylist())])


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def _gains(comparisons: Iterable[Comparison]) -> dict[str, str]:
    """Metrics whose gains are shown, and what sentences call them."""
    extra = [c.metric for c in comparisons if c.metric.startswith(REWARD_PREFIX)]
    return _GAINS | {metric: f"reward {metric.removeprefix(REWARD_PREFIX)}" for metric in extra}


def gain_lines(comparisons: Iterable[Comparison], steps: int) -> list[str]:
    """One line for each tuned model and prompt set: ``in domain: reward +0.123 [0.110, 0.135] (1.3 base std); ...``."""
    comparisons = list(comparisons)
    lines: dict[tuple[str, str, str], list[str]] = {}
    named = _gains(comparisons)
    for c in comparisons:
        if c.steps == steps and c.metric in named and c.pairs:
            spread = f" ({c.in_base_std:.1f} base std)".replace("-0.0 ", "0.0 ") if math.isfinite(c.in_base_std) else ""
            lines.setdefault((c.set, c.base, c.tuned), []).append(
                f"{named[c.metric]} {gain_text(c.difference, c.low, c.high)}{spread}"
            )
    return [f"{set_title(s)}, {tuned} over {base}: " + "; ".join(t) for (s, base, tuned), t in lines.items()]


def _broken_lines(summaries: list[Summary]) -> list[str]:
    return [
        f"{set_title(s.set)}, {s.model}: {s.broken} of {s.count} videos have no finite reward and are left out"
        for s in summaries
        if s.broken
    ]


def _by_set(summaries: list[Summary]) -> list[Summary]:
    order = list(dict.fromkeys(s.set for s in summaries))
    return sorted(summaries, key=lambda s: order.index(s.set))


def _texts(summary: Summary, columns: list[Column]) -> list[tuple[Column, str]]:
    return [(c, text_of(summary, c)) for c in columns]


def _legend(rows: list[Row], columns: list[Column], gains: bool) -> list[str]:
    lines = [_LEGEND]
    pairs = [(row.clipsim, row.held_out) for row in rows if math.isfinite(row.held_out)]
    if pairs and all(math.isclose(a, b, abs_tol=1e-6) for a, b in pairs):
        lines.append(
            "CLIPSIM is measured with the held-out reward's own model here: the two columns are one measurement."
        )
    if any(c.metric == "diversity" for c in columns):
        lines.append(_DIVERSITY_LEGEND)
    if any(c.metric.startswith("oracle_") for c in columns):
        lines.append(_ORACLE_LEGEND)
    if gains:
        lines.append(_GAIN_LEGEND)
    return ["\n\n".join(lines)]


def _without_nan(value: object) -> object:
    """The same structure with None for every float that is not finite."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
