"""Pictures of a sweep: every trial as a line through its settings and scores, and a map of two settings.

White, one face, one scale of colours that stays in order for the colour-blind and in grey (cividis: darker is more).
Line style and words show how a trial ended, colour does not.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from rlvid.metric_names import Metric, metric_of
from rlvid.plots.curves import png_page
from rlvid.plots.style import INK, RULE, SOFT
from rlvid.stats import finite_mean
from tuning.description import Sweep
from tuning.outcomes import Outcome
from tuning.space import Dimension, label

COLOURS = "cividis_r"
_MAP_OF = ("reward.attenuation", "reward.segments")
_MAX_CELLS = 12  # a side of the map


def _short(key: str) -> str:
    names = {"reward.attenuation": "λ\n(reward.attenuation)", "reward.segments": "S\n(reward.segments)"}
    return names.get(key, key.replace(".", ".\n", 1))


class _Scale:
    """One upright axis: where a value stands on it, from 0 to 1, and its ticks."""

    def __init__(self, title: str, ticks: list[tuple[float, str]], place: dict[str, float] | None, log: bool) -> None:
        self.title, self.ticks, self._place, self._log = title, ticks, place, log
        self._low, self._high = ticks[0][0], ticks[-1][0]

    @staticmethod
    def of_setting(dimension: Dimension) -> "_Scale":
        """Values to choose from stand evenly spaced, in their order; ranges in proportion."""
        if dimension.kind == "choice":
            names = [label(value) for value in dimension.values]
            step = 1 / max(1, len(names) - 1)
            place = {name: i * step if len(names) > 1 else 0.5 for i, name in enumerate(names)}
            return _Scale(_short(dimension.key), [(place[name], name) for name in names], place, False)
        low, high = dimension.values
        log = dimension.kind == "loguniform"
        middle = math.sqrt(low * high) if log else (low + high) / 2
        return _Scale(_short(dimension.key), [(v, f"{v:.3g}") for v in (low, middle, high)], None, log)

    @staticmethod
    def of_score(name: str, values: list[float]) -> "_Scale":
        """Makes a scale from the lowest to the highest finite value."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        metric = metric_of(name)
        ticks = [(v, metric.number(v)) for v in (low, (low + high) / 2, high)]
        return _Scale(metric.name.replace(" ", "\n", 1), ticks, None, False)

    def at(self, value: Any) -> float:
        """Height of a value; NaN where it has none."""
        if self._place is not None:
            return self._place[label(value)]
        if self._log:
            return math.log(value / self._low) / math.log(self._high / self._low)
        return (value - self._low) / (self._high - self._low)

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Heights of the ticks, and what stands there."""
        return self.ticks if self._place is not None else [(self.at(value), text) for value, text in self.ticks]


def parallel_coordinates(path: Path, sweep: Sweep, outcomes: list[Outcome], best: Outcome) -> None:
    """Writes a PNG: an upright axis for each setting and objective, a line a trial at its last rung, the best thick."""
    known = [one for one in outcomes if one.step is not None]
    scales = [_Scale.of_setting(dimension) for dimension in sweep.dimensions]
    scales += [_Scale.of_score(name, [one.value(name) for one in known]) for name in sweep.objectives]
    colour = ScalarMappable(Normalize(*_ends([one.value(sweep.metric) for one in known])), COLOURS)
    with png_page(path, max(8.0, 1.6 * len(scales) + 1.5), 5.2) as figure:
        axes = figure.add_subplot()
        spread = np.linspace(-0.02, 0.02, len(known)) if len(known) > 1 else [0.0]
        for one, aside in zip(known, spread, strict=True):  # a little apart, where many choose the same
            values = [
                *(one.trial.settings[key] for key in sweep.space),
                *(one.value(name) for name in sweep.objectives),
            ]
            heights = np.array([scale.at(value) for scale, value in zip(scales, values, strict=True)])
            heights[: len(sweep.space)] += aside
            thick, order = (4.0, 3) if one is best else (1.4, 2)
            dashes = "-" if one.trial.end == "finished" else (0, (4, 2))
            shade = colour.to_rgba(np.array(one.value(sweep.metric)))
            axes.plot(range(len(scales)), heights, color=shade, ls=dashes, lw=thick, zorder=order)
        for place, scale in enumerate(scales):
            _upright(axes, place, scale)
        axes.set(xlim=(-0.3, len(scales) - 0.5), ylim=(-0.08, 1.08), yticks=[])
        axes.set_xticks(range(len(scales)), [scale.title for scale in scales])
        axes.tick_params(axis="x", length=0, labelsize=9.5, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        figure.colorbar(colour, ax=axes, label=metric_of(sweep.metric).name, shrink=0.8, pad=0.02)
        lines = [
            Line2D([], [], color=SOFT, linewidth=1.4, label="finished"),
            Line2D([], [], color=SOFT, linewidth=1.4, linestyle=(0, (4, 2)), label="stopped early, at its last rung"),
            Line2D([], [], color=SOFT, linewidth=4.0, label=f"best: {best.trial.name}"),
        ]
        figure.legend(handles=lines, loc="outside lower left", ncols=3, frameon=False, handlelength=3)
        figure.suptitle(f"{sweep.name}: {len(known)} trials", x=0.015, ha="left", fontsize=13, fontweight="bold")


def _upright(axes: Axes, place: int, scale: _Scale) -> None:
    axes.axvline(place, 0.05, 0.95, color=INK, linewidth=0.8, zorder=1)
    box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for height, text in scale.marks:
        axes.plot([place - 0.03, place], [height, height], color=INK, linewidth=0.8)
        axes.annotate(text, (place - 0.06, height), ha="right", va="center", fontsize=8.5, bbox=box, zorder=4)


def _ends(values: list[float]) -> tuple[float, float]:
    """The values that the palest and the darkest colour stand for."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    return low, high if high > low else low + 1e-6


def heat_map(path: Path, sweep: Sweep, outcomes: list[Outcome], base: dict[str, Any] | None) -> bool:
    """Writes a PNG with a map a rung: lambda upwards, S across, or the first two settings that have few values.

    A cell is the mean metric of its trials at that rung; hatched where no trial came so far.

    Returns:
        Whether there are two such settings.
    """
    few = [d for d in sweep.dimensions if d.count is not None and d.count <= _MAX_CELLS]
    chosen = [d for key in _MAP_OF for d in few if d.key == key]
    chosen += [d for d in few if d not in chosen]
    if len(chosen) < 2:
        return False
    (up, across), metric = chosen[:2], metric_of(sweep.metric)
    tables = {step: _cells(sweep, outcomes, up, across, step) for step in sweep.rungs}
    drawn = [step for step in sweep.rungs if np.isfinite(tables[step]).any()]
    ends = _ends([value for step in drawn for value in tables[step].flatten()])
    width = 1.3 + len(drawn) * (0.95 * len(across.listed) + 1.3)
    with png_page(path, max(6.5, width), 1.9 + 0.62 * len(up.listed)) as figure:
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        for panel, step in zip(panels, drawn, strict=True):
            _map(panel, tables[step], metric, ends, up, across)
            panel.set_title(f"after {step} {sweep.unit_name}", loc="left", fontsize=10.5)
        panels[0].set_ylabel(_short(up.key).replace("\n", " "))
        colour = ScalarMappable(Normalize(*ends), COLOURS)
        figure.colorbar(colour, ax=list(panels), label=metric.name, shrink=0.9, pad=0.02)
        known = "" if base is None else f" (base model: {metric.number(base['mean'][sweep.metric])})"
        figure.suptitle(f"{sweep.name}: {metric.spoken}{known}", x=0.015, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.015, 0.012, "hatched: no trial came so far", ha="left", color=SOFT, fontsize=8.5)
    return True


def _cells(sweep: Sweep, outcomes: list[Outcome], up: Dimension, across: Dimension, step: int) -> np.ndarray:
    """Returns the mean metric (up, across) at a rung; NaN where there is none."""
    table = np.full((len(up.listed), len(across.listed)), np.nan)
    for i, row in enumerate(up.listed):
        for j, column in enumerate(across.listed):
            here = [
                one.value(sweep.metric, step) for one in outcomes
                if one.trial.settings[up.key] == row and one.trial.settings[across.key] == column
            ]  # fmt: skip
            table[i, j] = finite_mean(here)
    return table


def _map(
    panel: Axes, table: np.ndarray, metric: Metric, ends: tuple[float, float], up: Dimension, across: Dimension
) -> None:
    panel.imshow(table, cmap=COLOURS, vmin=ends[0], vmax=ends[1], origin="lower", aspect="auto")
    middle = sum(ends) / 2
    best = np.nanmax(table)
    for (i, j), value in np.ndenumerate(table):
        if not math.isfinite(value):
            panel.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor=RULE, linewidth=0))
            continue
        ink, weight = ("white" if value > middle else INK), ("bold" if value == best else "normal")
        text = metric.number(value)
        panel.annotate(text, (j, i), ha="center", va="center", color=ink, fontweight=weight, fontsize=9)
    panel.set_xticks(range(len(across.listed)), [label(value) for value in across.listed])
    panel.set_yticks(range(len(up.listed)), [label(value) for value in up.listed])
    panel.set_xlabel(_short(across.key).replace("\n", " "))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
