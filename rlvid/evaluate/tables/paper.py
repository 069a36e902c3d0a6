"""The paper's tables: a row a model, or a row a method where runs that differ in their seed alone are one.

========  ============================================================================================
layout    cells, for each number of sampling steps D
========  ============================================================================================
table-a1  reward of each prompt set, mean ± standard deviation over videos
table-a2  reward, CLIPSIM and temporal consistency (consecutive frames) of all prompts, and motion
========  ============================================================================================

Motion is not in the paper's; it stands beside consistency because a frozen video is perfectly consistent. Below each
table stands what was gained over the base, with the interval of a paired bootstrap. The best of a column is bold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlvid.escape import csv_text, markdown_text
from rlvid.evaluate.results.rows import Row, pooled
from rlvid.evaluate.results.seeds import SeedResult, seed_results
from rlvid.evaluate.results.summary import Summary, summarise
from rlvid.evaluate.tables.table import Cell, Grid, write_tables
from rlvid.metric_names import NONE, metric_of, set_title


@dataclass(frozen=True)
class Layout:
    """A table of the paper: which metrics, of all prompts at once or of each set; with the deviation or without."""

    metrics: tuple[str, ...]
    pooled: bool
    spread: bool
    caption: str


LAYOUTS = {
    "table-a1": Layout(
        ("reward",), False, True,
        "Reward, mean ± standard deviation over videos, for each prompt set and number of sampling steps D.",
    ),
    "table-a2": Layout(
        ("reward", "clipsim", "consistency", "motion"), True, False,
        "Reward, CLIPSIM, temporal consistency and motion over all prompts, for each number of sampling steps D.",
    ),
}  # fmt: skip
GAINED = (
    "Difference to the base and its 95 % interval by a bootstrap over prompts, paired by prompt and noise, for these "
    "seeds."
)
"""What stands below a table of differences."""

Place = tuple[str, int, str]
"""A prompt set, a number of steps and a metric: a column."""


@dataclass(frozen=True)
class PaperTable:
    """A layout with its numbers: what each row's videos sum up to, and what it gained over the first."""

    layout: Layout
    rows: tuple[str, ...]
    places: tuple[Place, ...]
    summaries: Mapping[tuple[str, str, int], Summary]
    gains: Mapping[tuple[str, Place], SeedResult]

    def mean(self, row: str, place: Place) -> float:
        """Returns a cell's mean; NaN where there is none."""
        summary = self.summaries.get((row, *place[:2]))
        return summary.mean[place[2]] if summary else math.nan

    def std(self, row: str, place: Place) -> float:
        """Returns a cell's standard deviation over videos; NaN where there is none."""
        summary = self.summaries.get((row, *place[:2]))
        return summary.std[place[2]] if summary and self.layout.spread else math.nan

    def grid(self) -> Grid:
        """Returns the table of means."""
        columns = []
        for place in self.places:
            metric, means = metric_of(place[2]), {row: self.mean(row, place) for row in self.rows}
            best = metric.best(means)
            columns.append([Cell(metric.mean(means[row], self.std(row, place)), row in best) for row in self.rows])
        lines = [[Cell(row), *cells] for row, *cells in zip(self.rows, *columns, strict=True)]
        return Grid(["Model", *self._heads()], lines, 1, self._groups())

    def gain_grid(self) -> Grid:
        """Returns the table of differences to the base."""
        lines = [[Cell(row), *(Cell(self._gain(row, place)) for place in self.places)] for row in self.rows[1:]]
        return Grid(["Over the base", *self._heads()], lines, 1, self._groups())

    def _gain(self, row: str, place: Place) -> str:
        gain = self.gains.get((row, place))
        return metric_of(place[2]).gain(gain.difference, gain.low, gain.high) if gain else NONE

    def _heads(self) -> list[str]:
        if not self.layout.pooled:
            return [f"D = {steps}" for _, steps, _ in self.places]
        return [metric_of(key).name for *_, key in self.places]

    def _groups(self) -> list[tuple[str, int]]:
        sets, steps = (list(dict.fromkeys(place[i] for place in self.places)) for i in (0, 1))
        if not self.layout.pooled:
            return [(set_title(str(name)), len(steps)) for name in sets]
        width = len(self.places) // max(1, len(sets) * len(steps))
        return [(f"{set_title(str(name))}, D = {each}", width) for name in sets for each in steps]

    def notes(self, groups: Mapping[str, Sequence[str]]) -> list[str]:
        """Returns a note on each row of several seeds that has seeds without a finite score."""
        return [
            f"{row}: {metric_of(key).name}, {set_title(name)}, D = {steps}: {gain.seeds} of {len(groups[row])} "
            "seeds have a finite score"
            for (row, (name, steps, key)), gain in self.gains.items()
            if row in groups and gain.seeds < len(groups[row])
        ]

    def csv(self) -> str:
        """Returns the same numbers unrounded: a line a row; empty where there is none."""
        parts = ("mean", *(["std"] if self.layout.spread else []), "difference", "low", "high")
        lines: list[list[object]] = [
            ["model", *(f"{s}_d{d}_{metric}_{part}" for s, d, metric in self.places for part in parts)]
        ]
        for row in self.rows:
            values: list[float] = []
            for place in self.places:
                gain = self.gains.get((row, place))
                values += [self.mean(row, place), *([self.std(row, place)] if self.layout.spread else [])]
                values += [getattr(gain, part) if gain else math.nan for part in parts[-3:]]
            lines.append([row, *values])
        return csv_text(lines)


def paper_table(
    name: str, rows: Sequence[Row], base: str, groups: Mapping[str, Sequence[str]] | None = None
) -> PaperTable:
    """Fills a layout with the videos' scores.

    Args:
        name: of the layout.
        rows: of all models.
        base: name of the base model, the first row.
        groups: names of models by the row that they are together; by default each is a row of its own.

    Raises:
        KeyError: there is no such layout.
    """
    layout = LAYOUTS[name]
    here = pooled(rows) if layout.pooled else list(rows)
    models = dict.fromkeys(row.model for row in here)
    shown = {group: list(names) for group, names in (groups or {m: [m] for m in models if m != base}).items()}
    called = {base: base} | {model: group for group, names in shown.items() for model in names}
    summaries = summarise([replace(row, model=called[row.model]) for row in here])
    sets, steps = (list(dict.fromkeys(getattr(row, key) for row in here)) for key in ("set", "steps"))
    metrics = [m for m in layout.metrics if any(s.used[m] for s in summaries)]
    return PaperTable(
        layout,
        (base, *shown),
        tuple((s, d, metric) for s in sets for d in steps for metric in metrics),
        {(s.model, s.set, s.steps): s for s in summaries},
        {(r.group, (r.set, r.steps, r.metric)): r for r in seed_results(here, shown, base, layout.metrics)},
    )


def write_layouts(
    folder: Path, rows: Sequence[Row], base: str, groups: Mapping[str, Sequence[str]] | None = None
) -> list[Path]:
    """Writes ``table-a1`` and ``table-a2``, as ``.md``, ``.csv`` and ``.tex``; see ``paper_table``."""
    paths, seeds = list[Path](), any(len(names) > 1 for names in (groups or {}).values())
    for name, layout in LAYOUTS.items():
        table = paper_table(name, rows, base, groups)
        grids, below = {layout.caption: table.grid()}, list[str]()
        if len(table.rows) > 1:
            grids[GAINED] = table.gain_grid()
            below = ["The best of a column is bold" + ("; a row has the videos of all seeds." if seeds else ".")]
        below += [f"- {markdown_text(note)}" for note in table.notes(groups or {})]
        means = [f"{grid.markdown()}\n\n{caption}" for caption, grid in grids.items()]
        paths += write_tables(
            folder,
            name,
            page="\n\n".join([*means, *below]) + "\n",
            csv=table.csv(),
            latex=[grid.latex(caption) for caption, grid in grids.items()],
        )
    return paths
