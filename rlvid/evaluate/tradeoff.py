"""The cost of a gain in the trained reward: one point per ``--lora-scale``, from the base to the tuned model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlvid.evaluate.results.summary import Summary
from rlvid.files import write_atomic
from rlvid.metric_names import metric_of, set_title
from rlvid.plots.curves import Line, Panel, png_of_panels
from rlvid.plots.style import STYLES

UP = ("held_out", "consistency", "motion")


def draw_tradeoff(path: str | Path, summaries: Sequence[Summary], scales: Mapping[str, float]) -> None:
    """Writes a PNG: held-out reward, temporal consistency and motion against the trained reward, a line a prompt set.

    Args:
        path: of the PNG; written as a whole.
        summaries: of the base model (the first) and of every model of ``scales``; a row of panels for each number of
            sampling steps.
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
    rows = [[_panel(summaries, placed, steps, metric, len(all_steps) > 1) for metric in UP] for steps in all_steps]
    write_atomic(Path(path), png_of_panels(rows, 13, 4.2 * len(rows)))


def _panel(
    summaries: Sequence[Summary], placed: Mapping[str, float], steps: int, metric: str, titled: bool
) -> Panel:  # fmt: skip
    lines = []
    here = [s for s in summaries if s.steps == steps]
    for place, name in enumerate(dict.fromkeys(s.set for s in here)):
        by_model = {s.model: s.mean for s in here if s.set == name}
        points = [(by_model[m]["reward"], by_model[m][metric], f"{k:g}" if k else "base") for m, k in placed.items()]
        finite = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
        x, y, notes = zip(*finite, strict=True) if finite else ((), (), ())
        lines.append(Line(set_title(name), STYLES[place % len(STYLES)], [(np.array(x), np.array(y))], notes=notes))
    return Panel(metric_of("reward").axis, metric_of(metric).axis, f"{steps} sampling steps" if titled else "", lines)
