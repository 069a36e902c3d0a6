"""Every two rows of a table against each other, over all prompts: which is higher, and is that beyond chance?

Two things are chance, and each has a bound of its own. ``low`` and ``high`` are a bootstrap over prompts, paired by
prompt and noise, for the seeds that were trained. ``half`` is that of Welch's interval over seeds, for the prompts
that were asked: with v the variance of the seeds' means and n their number, the difference ± t sqrt(v1 / n1 + v2 / n2)
(B. L. Welch, Biometrika 34, 1947).
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np

from rlvid.evaluate import write_whole
from rlvid.evaluate.columns import gain_text, title_of
from rlvid.evaluate.comparison import STUDENT
from rlvid.evaluate.grid import Cell, Grid
from rlvid.evaluate.rows import EXTRA, Row, bootstrap_means, metrics_of

_SHOWN = ("reward", "held_out", "clipsim", "consistency", "motion", "diversity", "oracle_score")
MOST = 10
"""Rows; of more, every two are too many to read."""


@dataclass(frozen=True)
class Versus:
    """How much higher ``one`` is than ``other``; NaN where there is no bound: one prompt, or one seed."""

    one: str
    other: str
    steps: int
    metric: str
    difference: float
    low: float
    high: float
    half: float

    @property
    def sure(self) -> bool:
        """Whether the difference is beyond every bound that there is, and there is one."""
        bounds = [bound for bound in (self.low, self.high, self.half) if math.isfinite(bound)]
        by_prompts = not math.isfinite(self.low) or self.low > 0 or self.high < 0
        by_seeds = not math.isfinite(self.half) or abs(self.difference) > self.half
        return bool(bounds) and by_prompts and by_seeds


def versus(
    rows: Sequence[Row], groups: Mapping[str, Sequence[str]], base: str, *, resamples: int = 2000
) -> list[Versus]:
    """Every two rows, for each number of steps and metric; the higher one is ``one``.

    A video counts where all models have a finite score of it.

    Args:
        rows: of one prompt set, see ``rlvid.evaluate.layouts.pooled``.
        groups: names of models by the row that they are together.
        base: name of the base model, a row of its own.
        resamples: of the bootstrap.
    """
    scores: dict[tuple[int, str], dict[tuple[int, int], dict[str, float]]] = {}
    for row in rows:
        for metric in (m for m in metrics_of(rows) if m in _SHOWN or m.startswith(EXTRA)):
            scores.setdefault((row.steps, metric), {}).setdefault((row.index, row.copy), {})[row.model] = row.score(
                metric
            )
    members, found = {base: [base], **groups}, []
    for (steps, metric), videos in scores.items():
        whole = {video: by for video, by in videos.items() if all(map(math.isfinite, by.values()))}
        if not whole:
            continue
        prompts = np.array([index for index, _ in whole])
        by_row = {row: np.array([[by[m] for m in names] for by in whole.values()]) for row, names in members.items()}
        for pair in combinations(members, 2):
            one, other = sorted(pair, key=lambda row: -by_row[row].mean())
            gains = by_row[one].mean(1) - by_row[other].mean(1)
            low = high = math.nan
            if len(set(prompts.tolist())) > 1:
                means = bootstrap_means(gains, prompts, resamples, np.random.default_rng(0))
                low, high = np.percentile(means, [2.5, 97.5])
            half = welch(*([] if row == base else by_row[row].mean(0).tolist() for row in (one, other)))
            found.append(Versus(one, other, steps, metric, float(gains.mean()), float(low), float(high), half))
    return found


def welch(*samples: Sequence[float]) -> float:
    """Half the 95 % interval of a difference of two means; an empty sample's mean is known. NaN for a sample of one.

    The degrees of freedom are rounded down to a whole number.
    """
    if any(len(sample) == 1 for sample in samples) or not any(samples):
        return math.nan
    parts = [(float(np.var(sample, ddof=1)) / len(sample), len(sample) - 1) for sample in samples if sample]
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / free for part, free in parts) if total else min(free for _, free in parts)
    return STUDENT[min(int(freedom + 1e-9), len(STUDENT)) - 1] * math.sqrt(total)


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
        grids[steps] = Grid(["Of", "less", *map(title_of, metrics)], rows, 2)
    return grids


def versus_legend(groups: Mapping[str, Sequence[str]]) -> str:
    """How to read the tables."""
    seeds = any(len(names) > 1 for names in groups.values())
    return (
        "A row's first model less its second: difference [95 % interval of a bootstrap over prompts, paired by prompt "
        "and noise]"
        + (" ± half of Welch's 95 % interval over seeds. Bold: beyond both." if seeds else ". Bold: beyond chance.")
        + " Every difference is judged by itself, without a correction for their number."
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
    """Writes ``versus.md`` and ``versus.csv`` (a line for every two rows, number of steps and metric)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([each.name for each in fields(Versus)])
    for each in found:
        writer.writerow(["" if isinstance(v, float) and not math.isfinite(v) else v for v in astuple(each)])
    paths = [folder / "versus.md", folder / "versus.csv"]
    for path, text in zip(paths, (versus_markdown(found, groups), out.getvalue()), strict=True):
        write_whole(path, text.encode())
    return paths
