"""The paper's tables: a row a model, a column a prompt set and number of DDIM steps.

========  ==================================================================
layout    cells
========  ==================================================================
table-a1  reward, mean ± standard deviation over videos
table-a2  CLIPSIM and temporal consistency (consecutive frames), means
========  ==================================================================

The best of a column is bold.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from rlvid.evaluate import write_whole
from rlvid.evaluate.columns import set_title
from rlvid.evaluate.grid import Cell, Grid, latex_page
from rlvid.evaluate.rows import Summary

LAYOUTS = {
    "table-a1": ("reward",),
    "table-a2": ("clipsim", "consistency"),
}
_HEADS = {"reward": "reward", "clipsim": "CLIPSIM", "consistency": "Temp. cons."}
_CAPTIONS = {
    "table-a1": "Reward, mean ± standard deviation over videos, for each prompt set and number of DDIM steps D.",
    "table-a2": "CLIPSIM and temporal consistency for each prompt set and number of DDIM steps D.",
}


def layout(name: str, summaries: Sequence[Summary]) -> Grid:
    """The table of a layout.

    Raises:
        KeyError: there is no such layout.
    """
    metrics, spread = LAYOUTS[name], name == "table-a1"
    sets, steps = (list(dict.fromkeys(getattr(s, key) for s in summaries)) for key in ("set", "steps"))
    columns = [(each, d, metric) for each in sets for d in steps for metric in metrics]
    models = list(dict.fromkeys(s.model for s in summaries))
    found = {(s.model, s.set, s.steps): s for s in summaries}
    best = {
        column: max(means)
        for column in columns
        if len(set(means := [m for model in models if not math.isnan(m := _shown(found, model, column))])) > 1
    }
    rows = [
        [Cell(model), *(Cell(_text(found, model, c, spread), _shown(found, model, c) == best.get(c)) for c in columns)]
        for model in models
    ]
    if spread:
        return Grid(
            ["Model", *(f"D = {d}" for _, d, _ in columns)], rows, 1, [(set_title(s), len(steps)) for s in sets]
        )
    groups = [(f"{set_title(each)}, D = {d}", len(metrics)) for each in sets for d in steps]
    return Grid(["Model", *(_HEADS[metric] for _, _, metric in columns)], rows, 1, groups)


def _shown(
    found: dict[tuple[str, str, int], Summary], model: str, column: tuple[str, int, str], digits: int = 3
) -> float:
    """A mean as its cell shows it; NaN where there is none."""
    summary = found.get((model, *column[:2]))
    return round(summary.mean[column[2]], digits) if summary and summary.used[column[2]] else math.nan


def _text(found: dict[tuple[str, str, int], Summary], model: str, column: tuple[str, int, str], spread: bool) -> str:
    mean = _shown(found, model, column)
    if math.isnan(mean):
        return "–"
    std = found[(model, *column[:2])].std[column[2]]
    return f"{mean:.3f} ± {std:.3f}" if spread and math.isfinite(std) else f"{mean:.3f}"


def layout_csv(name: str, summaries: Sequence[Summary]) -> str:
    """The same numbers unrounded: a line a model; empty where there is none."""
    metrics = LAYOUTS[name]
    parts = ("mean", "std") if name == "table-a1" else ("mean",)
    places = list(dict.fromkeys((s.set, s.steps) for s in summaries))
    places.sort(key=lambda place: list(dict.fromkeys(s.set for s in summaries)).index(place[0]))
    found = {(s.model, s.set, s.steps): s for s in summaries}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", *(f"{s}_d{d}_{m}_{part}" for s, d in places for m in metrics for part in parts)])
    for model in dict.fromkeys(s.model for s in summaries):
        summaries_here = [found.get((model, *place)) for place in places]
        values = [getattr(s, part)[m] if s else math.nan for s in summaries_here for m in metrics for part in parts]
        writer.writerow([model, *(value if math.isfinite(value) else "" for value in values)])
    return out.getvalue()


def write_layouts(folder: Path, summaries: Sequence[Summary]) -> list[Path]:
    """Writes ``table-a1`` and ``table-a2`` as ``.md``, ``.csv`` and ``.tex``, each whole or not at all."""
    paths = []
    for name in LAYOUTS:
        grid = layout(name, summaries)
        contents = {
            "md": f"{grid.markdown()}\n\n{_CAPTIONS[name]} The best of a column is bold.\n",
            "csv": layout_csv(name, summaries),
            "tex": latex_page([grid.latex(_CAPTIONS[name])]),
        }
        for suffix, text in contents.items():
            paths.append(folder / f"{name}.{suffix}")
            write_whole(paths[-1], text.encode())
    return paths
