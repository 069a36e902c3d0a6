"""The results of a study: wins, a ranking, agreement between people and with each metric."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from rlvid.evaluate.results.about import VideoKey
from rlvid.metric_names import metric_of
from rlvid.stats import bradley_terry, krippendorff_alpha, wilson
from rlvid.study.pairs import AXES, Pair
from rlvid.study.store import Answer, Study


@dataclass(frozen=True)
class Share:
    """A share of ``count`` answers, with its 95 % interval.

    Answers of several people to the same pair are not independent, so the interval counts ``pairs`` and not answers.
    """

    count: int
    pairs: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, answers: Iterable[tuple[int, bool]]) -> "Share":
        """Makes a share from (number of the pair, whether the answer counts for it)."""
        answers = list(answers)
        pairs = len({pair for pair, _ in answers})
        share = statistics.mean(said for _, said in answers) if answers else math.nan
        return cls(len(answers), pairs, share, *wilson(share, pairs))


@dataclass(frozen=True)
class Duel:
    """Two models on one axis; ``preferred`` is the first one's share of the answers that were no tie."""

    axis: str
    first: str
    second: str
    wins: int
    ties: int
    losses: int
    preferred: Share


@dataclass(frozen=True)
class Standing:
    """A model's rank on one axis: Bradley-Terry log-strength (NaN where there is none), and its share of wins.

    A tie is half a win in both.
    """

    axis: str
    model: str
    strength: float
    won: float


@dataclass(frozen=True)
class Concord:
    """People's agreement on one axis: pairs that several answered, share of equal answers, Krippendorff's alpha."""

    axis: str
    pairs: int
    equal: float
    alpha: float


@dataclass(frozen=True)
class Metric:
    """A metric's agreement with people, where both prefer one video; ``title`` is its name for readers."""

    axis: str
    metric: str
    title: str
    agrees: Share


@dataclass(frozen=True)
class Person:
    """An annotator: pairs answered, and attention checks passed (the video without noise has the better quality).

    ``link`` says by whose link: ``own``, which is this person's alone, ``shared``, or ``both``.
    """

    name: str
    pairs: int
    passed: int
    checks: int
    link: str


@dataclass(frozen=True)
class Results:
    """All results of a study; models have their names in the evaluation."""

    models: Mapping[str, str]
    asked: int
    duels: list[Duel]
    standings: list[Standing]
    concord: list[Concord]
    metrics: list[Metric]
    people: list[Person]


Scores = Mapping[str, Mapping[VideoKey, float]]


def summarise(
    study: Study, answers: Sequence[Answer], scores: Scores, rewards: Mapping[str, str] = MappingProxyType({})
) -> Results:
    """Returns the results of a study.

    Args:
        study: what was asked.
        answers: what was answered.
        scores: each metric's by (model, case), as ``Videos.scores`` gives them; more is better.
        rewards: names of the rewards behind metrics, as ``Videos`` knows them.
    """
    pairs = {pair.number: pair for pair in study.pairs}
    real = [answer for answer in answers if not pairs[answer.pair].check]
    of_axis = {axis: [answer for answer in real if answer.axis == axis] for axis in AXES}
    models = [name for name in study.models if any(name in (pair.first, pair.second) for pair in study.pairs)]
    return Results(
        models={name: study.models[name] for name in models},
        asked=sum(not pair.check for pair in study.pairs),
        duels=[duel for axis, each in of_axis.items() for duel in _duels(axis, each, pairs)],
        standings=[standing for axis, each in of_axis.items() for standing in _standings(axis, each, pairs, models)],
        concord=[_concord(axis, each) for axis, each in of_axis.items()],
        metrics=[
            Metric(axis, metric, title_of(metric, rewards), _agreement(each, pairs, values))
            for axis, each in of_axis.items()
            for metric, values in scores.items()
        ],
        people=_people(answers, pairs),
    )


def title_of(metric: str, rewards: Mapping[str, str]) -> str:
    """Returns the title of a metric, as in an evaluation's tables, with the name of a reward if known."""
    title = metric_of(metric).name
    known = metric in rewards and not title.endswith(rewards[metric])
    return f"{title} ({rewards[metric]})" if known else title


def _duels(axis: str, answers: list[Answer], pairs: Mapping[int, Pair]) -> list[Duel]:
    groups: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[pairs[answer.pair].first, pairs[answer.pair].second].append(answer)
    found = []
    for (first, second), group in sorted(groups.items()):
        count = Counter(answer.chosen for answer in group)
        preferred = Share.of((each.pair, each.chosen == "first") for each in group if each.chosen != "tie")
        found.append(Duel(axis, first, second, count["first"], count["tie"], count["second"], preferred))
    return found


def _standings(axis: str, answers: list[Answer], pairs: Mapping[int, Pair], models: list[str]) -> list[Standing]:
    wins_MM = np.zeros((len(models), len(models)))
    for answer in answers:
        pair = pairs[answer.pair]
        first, second = models.index(pair.first), models.index(pair.second)
        won = {"first": 1.0, "tie": 0.5, "second": 0.0}[answer.chosen]
        wins_MM[first, second] += won
        wins_MM[second, first] += 1 - won
    if not answers:
        return []
    strengths, played = bradley_terry(wins_MM), (wins_MM + wins_MM.T).sum(1)
    found = [
        Standing(axis, model, float(strength), float(won / count) if count else math.nan)
        for model, strength, won, count in zip(models, strengths, wins_MM.sum(1), played, strict=True)
    ]
    return sorted(found, key=_place)


def _place(standing: Standing) -> float:
    """Returns the sort key of a model: strength, or wins where there is none; a model without comparisons is last."""
    value = standing.won if math.isnan(standing.strength) else standing.strength
    return math.inf if math.isnan(value) else -value


def _concord(axis: str, answers: list[Answer]) -> Concord:
    units: dict[int, list[str]] = defaultdict(list)
    for answer in answers:
        units[answer.pair].append(answer.chosen)
    several = [unit for unit in units.values() if len(unit) > 1]
    twos = [(a, b) for unit in several for i, a in enumerate(unit) for b in unit[:i]]
    equal = statistics.mean(a == b for a, b in twos) if twos else math.nan
    return Concord(axis, len(several), equal, krippendorff_alpha(several))


def _agreement(
    answers: list[Answer], pairs: Mapping[int, Pair], values: Mapping[VideoKey, float]
) -> Share:  # fmt: skip
    said = []
    for answer in answers:
        pair = pairs[answer.pair]
        first, second = (values.get((model, pair.case), math.nan) for model in (pair.first, pair.second))
        if answer.chosen != "tie" and (first < second or first > second):  # neither for NaN
            said.append((answer.pair, (first > second) == (answer.chosen == "first")))
    return Share.of(said)


def _people(answers: Sequence[Answer], pairs: Mapping[int, Pair]) -> list[Person]:
    found = []
    for name in sorted({answer.annotator for answer in answers}):
        judged = [each for each in answers if each.annotator == name and each.axis == "quality"]
        checks = [each for each in judged if pairs[each.pair].check]
        passed = sum(each.chosen == "first" for each in checks)
        ways = {each.invited for each in judged}
        link = "both" if len(ways) > 1 else "own" if ways == {True} else "shared"
        found.append(Person(name, len(judged) - len(checks), passed, len(checks), link))
    return found
