"""Preference pairs: two videos or images of a prompt, and the votes on them, pooled."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rlvid.data.find import Skipped
from rlvid.data.images import IMAGES
from rlvid.text import printable


@dataclass(frozen=True)
class Media:
    """A video or an image: a file, or the column ``side`` in a row of a study's export."""

    path: Path
    row: int | None = None
    side: str = ""

    @property
    def is_image(self) -> bool:
        """Whether it is an image file."""
        return self.row is None and self.path.suffix.lower() in IMAGES

    def __str__(self) -> str:
        """Returns the place, as messages name it."""
        return printable(str(self.path) if self.row is None else f"{self.path}: row {self.row + 1}, {self.side}")


@dataclass(frozen=True)
class Vote:
    """A vote on a pair: the preference for its ``a`` in [0, 1], and the place that it is from."""

    axis: str
    preference: float
    annotator: str | None
    where: str


@dataclass(frozen=True)
class Pair:
    """Two videos or images of a prompt, all votes on them, and the models that made them, where they are known."""

    prompt: str
    a: Media
    b: Media
    kind: str
    votes: tuple[Vote, ...]
    models: tuple[str, str] = ("", "")

    @property
    def axes(self) -> set[str]:
        """The axes with a vote."""
        return {vote.axis for vote in self.votes}

    def preference(self, axis: str) -> float:
        """Returns the mean preference on an axis; NaN without a vote."""
        given = [vote.preference for vote in self.votes if vote.axis == axis]
        return sum(given) / len(given) if given else math.nan


@dataclass(frozen=True)
class Answer:
    """A vote with the pair that it names; ``key`` is the same for both orders of a pair."""

    key: frozenset[object]
    pair: Pair

    @property
    def vote(self) -> Vote:
        """The vote."""
        return self.pair.votes[0]


def pool(answers: Iterable[Answer], path: Path, skipped: list[Skipped]) -> Iterator[Pair]:
    """Yields a pair for each two videos or images, with all votes turned to the order of the first one.

    Args:
        answers: in their order.
        path: that they are from.
        skipped: gets each vote that is left out: repeated, or in contradiction to another.
    """
    found: dict[frozenset[object], list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.key, []).append(answer)
    for each in found.values():
        first = each[0].pair
        if odd := next((answer for answer in each if answer.pair.prompt != first.prompt), None):
            for answer in each:
                other = odd if answer.pair.prompt == first.prompt else each[0]
                two = "the same pair has two prompts; name one"
                skipped.append(Skipped(path, f"{answer.vote.where} and {other.vote.where}: {two}"))
            continue
        turned = [_turned(answer, first) for answer in each]
        if votes := list(_consistent(turned, path, skipped)):
            kind = _first(answer.pair.kind for answer in each)
            sides = [answer.pair.models[:: 1 if answer.pair.a == first.a else -1] for answer in each]
            models = (_first(a for a, _ in sides), _first(b for _, b in sides))
            yield Pair(first.prompt, first.a, first.b, kind, tuple(votes), models)


def _first(names: Iterable[str]) -> str:
    return next(filter(None, names), "")


def _turned(answer: Answer, first: Pair) -> Vote:
    vote = answer.vote
    if answer.pair.a == first.a:
        return vote
    return Vote(vote.axis, 1 - vote.preference, vote.annotator, vote.where)


def _consistent(votes: list[Vote], path: Path, skipped: list[Skipped]) -> Iterator[Vote]:
    """Yields the votes of people who say one thing; a repeated vote counts once."""
    given: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        if vote.annotator is None:
            yield vote
        else:
            given.setdefault((vote.axis, vote.annotator), []).append(vote)
    for (axis, _), own in given.items():
        odd = next((vote for vote in own if vote.preference != own[0].preference), None)
        if odd is None:
            yield own[0]
            skipped += [Skipped(path, f"{vote.where}: repeats {own[0].where}") for vote in own[1:]]
            continue
        for vote in own:
            other = odd if vote.preference == own[0].preference else own[0]
            two = f"one person gives two answers on {axis}; neither counts"
            skipped.append(Skipped(path, f"{vote.where} and {other.where}: {two}"))
