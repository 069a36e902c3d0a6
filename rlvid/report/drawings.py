"""The report's drawings: rewards in training, evaluations along runs, and the cost of a gain."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rlvid.evaluate.results.read import EvaluationData
from rlvid.evaluate.results.summary import Summary
from rlvid.metric_names import REWARD_TAGS, Metric, metric_of, set_title
from rlvid.plots.curves import AXES, Drawing, Line, Panel, Point, Series, draw_panels
from rlvid.plots.style import PlotStyle
from rlvid.report.inputs import Group, ReportInputs
from rlvid.report.runs import Run
from rlvid.report.summary import shown_metrics
from rlvid.stats import bootstrap_interval


def reward_curves(groups: Sequence[Group], across: str) -> Drawing | None:
    """Trained and held-out reward of every group; None where no run has scalars.

    Args:
        groups: at least one.
        across: ``steps``, or ``seconds`` of training.
    """
    tags = [tag for tag in REWARD_TAGS if any(run.scalars.get(tag) for group in groups for run in group.runs)]
    if not tags:
        return None

    def series(run: Run, tag: str) -> Series:
        scalars = run.scalars.get(tag, {})
        place = {s: float(s) for s in scalars} if across == "steps" else run.clock
        return _finite((place[s], scalars[s]) for s in sorted(scalars) if s in place)

    panels = [
        Panel(AXES[across], "", REWARD_TAGS[tag].capitalize(), [
            Line(group.label, group.style, _drawn((series(run, tag) for run in group.runs), 1), smooth=True)
            for group in groups
        ])
        for tag in tags
    ]  # fmt: skip
    return draw_panels([panels], 11, 4.1)


def along_runs(inputs: ReportInputs, steps: int, across: str) -> Drawing | None:
    """Draws evaluations of checkpoints along their runs: rewards, motion and the oracle; None where no run has two.

    Args:
        inputs: the models; those with a part of what was learned are left out.
        steps: D of the evaluation.
        across: ``steps``, or ``seconds`` of training.
    """
    evaluation = inputs.evaluation
    groups = [
        group
        for group in inputs.groups()
        if any(len(inputs.line(run)) > 1 and (run.clock or across == "steps") for run in group.runs)
    ]
    shown = {metric.key for metric in shown_metrics(evaluation)}
    metrics = [metric for metric in ("reward", "held_out", "motion", "oracle_score") if metric in shown]
    if not groups or not metrics:
        return None

    def series(run: Run, name: str, metric: str) -> Series:
        points = [(0.0, evaluation.summaries[evaluation.base.name, name, steps].mean[metric])]
        for step, model in inputs.line(run).items():
            x = float(step) if across == "steps" else run.clock.get(step - 1, math.nan)
            points.append((x, evaluation.summaries[model.name, name, steps].mean[metric]))
        return _finite(points)

    def panel(metric: str, name: str) -> Panel:
        lines = [
            Line(group.label, group.style, _drawn(
                (series(run, name, metric) for run in group.runs if len(inputs.line(run)) > 1), 2
            ))
            for group in groups
        ]  # fmt: skip
        return Panel(
            AXES[across] if len(sets) == 1 or metric == metrics[-1] else "",
            metric_of(metric).name if name == sets[0] else "",
            set_title(name).capitalize() if metric == metrics[0] else "",
            lines,
        )

    sets = list(evaluation.about.sets)
    rows = [[panel(metric, name) for name in sets] for metric in metrics]
    if len(sets) == 1:
        rows = [[row[0] for row in rows]]
    return draw_panels(rows, max(5.5, 3.7 * len(rows[0])), 0.7 + 3.1 * len(rows), sharex=True)


def pareto(
    evaluation: EvaluationData, styles: Mapping[str, PlotStyle], called: Mapping[str, str], steps: int
) -> Drawing | None:  # fmt: skip
    """Draws temporal consistency and motion against the held-out reward: a panel per set, a point per model.

    ``called`` says by a model's name what the legend calls it; several may share an entry, and then a style.

    Bars are 95 % intervals of the means, by a bootstrap over prompts. The thin line joins models that no other exceeds
    in held-out reward and consistency. None where there is nothing to draw.
    """
    judge = metric_of(evaluation.judge)
    metrics = [metric for metric in shown_metrics(evaluation) if metric.key in ("consistency", "motion")]
    if not metrics:
        return None

    def scores(summary: Summary, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the finite scores, and the prompt of each."""
        group = (summary.model, summary.set, summary.steps)
        rows = [row for row in evaluation.rows if (row.model, row.set, row.steps) == group]
        known = [(row.score(metric), row.index) for row in rows if math.isfinite(row.score(metric))]
        return np.array([score for score, _ in known]), np.array([index for _, index in known])

    def panel(metric: Metric, name: str) -> Panel:
        points = []
        for model in evaluation.models:
            summary = evaluation.summaries[model.name, name, steps]
            if summary.used[judge.key] and summary.used[metric.key]:
                bars = [_interval(*scores(summary, each.key)) for each in (judge, metric)]
                points.append(Point(called[model.name], styles[model.name], *bars))
        return Panel(
            judge.name if metric == metrics[-1] else "",
            metric.name if name == sets[0] else "",
            set_title(name).capitalize() if metric == metrics[0] else "",
            points=points,
            front=metric.key != "motion",  # more of it is not better
        )

    sets = list(evaluation.about.sets)
    rows = [[panel(metric, name) for name in sets] for metric in metrics]
    return draw_panels(rows, max(5.5, 3.7 * len(sets)), 0.7 + 3.1 * len(rows), sharex="col")


def _interval(values: np.ndarray, prompts: np.ndarray) -> tuple[float, float, float]:
    """Returns a mean and the ends of its 95 % interval by a bootstrap over prompts; NaN for one prompt."""
    return float(values.mean()), *bootstrap_interval(values, prompts)


def _finite(points: Iterable[tuple[float, float]]) -> Series:
    kept = [point for point in points if all(map(math.isfinite, point))]
    return np.array([x for x, _ in kept]), np.array([y for _, y in kept])


def _drawn(series: Iterable[Series], least: int) -> list[Series]:
    """Returns the series that have ``least`` points or more."""
    return [each for each in series if len(each[0]) >= least]
