"""Tables over seeds: the paper's tables with a row per method, and pairwise comparisons."""

from rlvid.evaluate.results.pairwise import MAX_PAIRWISE_ROWS, pairwise
from rlvid.evaluate.results.rows import pooled
from rlvid.evaluate.tables.groups import pairwise_grids, pairwise_legend
from rlvid.evaluate.tables.paper import GAINED, LAYOUTS, paper_table
from rlvid.evaluate.tables.table import Section
from rlvid.report.inputs import ReportInputs


def over_seeds(inputs: ReportInputs) -> list[Section]:
    """Returns the tables; none where no two models differ in seed alone."""
    groups, base = inputs.seeds, inputs.evaluation.base.name
    if not groups:
        return []
    rows, tables = inputs.evaluation.rows, []
    for name, layout in LAYOUTS.items():
        table = paper_table(name, rows, base, groups)
        what = "All prompts" if layout.pooled else "Reward of each prompt set"
        notes = "".join(f" {note}." for note in table.notes(groups))
        tables.append(Section(what, table.grid(), f"{layout.caption} A row has the videos of all seeds.{notes}"))
        tables.append(Section(f"{what}: over the base", table.gain_grid(), GAINED))
    if len(groups) < MAX_PAIRWISE_ROWS:
        for steps, grid in pairwise_grids(pairwise(pooled(rows), groups, base)).items():
            tables.append(Section(f"Each against each, D = {steps}", grid, pairwise_legend(groups)))
    return tables
