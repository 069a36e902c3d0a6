"""Several methods, several seeds each: a table with intervals over seeds, curves, and the same for TensorBoard."""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantile of Student's t for 1, 2, ... degrees of freedom."""
SHOWN = {
    "reward": "Reward", "held_out": "Held-out reward", "clipsim": "CLIPSIM", "consistency": "Temporal consistency",
    "motion": "Motion", "diversity": "Diversity", "oracle_score": "Oracle score",
}  # fmt: skip
"""Metrics of the table, in its order."""

Point = dict[str, Any]
"""A checkpoint's step, its cost so far, and the mean and deviation of every metric."""


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the 95 % interval of Student's t over seeds (NaN for one seed)."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def table(results: dict[str, list[list[Point]]]) -> str:
    """Markdown: the base, then every method at its end; mean over seeds and its interval.

    Bold where a mean is above the base's by more than its interval.
    """
    lines = ["| Method | Seconds | Videos | " + " | ".join(SHOWN.values()) + " |", "|---|" + "---:|" * (len(SHOWN) + 2)]
    base = next(iter(results.values()))[0][0]
    groups = {"base": [base]} | {name: [run[-1] for run in each] for name, each in results.items()}
    for name, ends in groups.items():
        cells = [f"{statistics.mean(end['seconds'] for end in ends):.0f}"]
        cells.append(f"{statistics.mean(end['videos'] for end in ends):.0f}")
        for metric in SHOWN:
            mean, half = interval([end["mean"][metric] for end in ends])
            text = f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
            cells.append(f"**{text}**" if mean - half > base["mean"][metric] else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[list[Point]]], path: Path) -> None:
    """Reward against seconds and against videos, and oracle against reward; a thin line a seed, dots its scores."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    labels = (("seconds of training", "reward"), ("videos rewarded", "reward"), ("trained reward", "oracle score"))
    for index, (name, runs) in enumerate(results.items()):
        look = {"color": f"C{index}", "linestyle": ["-", "--", "-.", ":"][index % 4], "marker": "os^vDPX*"[index % 8]}
        for place, (across, up) in enumerate((("seconds", "reward"), ("videos", "reward"), ("reward", "oracle_score"))):
            for number, run in enumerate(runs):
                x = [point[across] if across in point else point["mean"][across] for point in run]
                y = [point["mean"][up] for point in run]
                panels[place].plot(
                    x, y, linewidth=1, markersize=4, alpha=0.8, label=name if number == 0 else None, **look
                )
    for panel, (across, up) in zip(panels, labels, strict=True):
        panel.set_xlabel(across)
        panel.set_ylabel(up)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


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
