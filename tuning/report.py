"""The report of a sweep: a table of all trials, the Pareto front, pictures, the best settings as a run, findings."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlvid.escape import csv_text, markdown_text, one_line
from rlvid.evaluate.results.rows import METRICS as ALL_METRICS
from rlvid.evaluate.tables.table import Grid
from rlvid.files import write_atomic
from rlvid.metric_names import metric_of
from tuning.comparison import by_seed, differences, draw, table
from tuning.description import COST, Sweep
from tuning.hparams import write_hparams
from tuning.journal import BASE, Journal, read_scores
from tuning.outcomes import Outcome, collect, columns, pareto, ranked
from tuning.pictures import heat_map, parallel_coordinates
from tuning.space import label, shown
from tuning.words import found, next_steps

OVER_SEEDS = "± is the distance to the ends of Student's 95 % interval. Bold: above the base by more than that.\n\n"
BETWEEN = (
    "\nDifferences; ± is the distance to the ends of Welch's 95 % interval over seeds. Bold: 0 lies outside. "
    "If settings do not differ, one of twenty differences is bold all the same.\n\n"
)


def write_report(sweep: Sweep, journal: Journal) -> Path | None:
    """Writes everything into ``report/`` and the HParams beside it; None where nothing was measured yet."""
    outcomes, folder = collect(sweep, journal), sweep.folder / "report"
    order = ranked(sweep, outcomes)
    if not order:
        return None
    base = read_scores(sweep.folder / BASE)
    parallel_coordinates(folder / "parallel.png", sweep, outcomes, order[0])
    pictures = ["parallel.png"]
    if heat_map(folder / "heatmap.png", sweep, outcomes, base):
        pictures.append("heatmap.png")
    over_seeds = ""
    if base is not None and "seed" in sweep.space and (seeds := by_seed(sweep, outcomes)):
        over_seeds = OVER_SEEDS + table(base, seeds)
        if between := differences(seeds):
            over_seeds += BETWEEN + between
        write_atomic(folder / "comparison.md", over_seeds.encode())
        draw(base, seeds, folder / "comparison.png")
        pictures.append("comparison.png")
    best = sweep.to_train(order[0].trial.settings, f"{sweep.name}-best")
    first = one_line(f"{order[0].trial.name}, {shown(order[0].trial.settings)}")
    head = (
        f"# The best of {len(outcomes)} trials of the sweep {one_line(sweep.name)} by {sweep.metric}: {first}\n"
        f"# Measured after {order[0].step} {sweep.unit_name}; this run has as many steps as the base.\n"
    )
    dumped = yaml.safe_dump(best.model_dump(mode="json"), sort_keys=False)
    write_atomic(folder / "best.yaml", (head + dumped).encode())
    write_atomic(folder / "results.csv", results_csv(sweep, outcomes).encode())
    write_atomic(folder / "results.md", (results_table(sweep, outcomes, base) + "\n").encode())
    write_atomic(folder / "report.md", page(sweep, outcomes, order, base, over_seeds, pictures).encode())
    write_hparams(sweep, outcomes)
    return folder


def results_csv(sweep: Sweep, outcomes: list[Outcome]) -> str:
    """Returns a line a trial: its settings, how far it came and how it ended, and every metric there."""
    means = [scores["mean"] for one in outcomes for scores in one.scores.values()]
    names = [*ALL_METRICS, *dict.fromkeys(name for mean in means for name in mean if name not in ALL_METRICS)]
    lines: list[list[object]] = [["trial", *sweep.space, "step", "end", "pareto", "seconds", "videos", *names]]
    front = {one.trial.number for one in pareto(outcomes, sweep.objectives)}
    for one in outcomes:
        scores = one.scores.get(one.step or -1, {})
        measured = [scores.get("mean", {}).get(metric, "") for metric in names]
        lines.append([
            one.trial.name, *(one.trial.settings[key] for key in sweep.space), one.step or 0, one.trial.end or "open",
            int(one.trial.number in front), scores.get(COST, ""), scores.get("videos", ""), *measured,
        ])  # fmt: skip
    return csv_text(lines)


def results_table(sweep: Sweep, outcomes: list[Outcome], base: dict[str, Any] | None) -> str:
    """Returns the same in Markdown, with the objectives alone; furthest first, then by the metric."""

    def key(one: Outcome) -> tuple[int, float]:
        value = one.value(sweep.metric)
        return -(one.step or 0), -value if math.isfinite(value) else math.inf

    first = []
    if base is not None:
        known = {COST: 0.0, **base["mean"]}
        values = [metric_of(name).number(known[name]) for name in columns(sweep, outcomes)]
        first = [["base", *["" for _ in sweep.space], "0", "", *values]]
    return _grid(sweep, sorted(outcomes, key=key), columns(sweep, outcomes), first).markdown()


def _grid(sweep: Sweep, outcomes: list[Outcome], names: list[str], first: Sequence[list[str]] = ()) -> Grid:
    """Returns a row for each trial, below the rows of ``first``."""
    rung = "Steps" if sweep.unit == "steps" else f"Budget ({sweep.unit_name})"
    heads = ["Trial", *sweep.space, rung, "End", *(metric_of(name).name for name in names)]
    rows = [
        [
            one.trial.name,
            *(label(one.trial.settings[key]) for key in sweep.space),
            str(one.step or 0),
            one.trial.end or "open",
            *(metric_of(name).number(one.value(name)) for name in names),
        ]
        for one in outcomes
    ]
    return Grid(heads, [*first, *rows], words=3 + len(sweep.space))


def page(
    sweep: Sweep, outcomes: list[Outcome], order: list[Outcome], base: dict[str, Any] | None, over_seeds: str,
    pictures: list[str],
) -> str:  # fmt: skip
    """Returns the whole report in Markdown."""
    front = pareto(outcomes, sweep.objectives)
    names = columns(sweep, outcomes)
    how = sweep.evaluation
    prompts = markdown_text(Path(how.prompts).stem)
    lines = [
        f"# Sweep {markdown_text(sweep.name)}",
        "",
        "## What was found",
        "",
        *found(sweep, outcomes, order, base),
        "",
    ]
    if over_seeds:
        lines += [
            "## Over seeds", "",
            f"After {sweep.rungs[-1]} {sweep.unit_name}, means over the trials that differ in their seed alone.", "",
            over_seeds,
        ]  # fmt: skip
    lines += ["## What next", "", *next_steps(sweep, order), ""]
    lines += [
        "## All trials", "",
        f"Each was measured by the same {how.videos} prompts ({prompts}) from the same noise (seed {how.seed}), all "
        "frames alike, with the base description's rewards, those of its guard, its sampling and guidance: the "
        "settings that vary do not touch the scale. Least gain: over the base model, in the held-out reward that gains "
        "least, in standard deviations of the base's prompts. Do not compare trials that were measured at different "
        "budgets. Seconds are those of training steps, and trials that ran side by side slowed each other down.", "",
        results_table(sweep, outcomes, base), "",
        "## Pareto front", "",
        f"No other trial is at least as good in all of {', '.join(metric_of(n).spoken for n in sweep.objectives)} and "
        f"better in one (seconds: the fewer the better): {len(front)} of {len(outcomes)}. The more objectives, the "
        "more trials are on the front; consistency is to be read beside motion, for a frozen clip has all of it.", "",
        _grid(sweep, front, names).markdown(), "",
    ]  # fmt: skip
    lines += [line for name in pictures for line in (f"![{name.removesuffix('.png')}]({name})", "")]
    return "\n".join(lines)
