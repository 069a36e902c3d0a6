"""Results of a study as tables: on the console and in Markdown."""

import math
from collections.abc import Iterator

from rich.table import Table

from rlvid.evaluate.tables.table import Grid, Section
from rlvid.metric_names import NONE, SHARE
from rlvid.study.pairs import AXES
from rlvid.study.results import Results, Share

_DUELS = (
    "Preferred: the first model's share of the answers that were no tie, with its 95 % Wilson interval. People who "
    "look at the same pair do not answer independently, so the interval counts pairs, not answers."
)
_STANDINGS = (
    "Strength: Bradley-Terry log-strength with mean 0; a model s above another wins with probability "
    "1 / (1 + exp(-s)). A tie is half a win. None is given where a model won or lost everything, or was never compared."
)
_CONCORD = (
    "Over pairs that several people answered: share of equal answers, and Krippendorff's alpha (nominal): 1 is full "
    "agreement, 0 is what chance gives."
)
_METRICS = (
    "Where people chose a video and the metric prefers one: the share that agrees, with its 95 % Wilson interval "
    "(counting pairs). 50 % is a coin's; a higher score counts as better, which for motion need not hold."
)
_LINKS = (
    "Link: by their own (rlvid study invite), nobody else can answer under that name; by the shared one, anybody who "
    "has it can."
)
_PEOPLE = "A check is passed when the video without noise is chosen for its quality."


def sections(results: Results) -> Iterator[Section]:
    """Yields the tables of a study, without those that would be empty."""
    label = results.models.__getitem__
    duels = [
        [AXES[d.axis], label(d.first), label(d.second), *map(str, (d.wins, d.ties, d.losses, d.preferred.pairs)),
         _share(d.preferred)]
        for d in results.duels
    ]  # fmt: skip
    heads = ["Axis", "Model", "against", "Wins", "Ties", "Losses", "Decided pairs", "Preferred"]
    yield Section("Wins, ties and losses", Grid(heads, duels, words=3), _DUELS)
    standings = [
        [AXES[s.axis], label(s.model), _number(s.strength, "+.2f"), SHARE.number(s.won)] for s in results.standings
    ]
    yield Section("Ranking", Grid(["Axis", "Model", "Strength", "Won"], standings, words=2), _STANDINGS)
    if len(results.people) > 1:
        concord = [
            [AXES[c.axis], str(c.pairs), SHARE.number(c.equal), _number(c.alpha, ".2f")] for c in results.concord
        ]
        yield Section("Agreement between people", Grid(["Axis", "Pairs", "Equal", "Alpha"], concord), _CONCORD)
    if results.metrics:
        agrees = [
            [AXES[m.axis], m.title, str(m.agrees.count), str(m.agrees.pairs), _share(m.agrees)] for m in results.metrics
        ]
        heads = ["Axis", "Metric", "Answers", "Pairs", "Agrees"]
        yield Section("Agreement with metrics", Grid(heads, agrees, words=2), _METRICS)
    people = [
        [p.name, p.link, f"{p.pairs} of {results.asked}", f"{p.passed} of {p.checks}" if p.checks else "none asked"]
        for p in results.people
    ]
    note = f"{_PEOPLE} {_LINKS}" if any(person.checks for person in results.people) else _LINKS
    yield Section("People", Grid(["Annotator", "Link", "Pairs", "Checks passed"], people, words=2), note)


def markdown(results: Results) -> str:
    """Returns all tables as one page."""
    parts = [f"## {each.heading}\n\n{each.grid.markdown()}\n\n{each.note}" for each in sections(results)]
    return "\n\n".join(["# Study", *parts]) + "\n"


def render(results: Results) -> Iterator[Table]:
    """Yields all tables for the console."""
    for each in sections(results):
        yield each.grid.console(each.heading)


def _share(share: Share) -> str:
    return SHARE.interval(share.share, share.low, share.high)


def _number(value: float, form: str) -> str:
    return NONE if math.isnan(value) else format(value, form)
