"""Runs of several seeds as one row: the paper's tables, and every two rows against each other."""

import math
from dataclasses import dataclass

from rlvid.evaluate.grid import Grid
from rlvid.evaluate.layouts import GAINED, LAYOUTS, fill, pooled
from rlvid.evaluate.rows import EXTRA, METRICS, Row
from rlvid.evaluate.versus import MOST, versus, versus_grids, versus_legend
from rlvid.report.evidence import Evidence
from rlvid.report.inputs import Gathered


@dataclass(frozen=True)
class Table:
    """A table and what stands above and below it."""

    heading: str
    grid: Grid
    legend: str


def over_seeds(gathered: Gathered) -> list[Table]:
    """The tables; none where no two models differ in seed alone."""
    groups, base = gathered.seeds, gathered.evidence.base.name
    if not groups:
        return []
    rows, tables = rows_of(gathered.evidence), []
    for name, layout in LAYOUTS.items():
        filled = fill(name, rows, base, groups)
        what = "All prompts" if layout.pooled else "Reward of each prompt set"
        notes = "".join(f" {note}." for note in filled.notes(groups))
        tables.append(Table(what, filled.grid(), f"{layout.caption} A row has the videos of all seeds.{notes}"))
        tables.append(Table(f"{what}: over the base", filled.gain_grid(), GAINED))
    if len(groups) < MOST:
        for steps, grid in versus_grids(versus(pooled(rows), groups, base)).items():
            tables.append(Table(f"Each against each, D = {steps}", grid, versus_legend(groups)))
    return tables


def rows_of(evidence: Evidence) -> list[Row]:
    """The scores of all videos; NaN for metrics that the evaluation lacks."""
    further = [metric for metric in evidence.metrics if metric.startswith(EXTRA)]
    return [
        Row(
            name, case.set, case.steps, case.index, evidence.prompt(case), copy=case.copy,
            extra={metric: scores[metric] for metric in further},
            **{metric: scores.get(metric, math.nan) for metric in METRICS},
        )
        for (name, case), scores in evidence.scores.items()
    ]  # fmt: skip
