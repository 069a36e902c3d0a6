"""The report on gradient ascent on pixels: a table in Markdown, all numbers as JSON, and a picture of one video."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.benchmark.regret import ORACLE, Mean
from rlvid.evaluate.tables.table import Grid, json_text
from rlvid.files import write_atomic
from rlvid.metric_names import NONE, REWARD_PREFIX, Metric, metric_of
from rlvid.plots.frames import draw_steps
from rlvid.stats import bootstrap_interval

DEVIATIONS = Metric("deviations", "Gain in deviations", digits=2)
STEM = "ascent"


@dataclass(frozen=True)
class Ascent:
    """A reward that was maximised on pixels.

    Attributes:
        name: of the reward.
        metric: its key in ``scores``.
        places_B: the prompt of each video; the videos of a prompt are one draw of the bootstrap.
        scores: step -> metric -> score of each video (B,); step 0 is the start.
        first: step -> the first video (F, 3, H, W), uint8.
    """

    name: str
    metric: str
    places_B: np.ndarray
    scores: Mapping[int, Mapping[str, np.ndarray]]
    first: Mapping[int, Tensor]

    @property
    def steps(self) -> list[int]:
        """The recorded steps, ascending."""
        return sorted(self.scores)

    @property
    def half(self) -> int:
        """The first recorded step with half of the reward's final gain or more; the last if there is no gain."""
        gains = {step: self.gain(self.metric, step).value for step in self.steps[1:]}
        final = gains[self.steps[-1]]
        return next((step for step, gain in gains.items() if gain >= final / 2 > 0), self.steps[-1])

    def gain(self, metric: str, step: int) -> Mean:
        """Returns the mean gain of a metric since the start, with its 95 % bootstrap interval over prompts."""
        gain_B = self.scores[step][metric] - self.scores[0][metric]
        finite = np.isfinite(gain_B)
        if not finite.any():
            return Mean(*[float("nan")] * 3)
        return Mean(float(gain_B[finite].mean()), *bootstrap_interval(gain_B[finite], self.places_B[finite]))

    def deviations(self, metric: str, step: int) -> Mean:
        """Returns the same in standard deviations of the start's scores over videos; NaN where they are all equal."""
        gain, spread = self.gain(metric, step), float(np.nanstd(self.scores[0][metric], ddof=1))
        values = (each / spread if spread > 0 else float("nan") for each in (gain.value, gain.low, gain.high))
        return Mean(*values)


def write_report(out: Path, ascents: Sequence[Ascent]) -> str:
    """Writes ``ascent.md``, ``ascent.json`` and ``ascent.png`` into a folder; returns the page."""
    page = page_of(ascents)
    write_atomic(out / f"{STEM}.md", page.encode())
    write_atomic(out / f"{STEM}.json", json_text({each.name: figures(each) for each in ascents}).encode())
    shared = [step for step in ascents[0].steps if all(step in each.first for each in ascents)]
    frames = {step: torch.stack([each.first[step] for each in ascents]) for step in shared}
    draw_steps(out / f"{STEM}.png", [f"ascent on {each.name}" for each in ascents], frames)
    return page


def figures(ascent: Ascent) -> dict[str, object]:
    """Returns the mean and the gain of every metric at every recorded step."""
    return {
        "half": ascent.half,
        "steps": {
            step: {
                metric: {
                    "mean": float(np.nanmean(ascent.scores[step][metric])),
                    "gain": asdict(ascent.gain(metric, step)),
                    "deviations": asdict(ascent.deviations(metric, step)),
                }
                for metric in ascent.scores[step]
            }
            for step in ascent.steps
        },
    }


def page_of(ascents: Sequence[Ascent]) -> str:
    """Returns the table, and how to read it."""
    first = ascents[0]
    videos, prompts = len(first.places_B), len(np.unique(first.places_B))
    lines = [
        "# Gradient ascent on pixels", "",
        f"{videos} videos of {prompts} prompts by the base model; Adam maximises a reward on their pixels for "
        f"{first.steps[-1]} steps.", "",
        grid_of(ascents).markdown(), "",
        "Gains are means over videos since the start, with 95 % bootstrap intervals over prompts. Those of rewards are "
        "in standard deviations of the reward's scores at the start, so that rewards of different units compare; the "
        "oracle's is in its own score, from 0 to 1. Half: the first recorded step at which the reward has half of its "
        "final gain or more. A reward that is harder to game gains less without a gain of the oracle.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def grid_of(ascents: Sequence[Ascent]) -> Grid:
    """Returns two rows for each reward, at half of its gain and at its end; a column for each other reward."""
    seen = {metric for each in ascents for metric in each.scores[0]}
    judges = sorted(metric for metric in seen if metric.startswith(REWARD_PREFIX))
    oracle = metric_of(ORACLE)
    rows = []
    for each in ascents:
        for when, step in (("half", each.half), ("end", each.steps[-1])):
            own, gold = each.deviations(each.metric, step), each.gain(ORACLE, step)
            beside = [
                NONE if metric == each.metric or metric not in each.scores[step]
                else _cell(DEVIATIONS, each.deviations(metric, step))
                for metric in judges
            ]  # fmt: skip
            rows.append([each.name, f"{when} ({step})", _cell(DEVIATIONS, own), _cell(oracle, gold), *beside])
    names = [f"Gain of {metric.removeprefix(REWARD_PREFIX)}" for metric in judges]
    return Grid(["Maximised reward", "Step", "Its gain", "Gain of the oracle", *names], rows, words=2)


def _cell(metric: Metric, mean: Mean) -> str:
    return metric.interval(mean.value, mean.low, mean.high, "+")
