"""Every two rows of a table against each other, over all prompts: which is higher, and is that beyond chance?

Two things are chance, and each has a bound of its own. ``low`` and ``high`` are a bootstrap over prompts, paired by
prompt and noise, for the seeds that were trained. ``half`` is that of Welch's interval over seeds, for the prompts
that were asked: with v the variance of the seeds' means and n their number, the difference ± t sqrt(v1 / n1 + v2 / n2).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np

from rlvid.escape import csv_text
from rlvid.evaluate.columns import gain_text, main_metrics, title_of
from rlvid.evaluate.grid import Cell, Grid, latex_page
from rlvid.evaluate.rows import Row, metrics_of
from rlvid.files import write_whole
from rlvid.stats import MIN_PROMPTS, RESAMPLES, beyond_chance, bootstrap_interval, welch

MOST = 10
"""Rows; of more, every two are too many to read."""


@dataclass(frozen=True)
class Versus:
    """How much higher ``one`` is than ``other``; NaN where there is no bound: one prompt, or one seed.

    ``videos`` counts the noises, of ``prompts`` prompts, from which all models of both rows have a finite score.
    """

    one: str
    other: str
    steps: int
    metric: str
    videos: int
    prompts: int
    difference: float
    low: float
    high: float
    half: float

    @property
    def sure(self) -> bool:
        """Whether the difference is beyond every bound that there is, over enough prompts."""
        by_seeds = not math.isfinite(self.half) or abs(self.difference) > self.half
        return beyond_chance(self.low, self.high, self.prompts) != 0 and by_seeds


def versus(
    rows: Sequence[Row], groups: Mapping[str, Sequence[str]], base: str, *, resamples: int = RESAMPLES
) -> list[Versus]:
    """Every two rows, for each number of steps and metric; the higher one is ``one``.

    Args:
        rows: of one prompt set, see ``rlvid.evaluate.layouts.pooled``.
        groups: names of models by the row that they are together.
        base: name of the base model, a row of its own.
        resamples: of the bootstrap.
    """
    metrics, videos = main_metrics(metrics_of(rows)), dict[int, dict[tuple[int, int], dict[str, Row]]]()
    for row in rows:
        videos.setdefault(row.steps, {}).setdefault((row.index, row.copy), {})[row.model] = row
    members, found = {base: [base], **groups}, []
    for steps, by_video in videos.items():
        for metric in metrics:
            for pair in combinations(members, 2):
                sides = [
                    np.array([[by[name].score(metric) for name in members[row]] for by in by_video.values()])
                    for row in pair
                ]
                whole = np.isfinite(np.concatenate(sides, 1)).all(1)
                prompts = np.array([index for index, _ in by_video])[whole]
                if whole.any():
                    one, other = (1, 0) if sides[1][whole].mean() > sides[0][whole].mean() else (0, 1)
                    seeds = [[] if pair[i] == base else sides[i][whole].mean(0).tolist() for i in (one, other)]
                    gains = sides[one][whole].mean(1) - sides[other][whole].mean(1)
                    low, high = bootstrap_interval(gains, prompts, resamples)
                    counts = (len(gains), len(set(prompts.tolist())))
                    found.append(
                        Versus(
                            pair[one], pair[other], steps, metric, *counts, float(gains.mean()), low, high,
                            welch(*seeds),
                        )
                    )  # fmt: skip
    return found


def versus_grids(found: Sequence[Versus]) -> dict[int, Grid]:
    """Number of steps -> the table with a row for every two, metrics across."""
    metrics, grids = list(dict.fromkeys(each.metric for each in found)), {}
    for steps in dict.fromkeys(each.steps for each in found):
        pairs: dict[frozenset[str], dict[str, Versus]] = {}
        for each in found:
            if each.steps == steps:
                pairs.setdefault(frozenset((each.one, each.other)), {})[each.metric] = each
        rows = []
        for by_metric in pairs.values():
            first = next(iter(by_metric.values()))  # all differences of a row go the way of its first
            signs = {metric: 1 if each.one == first.one else -1 for metric, each in by_metric.items()}
            cells = [_cell(by_metric[m], signs[m]) if m in by_metric else Cell("–") for m in metrics]
            rows.append([Cell(first.one), Cell(first.other), *cells])
        grids[steps] = Grid(["Model", "minus", *map(title_of, metrics)], rows, 2)
    return grids


def versus_legend(groups: Mapping[str, Sequence[str]]) -> str:
    """How to read the tables."""
    seeds = any(len(names) > 1 for names in groups.values())
    return (
        "The first minus the second: difference [95 % interval of a bootstrap over prompts, paired by prompt and noise"
        + ("] ± half of Welch's 95 % interval over seeds, where both have several or one is the base" if seeds else "]")
        + f". Bold: beyond every bound that is shown, over {MIN_PROMPTS} prompts or more. Each difference is judged by "
        "itself, without a correction for their number."
    )


def versus_markdown(found: Sequence[Versus], groups: Mapping[str, Sequence[str]]) -> str:
    """A page with a table for each number of steps."""
    lines = ["# Each against each, over all prompts", ""]
    for steps, grid in versus_grids(found).items():
        lines += [f"## {steps} DDIM steps", "", grid.markdown(), ""]
    return "\n".join([*lines, versus_legend(groups), ""])


def _cell(each: Versus, sign: int) -> Cell:
    low, high = sorted((sign * each.low, sign * each.high))
    text = gain_text(sign * each.difference, low, high)
    return Cell(text + (f" ± {each.half:.3f}" if math.isfinite(each.half) else ""), each.sure)


def write_versus(folder: Path, found: Sequence[Versus], groups: Mapping[str, Sequence[str]]) -> list[Path]:
    """Writes ``versus.md``, ``.tex`` and ``.csv`` (a line for every two rows, number of steps and metric)."""
    lines = csv_text([[each.name for each in fields(Versus)], *map(astuple, found)])
    legend = versus_legend(groups)
    tables = [grid.latex(f"Each against each, D = {steps}. {legend}") for steps, grid in versus_grids(found).items()]
    contents = {"md": versus_markdown(found, groups), "csv": lines, "tex": latex_page(tables)}
    for suffix, text in contents.items():
        write_whole(folder / f"versus.{suffix}", text.encode())
    return [folder / f"versus.{suffix}" for suffix in contents]
