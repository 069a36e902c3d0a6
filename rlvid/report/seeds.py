"""Runs of several seeds as one row: the paper's tables, and every two rows against each other."""

import math
from dataclasses import dataclass

from rlvid.evaluate.results.pairwise import MAX_PAIRWISE_ROWS, pairwise
from rlvid.evaluate.results.read import EvaluationData
from rlvid.evaluate.results.rows import METRICS, Row, pooled
from rlvid.evaluate.tables.groups import pairwise_grids, pairwise_legend
from rlvid.evaluate.tables.paper import GAINED, LAYOUTS, paper_table
from rlvid.evaluate.tables.table import Grid
from rlvid.metric_names import REWARD_PREFIX
from rlvid.report.inputs import ReportInputs


@dataclass(frozen=True)
class Table:
    """A table and what stands above and below it."""

    heading: str
    grid: Grid
    legend: str


def over_seeds(inputs: ReportInputs) -> list[Table]:
    """The tables; none where no two models differ in seed alone."""
    groups, base = inputs.seeds, inputs.evaluation.base.name
    if not groups:
        return []
    rows, tables = rows_of(inputs.evaluation), []
    for name, layout in LAYOUTS.items():
        table = paper_table(name, rows, base, groups)
        what = "All prompts" if layout.pooled else "Reward of each prompt set"
        notes = "".join(f" {note}." for note in table.notes(groups))
        tables.append(Table(what, table.grid(), f"{layout.caption} A row has the videos of all seeds.{notes}"))
        tables.append(Table(f"{what}: over the base", table.gain_grid(), GAINED))
    if len(groups) < MAX_PAIRWISE_ROWS:
        for steps, grid in pairwise_grids(pairwise(pooled(rows), groups, base)).items():
            tables.append(Table(f"Each against each, D = {steps}", grid, pairwise_legend(groups)))
    return tables


def rows_of(evaluation: EvaluationData) -> list[Row]:
    """The scores of all videos; NaN for metrics that the evaluation lacks."""
    further = [metric for metric in evaluation.about.metrics if metric.startswith(REWARD_PREFIX)]
    return [
        Row(
            name, case.set, case.steps, case.index, evaluation.prompt(case), copy=case.copy,
            extra={metric: scores[metric] for metric in further},
            **{metric: scores.get(metric, math.nan) for metric in METRICS},
        )
        for (name, case), scores in evaluation.scores.items()
    ]  # fmt: skip
