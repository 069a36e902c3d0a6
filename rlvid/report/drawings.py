"""The report's drawings: rewards in training, evaluations along runs, and what a gain costs."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rlvid.evaluate.results.read import EvaluationData
from rlvid.metric_names import REWARD_TAGS
from rlvid.plots.curves import Drawing, Line, Panel, Point, Series, draw_panels
from rlvid.plots.style import PlotStyle
from rlvid.report.inputs import Group, ReportInputs
from rlvid.report.runs import Run
from rlvid.report.summary import finite_scores, mean, shown_metrics, shown_set, title
from rlvid.stats import bootstrap_interval

_ACROSS = {"steps": "optimiser step", "seconds": "seconds of training"}


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
        Panel(_ACROSS[across], "", REWARD_TAGS[tag].capitalize(), [
            Line(group.label, group.style, _drawn((series(run, tag) for run in group.runs), 1), smooth=True)
            for group in groups
        ])
        for tag in tags
    ]  # fmt: skip
    return draw_panels([panels], 11, 4.1)


def along_runs(inputs: ReportInputs, steps: int, across: str) -> Drawing | None:
    """The evaluation of checkpoints along their runs: rewards, motion and the oracle; None where no run has two.

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
    shown = shown_metrics(evaluation)
    metrics = [metric for metric in ("reward", "held_out", "motion", "oracle_score") if metric in shown]
    if not groups or not metrics:
        return None

    def series(run: Run, name: str, metric: str) -> Series:
        points = [(0.0, mean(evaluation, evaluation.base.name, name, steps, metric)[0])]
        for step, model in inputs.line(run).items():
            x = float(step) if across == "steps" else run.clock.get(step - 1, math.nan)
            points.append((x, mean(evaluation, model.name, name, steps, metric)[0]))
        return _finite(points)

    def panel(metric: str, name: str) -> Panel:
        lines = [
            Line(group.label, group.style, _drawn(
                (series(run, name, metric) for run in group.runs if len(inputs.line(run)) > 1), 2
            ))
            for group in groups
        ]  # fmt: skip
        first, last, top = name == sets[0], metric == metrics[-1], metric == metrics[0]
        if len(sets) == 1:
            return Panel(_ACROSS[across], title(metric), shown_set(name).capitalize() if top else "", lines)
        heading = shown_set(name).capitalize() if top else ""
        return Panel(_ACROSS[across] if last else "", title(metric) if first else "", heading, lines)

    sets = list(evaluation.about.sets)
    rows = [[panel(metric, name) for name in sets] for metric in metrics]
    if len(sets) == 1:
        rows = [[row[0] for row in rows]]
    return draw_panels(rows, max(5.5, 3.7 * len(rows[0])), 0.7 + 3.1 * len(rows), sharex=True)


def pareto(
    evaluation: EvaluationData, styles: Mapping[str, PlotStyle], called: Mapping[str, str], steps: int
) -> Drawing | None:  # fmt: skip
    """Temporal consistency and motion against the held-out reward: a panel a prompt set, a point a model.

    ``called`` says by a model's name what the legend calls it; several may share an entry, and then a style.

    Bars are 95 % intervals of the means, by a bootstrap over prompts. The thin line joins models that no other exceeds
    in held-out reward and consistency. None where there is nothing to draw.
    """
    metrics = [metric for metric in ("consistency", "motion") if metric in shown_metrics(evaluation)]
    if not metrics:
        return None

    def panel(metric: str, name: str) -> Panel:
        points = []
        for model in evaluation.models:
            scores = [finite_scores(evaluation, model.name, name, steps, m) for m in (evaluation.judge, metric)]
            if all(len(values) for values, _ in scores):
                points.append(Point(called[model.name], styles[model.name], *(_interval(*each) for each in scores)))
        return Panel(
            title(evaluation.judge) if metric == metrics[-1] else "",
            title(metric) if name == sets[0] else "",
            shown_set(name).capitalize() if metric == metrics[0] else "",
            points=points,
            front=metric != "motion",  # more of it is not better
        )

    sets = list(evaluation.about.sets)
    rows = [[panel(metric, name) for name in sets] for metric in metrics]
    return draw_panels(rows, max(5.5, 3.7 * len(sets)), 0.7 + 3.1 * len(rows), sharex="col")


def _interval(values: np.ndarray, prompts: np.ndarray) -> tuple[float, float, float]:
    """A mean, and the ends of its 95 % interval by a bootstrap over prompts; NaN where one prompt gives none."""
    return float(values.mean()), *bootstrap_interval(values, prompts)


def _finite(points: Iterable[tuple[float, float]]) -> Series:
    kept = [point for point in points if all(map(math.isfinite, point))]
    return np.array([x for x, _ in kept]), np.array([y for _, y in kept])


def _drawn(series: Iterable[Series], least: int) -> list[Series]:
    """Those with so many points or more."""
    return [each for each in series if len(each[0]) >= least]
