"""Draws curves and points: rewards along training, costs of a gain; as PNG, or as SVG for a light and a dark page."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from rlvid.files import write_atomic
from rlvid.plots.style import INK, RULE, SOFT, STYLES, PlotStyle, drawing, legend_label
from rlvid.stats import pareto_front

_MAX = 4  # series in one curve
AXES = {"steps": "optimiser step", "seconds": "seconds of training", "videos": "videos rewarded"}
"""What pictures write along the cost of a run."""
Series = tuple[np.ndarray, np.ndarray]
"""x and y, both finite; x ascends where there are several runs."""


@dataclass(frozen=True)
class Theme:
    """The colours of a page's paper and ink."""

    paper: str
    ink: str
    soft: str
    rule: str
    dark: bool

    def colour(self, style: PlotStyle) -> str:
        """Returns a style's colour on this paper."""
        return style.on_dark if self.dark else style.colour


LIGHT = Theme("#ffffff", INK, SOFT, RULE, False)
DARK = Theme("#1b1e23", "#e8e8e6", "#a8acb3", "#3c4149", True)
Drawing = dict[str, bytes]
"""``light`` and ``dark``: the same drawing as SVG; ``png``: the light one, to pass on."""


@dataclass(frozen=True)
class Line:
    """A line of a panel: of several runs their mean, and a band from the lowest to the highest.

    ``smooth`` draws triangular means over a twentieth of the run on either side, and a single run's raw values light.
    ``notes`` are written beside the points of a single run.
    """

    label: str
    style: PlotStyle
    runs: Sequence[Series]
    smooth: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Point:
    """A point of a panel, with bars: ``x`` and ``y`` are a value and the ends of its interval (NaN for no bar)."""

    label: str
    style: PlotStyle
    x: tuple[float, float, float]
    y: tuple[float, float, float]


@dataclass(frozen=True)
class Panel:
    """The content of one pair of axes; ``front`` joins the points that no other exceeds in both values."""

    x_label: str
    y_label: str
    title: str = ""
    lines: Sequence[Line] = ()
    points: Sequence[Point] = ()
    front: bool = False


Rows = Sequence[Sequence[Panel]]
"""Rows of panels, as many in each."""
_Shared = bool | Literal["col"]


def draw_panels(rows: Rows, width: float, height: float, sharex: _Shared = False) -> Drawing:
    """Draws rows of panels under one legend, for a light and for a dark page.

    Args:
        rows: of panels.
        width: of the whole, in inches.
        height: the same.
        sharex: which panels have one x axis; as in matplotlib.
    """
    light, dark = (_svg(rows, width, height, sharex, theme) for theme in (LIGHT, DARK))
    return {"light": light, "dark": dark, "png": png_of_panels(rows, width, height, sharex)}


def png_of_panels(rows: Rows, width: float, height: float, sharex: _Shared = False) -> bytes:
    """Draws the same as PNG, on white."""
    with _style(LIGHT):
        return _saved(_figure(rows, width, height, sharex, LIGHT), "png", dpi=150)


def _svg(rows: Rows, width: float, height: float, sharex: _Shared, theme: Theme) -> bytes:
    with _style(theme):
        figure = _figure(rows, width, height, sharex, theme)
        return _saved(figure, "svg", metadata={"Date": None, "Creator": "rlvid"})


def _style(theme: Theme) -> AbstractContextManager[None]:
    return drawing(10, theme.ink, theme.soft, **{"svg.hashsalt": "rlvid"})


def _figure(rows: Rows, width: float, height: float, sharex: _Shared, theme: Theme) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(width, height), layout=layout, facecolor=theme.paper)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharex=sharex)
    for axes, panel in zip(grid.flat, (panel for row in rows for panel in row), strict=True):
        _panel(axes, panel, theme)
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper left", ncols=max(1, min(4, len(handles))),
        frameon=False, handlelength=3,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, panel: Panel, theme: Theme) -> None:
    for line in panel.lines:
        _line(axes, line, theme)
    for point in panel.points:
        colour, bars = theme.colour(point.style), [_bar(*point.x), _bar(*point.y)]
        axes.errorbar(
            point.x[0], point.y[0], bars[1], bars[0], color=colour, marker=point.style.marker, markersize=9,
            linestyle="none", elinewidth=1, alpha=0.95, markeredgecolor=theme.paper, markeredgewidth=0.8,
            label=legend_label(point.label),
        )  # fmt: skip
    if panel.front:
        front = sorted(pareto_front([(point.x[0], point.y[0]) for point in panel.points]))
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=theme.soft, linewidth=0.9, zorder=0)
    if panel.points or any(line.notes for line in panel.lines):
        axes.margins(0.15)
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, facecolor=theme.paper)
    axes.spines[["top", "right"]].set_visible(False)
    training = any(line.smooth for line in panel.lines)
    if training:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y" if training else "both", color=theme.rule, linewidth=0.6)
    axes.set_axisbelow(True)


def _line(axes: Axes, line: Line, theme: Theme) -> None:
    """Draws the mean of the runs where all have a value, and for several runs a band from the lowest to the highest."""
    if not line.runs:
        return
    colour, runs = theme.colour(line.style), line.runs
    if line.smooth:
        if len(runs) == 1:
            axes.plot(*runs[0], color=colour, linewidth=0.7, alpha=0.3)
        runs = [(x, _smooth(values, len(values) // 20)) for x, values in runs]
    x, y = runs[0]
    if len(runs) > 1:
        low, high = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
        x = np.unique(np.concatenate([x for x, _ in runs]))
        x = x[(x >= low) & (x <= high)] if high >= low else x
        each = np.stack([np.interp(x, *run) for run in runs])
        axes.fill_between(x, each.min(0), each.max(0), color=colour, alpha=0.16, linewidth=0)
        y = each.mean(0)
    label = legend_label(line.label + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""))
    axes.plot(
        x, y, color=colour, linestyle=line.style.dash, linewidth=2, marker=line.style.marker, markersize=6,
        markevery=max(1, len(x) // 8), label=label,
    )  # fmt: skip
    for note, across, up in zip(line.notes, x, y, strict=bool(line.notes)):
        axes.annotate(note, (across, up), (5, 5), textcoords="offset points", fontsize=8, color=colour)


def _bar(value: float, low: float, high: float) -> np.ndarray:
    """Distances (2, 1) from a value to the ends of its interval; 0 where there is none."""
    return np.nan_to_num([[value - low], [high - value]]).clip(0)


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format=kind, **options)
    return data.getvalue()


@contextmanager
def png_page(path: str | Path, width: float, height: float, size: float = 10, dpi: int = 150) -> Iterator[Figure]:
    """A white figure, written as PNG when the block ends.

    Args:
        path: of the PNG; written as a whole.
        width: in inches.
        height: the same.
        size: of the type, in points.
        dpi: pixels an inch.
    """
    with drawing(size):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=(width, height), dpi=dpi, layout=layout, facecolor="white")
        yield figure
        write_atomic(Path(path), _saved(figure, "png"))


def draw_rewards(
    path: str | Path,
    steps: Sequence[int],
    series: Mapping[str, Sequence[float]],
    *,
    window: int | None = None,
    y_label: str = "reward (cosine similarity)",
    marks: Mapping[str, float] | None = None,
) -> None:
    """Writes a PNG with each series against the training step: raw and light, and smoothed on top.

    Args:
        path: of the PNG; written as a whole.
        steps: N training steps, ascending.
        series: label -> N values; NaN where there is none. At most four.
        window: values that the smoothed line averages around each step; default: a twentieth of the run, at least 1.
        y_label: of the vertical axis, with its unit.
        marks: label -> step that gets a vertical line.

    Raises:
        ValueError: no values, more than four series, or lengths that do not fit.
    """
    if not 1 <= len(series) <= _MAX or len(steps) == 0:
        raise ValueError(
            f"draw_rewards: {len(series)} series over {len(steps)} steps; allowed: 1 to {_MAX} over 1 or more"
        )
    for label, values in series.items():
        if len(values) != len(steps):
            raise ValueError(f"draw_rewards: series {label!r} has {len(values)} values for {len(steps)} steps")
    reach = (max(1, len(steps) // 20) if window is None else window) // 2
    with png_page(path, 9.6, 5.0, size=11) as figure:
        axes = figure.add_subplot(xlabel=AXES["steps"], ylabel=y_label)
        for (label, values), style in zip(series.items(), STYLES, strict=False):
            _curve(axes, np.asarray(steps), np.asarray(values, dtype=np.float64), reach, legend_label(label), style)
        for place, (label, step) in enumerate((marks or {}).items()):
            axes.axvline(step, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
            side, shift = ("right", -4) if step > (steps[0] + steps[-1]) / 2 else ("left", 4)
            axes.annotate(
                label, (step, 0), (shift, 4 + 14 * place), axes.get_xaxis_transform(), "offset points",
                color=SOFT, fontsize=9, ha=side, va="bottom",
            )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.margins(x=0.01)
        columns = len(series) if sum(map(len, series)) <= 70 else 2
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, handlelength=3, borderaxespad=0.2
        )
        if reach:
            note = f"light: as logged; bold: smoothed over {2 * reach + 1} values"
            axes.annotate(
                note, (1, 0), (0, -27), "axes fraction", "offset points", ha="right", va="top", color=SOFT, fontsize=9
            )


def _curve(axes: Axes, steps: np.ndarray, raw: np.ndarray, reach: int, label: str, style: PlotStyle) -> None:
    """Draws one series: raw values light, smoothed values on top; missing values are skipped."""
    known = np.isfinite(raw)
    smooth, marker = _smooth(raw, reach)[known], "o" if known.sum() == 1 else None
    if reach:
        axes.plot(steps[known], raw[known], color=style.colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps[known], smooth, color=style.colour, linestyle=style.dash, linewidth=2.2, marker=marker, label=label)


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Returns the mean of the finite values within ``reach`` places, with triangular weights; NaN without any."""
    finite = np.isfinite(values)
    weights = np.bartlett(2 * reach + 3)[1:-1]
    total = np.convolve(np.where(finite, values, 0.0), weights)[reach : reach + len(values)]
    weight = np.convolve(finite.astype(np.float64), weights)[reach : reach + len(values)]
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 1e-9)
