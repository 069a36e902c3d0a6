"""What a gain in the trained reward costs: one point a ``--lora-scale``, from the base to all that was learned."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rlvid.evaluate.results.summary import Summary
from rlvid.files import write_whole
from rlvid.metric_names import metric_of, set_title
from rlvid.plots.style import RULE, STYLES, PlotStyle, drawing, legend_label

UP = ("held_out", "consistency", "motion")


def draw_tradeoff(path: str | Path, summaries: Sequence[Summary], scales: Mapping[str, float]) -> None:
    """Writes a PNG: held-out reward, temporal consistency and motion against the trained reward, a line a prompt set.

    Args:
        path: of the PNG; written whole or not at all.
        summaries: of the base model (the first) and of every model of ``scales``; a row of panels for each number of
            DDIM steps.
        scales: model -> its scale, which is written beside its point.

    Raises:
        ValueError: no summaries, or none of a model of ``scales``.
    """
    known = {s.model for s in summaries}
    if not known.intersection(scales):
        raise ValueError(
            f"draw_tradeoff: none of {', '.join(scales)} was evaluated; models: {', '.join(known) or 'none'}"
        )
    placed = {summaries[0].model: 0.0} | dict(sorted(scales.items(), key=lambda each: each[1]))
    all_steps = list(dict.fromkeys(s.steps for s in summaries))
    with drawing(10):
        figure = Figure(figsize=(13, 4.2 * len(all_steps)), dpi=110, layout="constrained", facecolor="white")
        grid = figure.subplots(len(all_steps), len(UP), squeeze=False)
        for steps, row in zip(all_steps, grid, strict=True):
            here = [s for s in summaries if s.steps == steps]
            for axes, metric in zip(row, UP, strict=True):
                for place, name in enumerate(dict.fromkeys(s.set for s in here)):
                    by_model = {s.model: s for s in here if s.set == name}
                    points = [(by_model[m].mean["reward"], by_model[m].mean[metric], k) for m, k in placed.items()]
                    _line(axes, points, set_title(name), STYLES[place % len(STYLES)])
                axes.set(
                    xlabel=metric_of("reward").spoken,
                    ylabel=metric_of(metric).spoken,
                    title=f"{steps} DDIM steps" if len(all_steps) > 1 else "",
                )
                axes.spines[["top", "right"]].set_visible(False)
                axes.grid(color=RULE, linewidth=0.5)
                axes.margins(0.12)
        handles = grid[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=4, frameon=False, handlelength=3)
        data = io.BytesIO()
        figure.savefig(data, format="png")
    write_whole(Path(path), data.getvalue())


def _line(axes, points: list[tuple[float, float, float]], label: str, look: PlotStyle) -> None:
    finite = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    across, up = [p[0] for p in finite], [p[1] for p in finite]
    axes.plot(
        across,
        up,
        color=look.colour,
        linestyle=look.dash,
        marker=look.marker,
        markersize=5,
        linewidth=1.6,
        label=legend_label(label),
    )
    for x, y, scale in finite:
        axes.annotate(
            f"{scale:g}" if scale else "base", (x, y), (5, 5), textcoords="offset points", fontsize=8, color=look.colour
        )
