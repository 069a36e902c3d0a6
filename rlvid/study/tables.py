"""Results of a study as tables: on the console, in Markdown, and as JSON."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from rlvid.escape import markdown_text
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


@dataclass(frozen=True)
class Section:
    """A table with a title and a note; the first ``words`` columns are words, the others numbers."""

    title: str
    note: str
    words: int
    heads: list[str]
    rows: list[list[str]]


def sections(results: Results) -> Iterator[Section]:
    """The tables of a study, without those that would be empty."""
    label = results.models.__getitem__
    yield Section(
        "Wins, ties and losses", _DUELS, 3,
        ["Axis", "Model", "against", "Wins", "Ties", "Losses", "Decided pairs", "Preferred"],
        [
            [AXES[d.axis], label(d.first), label(d.second), *map(str, (d.wins, d.ties, d.losses, d.preferred.pairs)),
             _share(d.preferred)]
            for d in results.duels
        ],
    )  # fmt: skip
    yield Section(
        "Ranking", _STANDINGS, 2, ["Axis", "Model", "Strength", "Won"],
        [[AXES[s.axis], label(s.model), _number(s.strength, "+.2f"), _number(s.won, ".0%")] for s in results.standings],
    )  # fmt: skip
    if len(results.people) > 1:
        yield Section(
            "Agreement between people", _CONCORD, 1, ["Axis", "Pairs", "Equal", "Alpha"],
            [[AXES[c.axis], str(c.pairs), _number(c.equal, ".0%"), _number(c.alpha, ".2f")] for c in results.concord],
        )  # fmt: skip
    if results.metrics:
        yield Section(
            "Agreement with metrics", _METRICS, 2, ["Axis", "Metric", "Answers", "Pairs", "Agrees"],
            [
                [AXES[m.axis], m.title, str(m.agrees.count), str(m.agrees.pairs), _share(m.agrees)]
                for m in results.metrics
            ],
        )  # fmt: skip
    yield Section(
        "People", f"{_PEOPLE} {_LINKS}" if any(person.checks for person in results.people) else _LINKS, 2,
        ["Annotator", "Link", "Pairs", "Checks passed"],
        [
            [p.name, p.link, f"{p.pairs} of {results.asked}", f"{p.passed} of {p.checks}" if p.checks else "none asked"]
            for p in results.people
        ],
    )  # fmt: skip


def markdown(results: Results) -> str:
    """All tables as one page."""
    parts = ["# Study\n"]
    for each in sections(results):
        parts.append(f"## {each.title}\n")
        parts.append("| " + " | ".join(each.heads) + " |")
        parts.append("|" + "---|" * each.words + "---:|" * (len(each.heads) - each.words))
        parts += ["| " + " | ".join(map(markdown_text, row)) + " |" for row in each.rows]
        parts.append(f"\n{each.note}\n" if each.note else "")
    return "\n".join(parts).rstrip() + "\n"


def render(results: Results) -> Iterator[Table]:
    """All tables for the console."""
    for each in sections(results):
        table = Table(title=each.title, title_justify="left", box=box.SIMPLE_HEAD, caption_justify="left")
        for index, head in enumerate(each.heads):
            table.add_column(head, justify="left" if index < each.words else "right")
        for row in each.rows:
            table.add_row(*map(escape, row))
        yield table


def json_text(results: Results) -> str:
    """All numbers; what is not known is null."""
    return json.dumps(_plain(asdict(results)), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _share(share: Share) -> str:
    return f"{share.share:.0%} [{share.low:.0%}, {share.high:.0%}]" if share.count else "–"


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)
