"""The summary of an evaluation in sentences and tables: gains, losses, changes within chance, warnings."""

from dataclasses import dataclass, field
from itertools import product

from rlvid.evaluate.results.about import ModelRecord
from rlvid.evaluate.results.read import Difference, EvaluationData
from rlvid.evaluate.results.summary import Summary
from rlvid.evaluate.tables.pages import score_rows
from rlvid.evaluate.tables.table import Cell
from rlvid.metric_names import KNOWN, Metric, metric_of, set_title

_SPOKEN = ("held_out", "reward", "consistency", "motion", "diversity", "oracle_score")
_CAUTIONS: dict[str, dict[str, int]] = {
    "the trained reward rose while the held-out reward fell, the mark of over-optimisation.": {
        "reward": 1, "held_out": -1,
    },
    "consistency rose while motion fell: look whether videos freeze.": {"motion": -1, "consistency": 1},
    "diversity fell: videos of a prompt have become more alike.": {"diversity": -1},
}  # fmt: skip
"""Caution -> the ways of metrics that call for it; see ``Difference.way``."""


@dataclass
class ModelSummary:
    """The summary of one model: a headline, a line per prompt set and D, and warnings."""

    model: ModelRecord
    headline: str
    lines: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GainCell(Cell):
    """A cell with the gain over the base below it; ``way`` is 1 or -1 where that is beyond chance."""

    gain: str = ""
    way: int = 0


def shown_metrics(evaluation: EvaluationData) -> list[Metric]:
    """Metrics with a number for any video, those that tables know first."""
    metrics = evaluation.about.metrics
    ordered = [*(key for key in KNOWN if key in metrics), *(key for key in metrics if key not in KNOWN)]
    return [metric_of(key) for key in ordered if evaluation.has(key)]


def summarise_models(evaluation: EvaluationData) -> list[ModelSummary]:
    """Returns the summary: one entry for each tuned model."""
    return [_summarise(evaluation, model) for model in evaluation.tuned]


def _summarise(evaluation: EvaluationData, model: ModelRecord) -> ModelSummary:
    found = {
        group: {key: each for (m, *at, key), each in evaluation.differences.items() if (m, *at) == (model.name, *group)}
        for group in product(evaluation.about.sets, evaluation.about.steps)
    }
    shown, judge = {metric.key for metric in shown_metrics(evaluation)}, metric_of(evaluation.judge)
    summary = ModelSummary(
        model, _headline(judge, [each[judge.key].way for each in found.values() if judge.key in each])
    )
    for (name, steps), differences in found.items():
        where = f"{set_title(name).capitalize()}, D = {steps}"
        parts = [
            _change(evaluation, model, name, steps, metric_of(key), differences[key])
            for key in _SPOKEN
            if key in shown and key in differences and differences[key].pairs
        ]
        cases = [case for case in evaluation.cases if (case.set, case.steps) == (name, steps)]
        gains = [evaluation.gain(model.name, case, judge.key) for case in cases]
        better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        tally = f"Of {len(gains)} videos {better} are better by the {judge.spoken} and {worse} worse."
        summary.lines.append(f"{where}: {'; '.join(parts)}. {tally}" if parts else f"{where}: {tally}")
        ways = {key: difference.way for key, difference in differences.items()}
        summary.cautions += [f"{where}: {text}" for text, signs in _CAUTIONS.items() if signs.items() <= ways.items()]
    return summary


def _headline(judge: Metric, ways: list[int]) -> str:
    up, down, of = ways.count(1), ways.count(-1), len(ways)
    if not of:
        return f"There is no comparison of the {judge.spoken} with the base."
    if of == 1:
        return f"{judge.name} {('is not different beyond chance', 'rose', 'fell')[ways[0]]}."
    if of in (up, down):
        return f"{judge.name} {'rose' if up else 'fell'} beyond chance in all {of} comparisons."
    parts = [f"{word} beyond chance in {many}" for word, many in (("rose", up), ("fell", down)) if many]
    found = f"{', '.join(parts)} of {of} comparisons" if parts else f"no change beyond chance in {of} comparisons"
    return f"{judge.name}: {found}."


def _change(
    evaluation: EvaluationData, model: ModelRecord, name: str, steps: int, metric: Metric, found: Difference
) -> str:
    means = [evaluation.summaries[each, name, steps].mean[metric.key] for each in (evaluation.base.name, model.name)]
    word = ("no change beyond chance", "rose", "fell")[found.way]
    gain = metric.gain(found.difference, found.low, found.high)
    numbers = f"{metric.number(means[0])} to {metric.number(means[1])} ({word}: {gain})"
    return f"{metric.spoken} {numbers.replace('-', '−')}"


def table(evaluation: EvaluationData, steps: int) -> list[tuple[ModelRecord, Summary, list[GainCell]]]:
    """Returns the table's rows for one D: a model, the summary of its videos of a set, a cell per metric."""
    models, metrics = {model.name: model for model in evaluation.models}, shown_metrics(evaluation)
    summaries = [evaluation.summaries[name, each, steps] for each in evaluation.about.sets for name in models]
    rows = []
    for summary, cells in score_rows(summaries, metrics):
        gained = []
        for cell, metric in zip(cells, metrics, strict=True):
            found = evaluation.differences.get((summary.model, summary.set, steps, metric.key))
            gain = metric.gain(found.difference, found.low, found.high) if found and found.pairs else ""
            gained.append(GainCell(cell.text, cell.bold, gain, found.way if found and gain else 0))
        rows.append((models[summary.model], summary, gained))
    return rows
