"""The findings of a sweep in sentences, with the certainty that its videos allow."""

import math
import statistics
from typing import Any

from rlvid.escape import markdown_text
from rlvid.evaluate.results.summary import Comparison
from rlvid.metric_names import metric_of
from rlvid.models.video_shape import resolved_shape
from rlvid.stats import MIN_PROMPTS
from tuning.description import Sweep
from tuning.journal import INVALID
from tuning.outcomes import Outcome, compared_by, difference
from tuning.space import Dimension, label, shown


def found(sweep: Sweep, outcomes: list[Outcome], order: list[Outcome], base: dict[str, Any] | None) -> list[str]:
    """Returns the findings as a list in Markdown: the best trial, its certainty, and the effect of each setting."""
    best, metric = order[0], metric_of(sweep.metric)
    compared = metric_of(compared_by(sweep, best, base))
    settings = markdown_text(shown(best.trial.settings))
    ends = [one.trial.end for one in outcomes]
    invalid = f"{ends.count(INVALID)} were {INVALID}, " if INVALID in ends else ""
    lines = [
        f"- {len(outcomes)} trials: {ends.count('finished')} ran to the last of {', '.join(map(str, sweep.rungs))} "
        f"{sweep.unit_name}, {ends.count('stopped early')} were stopped early, {ends.count('failed')} failed, "
        f"{invalid}{ends.count(None)} are open.",
        f"- **Best by {metric.spoken}: {best.trial.name}, {settings}**, with "
        f"{metric.number(best.value(sweep.metric))} after {best.step} {sweep.unit_name}.",
    ]
    if base is not None and (gain := difference(best, base, compared.key)):
        lines.append(
            f"- The base's mean {compared.spoken} is {compared.number(base['mean'][compared.key])}: a difference of "
            f"{compared.gain(gain.difference, gain.low, gain.high)} (paired over {gain.pairs} videos, 95 % bootstrap "
            f"interval){'' if gain.way else f', which may be chance{_few(gain)}'}."
        )
    second = order[1] if len(order) > 1 else None
    # Where the second gains least, the best by the least gain is never below it.
    compared = metric_of(compared_by(sweep, second or best, base))
    if second and best.step is not None and (gain := difference(best, second.scores[best.step], compared.key)):
        lines.append(
            f"- The next one, {second.trial.name} ({markdown_text(shown(second.trial.settings))}), has "
            f"{metric.number(second.value(sweep.metric))}: a difference in {compared.spoken} of "
            f"{compared.gain(gain.difference, gain.low, gain.high)}, "
            + ("which these videos tell apart." if gain.way else f"which may be chance{_few(gain)}.")
        )
    lines += [line for dimension in sweep.dimensions if (line := _effect(sweep, dimension, outcomes))]
    if "seed" not in sweep.space:
        lines.append("- Each trial is one seed; what another seed would have given is not in these numbers.")
    return lines


def _few(gain: Comparison) -> str:
    """Returns a note that there are too few prompts, if the interval leaves out 0."""
    few = (gain.low > 0 or gain.high < 0) and gain.prompts < MIN_PROMPTS
    return f" ({gain.prompts} prompts; certainty takes {MIN_PROMPTS})" if few else ""


def _effect(sweep: Sweep, dimension: Dimension, outcomes: list[Outcome]) -> str | None:
    """Returns a line with the mean of each value at the first rung, where all have the same number of steps."""
    step, metric, means = sweep.rungs[0], metric_of(sweep.metric), []
    for name, members in _groups(dimension, outcomes).items():
        values = [v for v in (one.value(sweep.metric, step) for one in members) if math.isfinite(v)]
        if values:
            means.append(f"{markdown_text(name)}: {metric.number(statistics.fmean(values))} ({len(values)})")
    if len(means) < 2:
        return None
    return f"- `{dimension.key}` after {step} {sweep.unit_name}, mean {metric.spoken} (trials): {', '.join(means)}."


def _groups(dimension: Dimension, outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    """Trials by the value of a setting; of a range, by its lower and upper half."""
    if dimension.kind == "choice":
        return {
            label(value): [one for one in outcomes if one.trial.settings[dimension.key] == value]
            for value in dimension.values
        }
    low, high = dimension.values
    middle = math.sqrt(low * high) if dimension.kind == "loguniform" else (low + high) / 2
    halves: tuple[list[Outcome], list[Outcome]] = [], []
    for one in outcomes:
        halves[one.trial.settings[dimension.key] > middle].append(one)
    return {f"up to {middle:.4g}": halves[0], "above": halves[1]}


def next_steps(sweep: Sweep, order: list[Outcome]) -> list[str]:
    """Returns the next steps as a list in Markdown."""
    lines = [
        "- `rlvid train best.yaml` trains the best settings for the base's own number of steps, `best.yaml` is here."
    ]
    for dimension in sweep.dimensions:
        value = order[0].trial.settings[dimension.key]
        if _could_go_on(sweep, dimension, order[0].trial.settings):
            lines.append(
                f"- The best {dimension.key} = {markdown_text(label(value))} is the end of what was tried: try beyond "
                "it."
            )
    if len(order) > 1 and "seed" not in sweep.space:
        lines.append(
            "- To tell the first ones apart, give them seeds (a grid over `seed: [0, 1, 2]` with their settings fixed) "
            "or more videos (`evaluation.videos`)."
        )
    return lines


def _could_go_on(sweep: Sweep, dimension: Dimension, settings: dict[str, Any]) -> bool:
    """Returns whether the best value is at or within 5 % of an end of its range, and a run may have one beyond."""
    value = settings[dimension.key]
    numeric = (isinstance(each, int | float) and not isinstance(each, bool) for each in dimension.values)
    if dimension.key == "seed" or not all(numeric):
        return False
    finite = [each for each in dimension.values if math.isfinite(each)]
    low, high = min(finite), max(finite)
    margin = 0.0 if dimension.kind == "choice" else 0.05
    if value <= low + margin * (high - low):
        beyond = low - 1 if isinstance(low, int) else low / 2
    elif math.inf > value >= high - margin * (high - low) and len(finite) == len(dimension.values):
        beyond = high * 2
    else:
        return False
    try:
        run = sweep.run(settings | {dimension.key: beyond}, "beyond", sweep.rungs[-1])
        frames = resolved_shape(run.model).frames
    except ValueError:
        return False
    return beyond not in dimension.values and run.reward.segments <= frames
