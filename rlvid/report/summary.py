"""An evaluation in plain words and in tables: what rose, what fell, what is not beyond chance, what to be wary of."""

import math
from dataclasses import dataclass, field

import numpy as np

from rlvid.evaluate.results.about import ModelRecord
from rlvid.evaluate.results.read import Difference, EvaluationData
from rlvid.metric_names import KNOWN, metric_of, set_title
from rlvid.stats import mean_and_std

_SPOKEN = ("held_out", "reward", "consistency", "motion", "diversity", "oracle_score")
_TRAINED, _HELD_OUT, _MOTION, _CONSISTENCY = "reward", "held_out", "motion", "consistency"


@dataclass
class ModelSummary:
    """The summary of one model: a headline, one line a prompt set and D, and what to be wary of."""

    model: ModelRecord
    headline: str
    lines: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)


Stats = dict[tuple[str, str], tuple[float, float, int]]
"""Mean, standard deviation and count of each (model, metric)."""


@dataclass(frozen=True)
class Cell:
    """A number of a table, and the gain over the base below it; ``way`` is 1 or -1 where that is beyond chance."""

    text: str
    gain: str = ""
    way: int = 0
    best: bool = False


def title(metric: str) -> str:
    """How a metric is called."""
    return metric_of(metric).name


def shown_set(name: str) -> str:
    """How a prompt set is called."""
    return set_title(name)


def number(value: float, metric: str = "", signed: bool = False) -> str:
    """A value of a metric as pages show it, with a true minus; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    text = metric_of(metric).number(value, "+" if signed else "")
    bare = text.lstrip("+-").replace("0", "").strip(".% ")
    return (text if bare else text.lstrip("+-")).replace("-", "−")


def shown_metrics(evaluation: EvaluationData) -> list[str]:
    """Metrics with a number for any video, those that tables know first."""
    metrics = evaluation.about.metrics
    known = [metric for metric in KNOWN if metric in metrics]
    return [m for m in [*known, *(m for m in metrics if m not in known)] if evaluation.has(m)]


def finite_scores(
    evaluation: EvaluationData, model: str, name: str, steps: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """A model's scores in a metric, where they are finite, and the prompt's index of each."""
    found = [
        (v[metric], case.index)
        for (m, case), v in evaluation.scores.items()
        if (m, case.set, case.steps) == (model, name, steps) and math.isfinite(v[metric])
    ]
    return np.array([value for value, _ in found], dtype=np.float64), np.array([index for _, index in found], dtype=int)


def mean(evaluation: EvaluationData, model: str, name: str, steps: int, metric: str) -> tuple[float, float, int]:
    """Mean, standard deviation over videos, and how many have a number."""
    values, _ = finite_scores(evaluation, model, name, steps, metric)
    return *mean_and_std(values), len(values)


def summarise_models(evaluation: EvaluationData) -> list[ModelSummary]:
    """The summary: one entry for each tuned model."""
    return [_summarise(evaluation, model) for model in evaluation.tuned]


def _summarise(evaluation: EvaluationData, model: ModelRecord) -> ModelSummary:
    groups = [(name, steps) for name in evaluation.about.sets for steps in evaluation.about.steps]
    found = {
        (name, steps, metric): difference
        for (m, name, steps, metric), difference in evaluation.differences.items() if m == model.name
    }  # fmt: skip
    judge = evaluation.judge
    ways = [found[name, steps, judge].way for name, steps in groups if (name, steps, judge) in found]
    summary = ModelSummary(model, _headline(title(judge), ways))
    for name, steps in groups:
        parts = [
            _change(evaluation, model, name, steps, metric, found[name, steps, metric])
            for metric in _SPOKEN
            if metric in shown_metrics(evaluation)
            and (name, steps, metric) in found
            and found[name, steps, metric].pairs
        ]
        gains = [evaluation.gain(model.name, c, judge) for c in evaluation.cases if (c.set, c.steps) == (name, steps)]
        better, worse = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
        tally = f"Of {len(gains)} videos {better} are better by the {title(judge).lower()} and {worse} worse."
        summary.lines.append(
            f"{_where(name, steps)}: {'; '.join(parts)}. {tally}" if parts else f"{_where(name, steps)}: {tally}"
        )

        def way(metric: str, name: str = name, steps: int = steps) -> int:
            return found[name, steps, metric].way if (name, steps, metric) in found else 0

        if way(_TRAINED) > 0 and way(_HELD_OUT) < 0:
            summary.cautions.append(
                f"{_where(name, steps)}: the trained reward rose while the held-out reward fell, the mark of "
                "over-optimisation."
            )
        if way(_MOTION) < 0 and way(_CONSISTENCY) > 0:
            summary.cautions.append(
                f"{_where(name, steps)}: consistency rose while motion fell: look whether videos freeze."
            )
        if way("diversity") < 0:
            summary.cautions.append(
                f"{_where(name, steps)}: diversity fell: videos of a prompt have become more alike."
            )
    return summary


def _headline(name: str, ways: list[int]) -> str:
    up, down, of = ways.count(1), ways.count(-1), len(ways)
    if not of:
        return f"There is no comparison of the {name.lower()} with the base."
    if of == 1:
        return f"{name} {('is not different beyond chance', 'rose', 'fell')[ways[0]]}."
    if up == of or down == of:
        return f"{name} {'rose' if up else 'fell'} beyond chance in all {of} comparisons."
    parts = [f"{word} beyond chance in {many}" for word, many in (("rose", up), ("fell", down)) if many]
    rest = of - up - down
    return (
        f"{name}: "
        + (", ".join(parts) + f" of {of} comparisons" if parts else f"no change beyond chance in {rest} comparisons")
        + "."
    )


def _change(
    evaluation: EvaluationData, model: ModelRecord, name: str, steps: int, metric: str, found: Difference
) -> str:
    before, after = (mean(evaluation, m, name, steps, metric)[0] for m in (evaluation.base.name, model.name))
    word = ("no change beyond chance", "rose", "fell")[found.way]
    return (
        f"{metric_of(metric).spoken} {number(before, metric)} to "
        f"{number(after, metric)} ({word}: {gain_text(found, metric)})"
    )


def gain_text(found: Difference, metric: str) -> str:
    """``+0.123 [0.100, 0.140]``, with a true minus."""
    return metric_of(metric).gain(found.difference, found.low, found.high).replace("-", "−")


def table(evaluation: EvaluationData, steps: int) -> list[tuple[str, ModelRecord, int, list[Cell]]]:
    """The rows of the table of one D: set, model, videos, and a cell for each of ``shown_metrics``."""
    metrics, rows = shown_metrics(evaluation), []
    for name in evaluation.about.sets:
        stats = {(m.name, k): mean(evaluation, m.name, name, steps, k) for m in evaluation.models for k in metrics}
        for model in evaluation.models:
            cells = [_cell(evaluation, stats, model, name, steps, metric) for metric in metrics]
            count = sum((case.set, case.steps) == (name, steps) for case in evaluation.cases)
            rows.append((name, model, count, cells))
    return rows


def _cell(evaluation: EvaluationData, stats: Stats, model: ModelRecord, name: str, steps: int, metric: str) -> Cell:
    known, (middle, std, _) = metric_of(metric), stats[model.name, metric]
    text = known.mean(middle, std if known.spread else math.nan).replace("-", "−")
    best = model.name in known.best({m.name: stats[m.name, metric][0] for m in evaluation.models})
    found = evaluation.differences.get((model.name, name, steps, metric))
    if found is None or not found.pairs:
        return Cell(text, best=best)
    return Cell(text, gain_text(found, metric), found.way, best)


def _where(name: str, steps: int) -> str:
    return f"{shown_set(name).capitalize()}, D = {steps}"
