"""The report's drawings, as SVG, each for a light and for a dark page: reward curves, and what a gain costs."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlvid.evaluate.results.read import EvaluationData
from rlvid.plots.style import INK, RULE, SOFT, PlotStyle, drawing, legend_label
from rlvid.report.inputs import Group, ReportInputs
from rlvid.report.runs import REWARDS, Run
from rlvid.report.summary import finite_scores, mean, shown_metrics, shown_set, title
from rlvid.stats import bootstrap_interval


@dataclass(frozen=True)
class Theme:
    """The colours of a page's paper and ink."""

    paper: str
    ink: str
    soft: str
    rule: str
    dark: bool

    def colour(self, look: PlotStyle) -> str:
        """Of a look on this paper."""
        return look.on_dark if self.dark else look.colour


LIGHT = Theme("#ffffff", INK, SOFT, RULE, False)
DARK = Theme("#1b1e23", "#e8e8e6", "#a8acb3", "#3c4149", True)
Drawing = dict[str, bytes]
"""``light`` and ``dark``: the same drawing as SVG; ``png``: the light one, to pass on."""


_ACROSS = {"steps": "optimiser step", "seconds": "seconds of training"}


def reward_curves(groups: Sequence[Group], across: str) -> Drawing | None:
    """Trained and held-out reward of every group; None where no run has scalars.

    Args:
        groups: at least one.
        across: ``steps``, or ``seconds`` of training.
    """
    tags = [tag for tag in REWARDS if any(run.scalars.get(tag) for group in groups for run in group.runs)]
    if not tags:
        return None

    def draw(theme: Theme) -> Figure:
        figure = _figure(theme, 11, 4.1)
        for axes, tag in zip(figure.subplots(1, len(tags), squeeze=False)[0], tags, strict=True):
            for group in groups:
                _curve(axes, group, tag, across, theme)
            axes.set_title(REWARDS[tag].capitalize(), loc="left", fontweight="bold")
            axes.set_xlabel(_ACROSS[across])
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            _plain(axes, theme, axis="y")
        _legend(figure, len(groups))
        return figure

    return _both(draw)


def _curve(axes: Axes, group: Group, tag: str, across: str, theme: Theme) -> None:
    lines = []
    for run in group.runs:
        place = {s: float(s) for s in run.scalars.get(tag, {})} if across == "steps" else run.clock
        steps = [s for s, v in sorted(run.scalars.get(tag, {}).items()) if math.isfinite(v) and s in place]
        if steps:
            lines.append((np.array([place[s] for s in steps]), np.array([run.scalars[tag][s] for s in steps])))
    for x, raw in lines if len(lines) == 1 else []:
        axes.plot(x, raw, color=theme.colour(group.look), linewidth=0.7, alpha=0.3)
    _band(axes, [(x, _smooth(values)) for x, values in lines], group, theme)


def _band(axes: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]], group: Group, theme: Theme) -> None:
    """The mean of the lines where all of them are, and of several a band from the lowest to the highest."""
    if not lines:
        return
    colour, look = theme.colour(group.look), group.look
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.unique(np.concatenate([x for x, _ in lines]))
    grid = grid[(grid >= low) & (grid <= high)] if high >= low else grid
    each = np.stack([np.interp(grid, x, values) for x, values in lines])
    label = legend_label(group.label + (f" ({len(lines)} seeds)" if len(lines) > 1 else ""))
    if len(lines) > 1:
        axes.fill_between(grid, each.min(0), each.max(0), color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        grid, each.mean(0), color=colour, linestyle=look.dash, linewidth=2, label=label, marker=look.marker,
        markersize=6, markevery=max(1, len(grid) // 8),
    )  # fmt: skip


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
    metrics = [
        metric for metric in ("reward", "held_out", "motion", "oracle_score") if metric in shown_metrics(evaluation)
    ]
    if not groups or not metrics:
        return None

    def line(run: Run, name: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        points = [(0.0, mean(evaluation, evaluation.base.name, name, steps, metric)[0])]
        for step, model in inputs.line(run).items():
            x = float(step) if across == "steps" else run.clock.get(step - 1, math.nan)
            points.append((x, mean(evaluation, model.name, name, steps, metric)[0]))
        kept = [point for point in points if all(map(math.isfinite, point))]
        return np.array([x for x, _ in kept]), np.array([y for _, y in kept])

    def draw(theme: Theme) -> Figure:
        rows, columns = (
            (len(metrics), len(evaluation.about.sets)) if len(evaluation.about.sets) > 1 else (1, len(metrics))
        )
        figure = _figure(theme, max(5.5, 3.7 * columns), 0.7 + 3.1 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        places = [(metric, name) for metric in metrics for name in evaluation.about.sets]
        for number, ((metric, name), axes) in enumerate(zip(places, grid.flat, strict=True)):
            for group in groups:
                lines = [line(run, name, metric) for run in group.runs if len(inputs.line(run)) > 1]
                _band(axes, [each for each in lines if len(each[0]) > 1], group, theme)
            if number < len(evaluation.about.sets):
                axes.set_title(shown_set(name).capitalize(), loc="left", fontweight="bold")
            axes.set_xlabel(_ACROSS[across] if number >= (rows - 1) * columns else "")
            axes.set_ylabel(title(metric) if not number % columns or rows == 1 else "")
            _plain(axes, theme, axis="both")
        _legend(figure, len(groups))
        return figure

    return _both(draw)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Triangular means over a twentieth of the run on either side."""
    reach = len(values) // 20
    weights = np.bartlett(2 * reach + 3)[1:-1]
    there = np.convolve(np.ones(len(values)), weights)[reach : reach + len(values)]
    return np.convolve(values, weights)[reach : reach + len(values)] / there


def pareto(
    evaluation: EvaluationData, looks: Mapping[str, PlotStyle], called: Mapping[str, str], steps: int
) -> Drawing | None:
    """Temporal consistency and motion against the held-out reward: a panel a prompt set, a point a model.

    ``called`` says by a model's name what the legend calls it; several may share an entry, and then a look.

    Bars are 95 % intervals of the means, by a bootstrap over prompts. The thin line joins models that no other exceeds
    in held-out reward and consistency. None where there is nothing to draw.
    """
    rows = [metric for metric in ("consistency", "motion") if metric in shown_metrics(evaluation)]
    if not rows:
        return None
    sets = list(evaluation.about.sets)

    def draw(theme: Theme) -> Figure:
        figure = _figure(theme, max(5.5, 3.7 * len(sets)), 0.7 + 3.1 * len(rows))
        grid = figure.subplots(len(rows), len(sets), squeeze=False, sharex="col")
        for metric, line in zip(rows, grid, strict=True):
            for name, axes in zip(sets, line, strict=True):
                _points(axes, evaluation, looks, called, name, steps, metric, theme)
                axes.set_title(shown_set(name).capitalize() if metric == rows[0] else "", loc="left", fontweight="bold")
                axes.set_xlabel(title(evaluation.judge) if metric == rows[-1] else "")
                axes.set_ylabel(title(metric) if name == sets[0] else "")
                _plain(axes, theme, axis="both")
        _legend(figure, len(set(called.values())))
        return figure

    return _both(draw)


def _points(
    axes: Axes, evaluation: EvaluationData, looks: Mapping[str, PlotStyle], called: Mapping[str, str], name: str,
    steps: int, metric: str, theme: Theme,
) -> None:  # fmt: skip
    found = []
    for model in evaluation.models:
        scores = [finite_scores(evaluation, model.name, name, steps, m) for m in (evaluation.judge, metric)]
        if not all(len(values) for values, _ in scores):
            continue
        x, y = (float(values.mean()) for values, _ in scores)
        found.append((x, y))
        look, label = looks[model.name], legend_label(called[model.name])
        across, up = (_bar(values, prompts) for values, prompts in scores)
        axes.errorbar(
            x, y, up, across, color=theme.colour(look), marker=look.marker, markersize=9, linestyle="none",
            elinewidth=1, alpha=0.95, markeredgecolor=theme.paper, markeredgewidth=0.8, label=label,
        )  # fmt: skip
    if metric == "motion":  # more of it is not better
        axes.margins(0.15)
        return
    front = sorted(p for p in found if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in found))
    axes.plot(*zip(*front, strict=True), color=theme.soft, linewidth=0.9, zorder=0) if len(front) > 1 else None
    axes.margins(0.15)


def _bar(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Distances (2, 1) from the mean to the ends of its 95 % interval; 0 where one prompt gives none."""
    low, high = bootstrap_interval(values, prompts)
    middle = values.mean()
    return np.nan_to_num([[middle - low], [high - middle]]).clip(0)


def _figure(theme: Theme, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.paper)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def _plain(axes: Axes, theme: Theme, axis: str) -> None:
    axes.set_facecolor(theme.paper)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=axis, color=theme.rule, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure, entries: int) -> None:
    handles: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper left", ncols=min(4, entries), frameon=False,
        handlelength=3,
    )  # fmt: skip


def _both(draw: Callable[[Theme], Figure]) -> Drawing:
    found = {}
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        with drawing(10, theme.ink, theme.soft, **{"svg.hashsalt": "rlvid"}):
            figure = draw(theme)
            found[name] = _saved(figure, "svg", metadata={"Date": None, "Creator": "rlvid"})
            if theme is LIGHT:
                found["png"] = _saved(figure, "png", dpi=150)
    return found


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format=kind, **options)
    return data.getvalue()
