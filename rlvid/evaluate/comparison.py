"""Several methods, several seeds each: a table with intervals over seeds, curves, and the same for TensorBoard."""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from rlvid.escape import markdown_text
from rlvid.plots.style import RULE, drawing, legend_label, looks_of
from rlvid.stats import mean_interval

SHOWN = {
    "reward": "Reward", "held_out": "Held-out reward", "clipsim": "CLIPSIM", "consistency": "Temporal consistency",
    "motion": "Motion", "diversity": "Diversity", "oracle_score": "Oracle score",
}  # fmt: skip
"""Metrics of the table, in its order."""

PANELS = (
    ("seconds", "reward"), ("videos", "reward"), ("seconds", "oracle_score"), ("reward", "oracle_score"),
)  # fmt: skip
PANEL_NAMES = {
    "seconds": "seconds of training", "videos": "videos rewarded", "reward": "trained reward",
    "oracle_score": "oracle score",
}  # fmt: skip

Point = dict[str, Any]
"""A checkpoint's step, its cost so far, and the mean and deviation of every metric."""


def table(results: dict[str, list[list[Point]]]) -> str:
    """Markdown: the base, then every method at its end; mean over seeds and its interval.

    Bold where a mean is above the base's by more than its interval. The last column is over the videos of a seed.
    """
    heads = ["Method", "Seconds", "Videos", *SHOWN.values(), "Std of rewards"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    base = next(iter(results.values()))[0][0]
    groups = {"base": [base]} | {name: [run[-1] for run in each] for name, each in results.items()}
    for name, ends in groups.items():
        cells = [f"{statistics.mean(end['seconds'] for end in ends):.0f}"]
        cells.append(f"{statistics.mean(end['videos'] for end in ends):.0f}")
        for metric in SHOWN:
            mean, half = mean_interval([end["mean"][metric] for end in ends])
            text = f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
            cells.append(f"**{text}**" if mean - half > base["mean"][metric] else text)
        cells.append(f"{statistics.mean(end['std']['reward'] for end in ends):.3f}")
        lines.append(f"| {markdown_text(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[list[Point]]], path: Path) -> None:
    """Four panels: reward against seconds and videos, oracle score against seconds and reward.

    The strong line of a method is the mean over seeds, the faint ones are the seeds.
    """
    looks = looks_of(list(results))
    with drawing(10):
        figure = Figure(figsize=(13, 9), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2).flatten()
        for panel, (across, up) in zip(panels, PANELS, strict=True):
            for name, runs in results.items():
                curves = [([_value(p, across) for p in run], [_value(p, up) for p in run]) for run in runs]
                look = {"color": looks[name].colour, "linestyle": looks[name].dash}
                if len(curves) > 1:
                    for x, y in curves:
                        panel.plot(x, y, linewidth=0.8, alpha=0.3, **look)
                length = min(len(x) for x, _ in curves)
                x, y = ([statistics.mean(curve[axis][i] for curve in curves) for i in range(length)] for axis in (0, 1))
                panel.plot(
                    x, y, linewidth=1.8, marker=looks[name].marker, markersize=5, label=legend_label(name), **look
                )
            panel.set_xlabel(PANEL_NAMES[across])
            panel.set_ylabel(PANEL_NAMES[up])
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color=RULE, linewidth=0.6)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
        figure.savefig(path, dpi=100)


def _value(point: Point, name: str) -> float:
    return float(point[name] if name in point else point["mean"][name])


def write_board(ended: dict[str, list[tuple[int, list[Point]]]], folder: Path) -> None:
    """The same curves for TensorBoard, a run a method and seed."""
    for name, runs in ended.items():
        for seed, run in runs:
            target = folder / f"{name}-seed{seed}"
            for old in target.glob("events.*"):
                old.unlink()
            with SummaryWriter(str(target)) as board:
                for point in run:
                    for metric in SHOWN:
                        value = point["mean"][metric]
                        board.add_scalar(f"against steps/{metric}", value, point["step"])
                        board.add_scalar(f"against videos/{metric}", value, point["videos"])
                        board.add_scalar(f"against seconds/{metric}", value, round(point["seconds"]))
