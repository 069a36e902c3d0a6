"""Joins trials that differ in their seed alone: a table with intervals over seeds, and curves."""

import math
import statistics
from pathlib import Path
from typing import Any

from rlvid.evaluate.tables.table import Cell, Grid
from rlvid.metric_names import MAIN, REWARD_PREFIX, metric_of
from rlvid.plots.curves import AXES, png_page
from rlvid.plots.style import RULE, legend_label, styles_of
from rlvid.stats import mean_interval, welch
from tuning.description import Sweep
from tuning.judges import GAIN
from tuning.outcomes import Outcome
from tuning.space import VARIANT, shown

PANELS = (
    ("seconds", "reward"), ("videos", "reward"), ("seconds", "oracle_score"), ("reward", "oracle_score"),
)  # fmt: skip


def by_seed(sweep: Sweep, outcomes: list[Outcome]) -> dict[str, list[list[dict[str, Any]]]]:
    """Maps the label of settings to each seed's scores at all rungs, for trials that reached the last rung."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for one in outcomes:
        settings = {key: one.trial.settings[key] for key in sweep.space if key != "seed"}
        label = str(settings[VARIANT]) if settings.keys() == {VARIANT} else shown(settings) or sweep.config
        if one.scores.keys() >= {*sweep.rungs}:
            found.setdefault(label, []).append([one.scores[rung] for rung in sweep.rungs])
    return found


def table(base: dict[str, Any], results: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Markdown: the base, then all settings at their end; mean over seeds ± half of Student's 95 % interval.

    Below settings stand their further scales of the learned change, where these were measured. Bold where a mean is
    above the base's by more than that. The last column is over the videos of a seed. Metrics without a value are left
    out.
    """
    groups = {"base": [base]}
    for name, runs in results.items():
        ends = [run[-1] for run in runs]
        groups[name] = ends
        for scale in ends[0].get("scaled", {}):
            groups[f"{name} at scale {scale}"] = [end | end["scaled"][scale] for end in ends]
    known = _measured([end for ends in groups.values() for end in ends])
    rows: list[list[Cell | str]] = []
    for name, ends in groups.items():
        seconds, videos, std = (statistics.mean(values) for values in zip(*map(_cost, ends), strict=True))
        cells = []
        for metric in known:
            mean, half = mean_interval([_value(end, metric) for end in ends])
            cells.append(Cell(metric_of(metric).mean(mean, half), mean - half > _value(base, metric)))
        costs = metric_of("seconds").number(seconds), f"{videos:.0f}"
        rows.append([name, *costs, *cells, metric_of("reward").number(std)])
    heads = ["Settings", "Seconds", "Videos", *(metric_of(metric).name for metric in known), "Std of rewards"]
    return Grid(heads, rows).markdown() + "\n"


def differences(results: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Markdown: all settings less the first ones at their end, difference of means ± half of Welch's 95 % interval.

    Bold where the interval leaves out 0. Settings with a single seed are left out; empty with fewer than two others.
    """
    ends = {name: [run[-1] for run in runs] for name, runs in results.items() if len(runs) > 1}
    if len(ends) < 2:
        return ""
    known = _measured([end for of_a_seed in ends.values() for end in of_a_seed])
    (first, reference), *others = ends.items()
    rows: list[list[Cell | str]] = []
    for name, found in others:
        cells = []
        for metric in known:
            values, wanted = ([_value(end, metric) for end in each] for each in (found, reference))
            difference, half = statistics.mean(values) - statistics.mean(wanted), welch(values, wanted)
            text = metric_of(metric).number(difference, "+") + metric_of(metric).margin(half)
            cells.append(Cell(text, abs(difference) > half))
        rows.append([name, *cells])
    return Grid([f"Difference from {first}", *(metric_of(metric).name for metric in known)], rows).markdown() + "\n"


def _measured(ends: list[dict[str, Any]]) -> list[str]:
    """Returns the main metrics and further rewards with values; CLIPSIM where it differs from the held-out reward."""
    rewards = [metric for metric in ends[0]["mean"] if metric.startswith(REWARD_PREFIX)]
    after = MAIN.index("held_out") + 1
    wanted = [*MAIN[:after], *rewards, GAIN, *MAIN[after:]]
    known = [metric for metric in wanted if any(math.isfinite(_value(end, metric)) for end in ends)]
    shown = [[metric_of(metric).number(_value(end, metric)) for end in ends] for metric in ("clipsim", "held_out")]
    if "clipsim" in known and shown[0] == shown[1]:
        known.remove("clipsim")
    return known


def _cost(end: dict[str, Any]) -> tuple[float, float, float]:
    return end["seconds"], end["videos"], end["std"]["reward"]


def draw(base: dict[str, Any], results: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Four panels: reward against seconds and videos, oracle score against seconds and reward.

    The strong line of some settings is the mean over seeds, the faint ones are the seeds.
    """
    looks = styles_of(list(results))
    with png_page(path, 13, 9, dpi=100) as figure:
        panels = figure.subplots(2, 2).flatten()
        for panel, (across, up) in zip(panels, PANELS, strict=True):
            for name, runs in results.items():
                curves = [[[_value(p, axis) for p in (base, *run)] for axis in (across, up)] for run in runs]
                look = {"color": looks[name].colour, "linestyle": looks[name].dash}
                if len(curves) > 1:
                    for x, y in curves:
                        panel.plot(x, y, linewidth=0.8, alpha=0.3, **look)
                length = min(len(x) for x, _ in curves)
                x, y = ([statistics.mean(curve[axis][i] for curve in curves) for i in range(length)] for axis in (0, 1))
                panel.plot(
                    x, y, linewidth=1.8, marker=looks[name].marker, markersize=5, label=legend_label(name), **look
                )
            panel.set_xlabel(AXES.get(across, metric_of(across).axis))
            panel.set_ylabel(metric_of(up).axis)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color=RULE, linewidth=0.6)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)


def _value(point: dict[str, Any], name: str) -> float:
    """Returns a cost or the mean of a metric; NaN where it was not measured."""
    return float(point[name] if name in point else point["mean"].get(name, math.nan))
