"""The measurements of all trials, their ranking, and the Pareto front."""

import math
from dataclasses import dataclass
from typing import Any

from rlvid.evaluate.results.summary import Comparison, compare
from rlvid.metric_names import metric_of
from rlvid.stats import pareto_front
from tuning.description import COST, Sweep
from tuning.journal import Journal, Trial, read_scores, scores_path
from tuning.judges import GAIN
from tuning.measure import least, rows_of


@dataclass(frozen=True)
class Outcome:
    """A trial and its scores by steps; ``step`` is the last one measured, None where none is."""

    trial: Trial
    scores: dict[int, dict[str, Any]]

    @property
    def step(self) -> int | None:
        """The last rung that was measured."""
        return max(self.scores, default=None)

    def value(self, objective: str, step: int | None = None) -> float:
        """Returns an objective at a step, by default the last; NaN where it was not measured."""
        scores = self.scores.get(step if step is not None else self.step or -1)
        if scores is None:
            return math.nan
        return float(scores[COST] if objective == COST else scores["mean"][objective])


def collect(sweep: Sweep, journal: Journal) -> list[Outcome]:
    """Returns all trials with what was measured of them."""
    found = []
    for trial in journal.trials:
        scores = {step: read_scores(scores_path(sweep.folder, trial.name, step)) for step in sweep.rungs}
        found.append(Outcome(trial, {step: each for step, each in scores.items() if each is not None}))
    return found


def pareto(outcomes: list[Outcome], objectives: list[str]) -> list[Outcome]:
    """Returns those that no other one beats: as good in every objective and better in one."""
    signs = {name: -1 if metric_of(name).higher_is_better is False else 1 for name in objectives}

    def point(one: Outcome) -> tuple[float, ...]:
        return tuple(sign * one.value(name) for name, sign in signs.items())

    points = [(one, point(one)) for one in outcomes if one.step is not None]
    known = [(one, place) for one, place in points if all(map(math.isfinite, place))]
    front = set(pareto_front([place for _, place in known]))
    return [one for one, place in known if place in front]


def ranked(sweep: Sweep, outcomes: list[Outcome]) -> list[Outcome]:
    """Returns the trials that came furthest, the best by the sweep's metric first; stopped ones cannot be best."""
    known = [one for one in outcomes if one.step is not None and math.isfinite(one.value(sweep.metric))]
    furthest = max((one.step or 0 for one in known), default=0)
    last = [one for one in known if one.step == furthest]
    return sorted(last, key=lambda one: one.value(sweep.metric), reverse=True)


def columns(sweep: Sweep, outcomes: list[Outcome]) -> list[str]:
    """Returns the objectives, and the oracle's score where there is one, though nothing was chosen by it."""
    seen = any(one.step is not None and math.isfinite(one.value("oracle_score")) for one in outcomes)
    return [*sweep.objectives, *(["oracle_score"] if seen else [])]


def difference(one: Outcome, other: dict[str, Any] | None, metric: str) -> Comparison | None:
    """Returns a trial's gain in a metric over other scores, video by video, with its 95 % bootstrap interval.

    ``gain`` is no metric of videos: see ``compared_by``.
    """
    if other is None or one.step is None:
        return None
    pairs = compare(rows_of(other), rows_of(one.scores[one.step]))
    return next((each for each in pairs if each.metric == metric), None)


def compared_by(sweep: Sweep, one: Outcome, base: dict[str, Any] | None) -> str:
    """Returns the sweep's metric; where that is ``gain``, the held-out reward in which a trial gains least."""
    if sweep.metric != GAIN or base is None or one.step is None:
        return sweep.metric
    return least(rows_of(one.scores[one.step]), rows_of(base)).metric.key
