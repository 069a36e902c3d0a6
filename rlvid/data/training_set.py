"""The training set of a run: one folder of rows, or several that are mixed; no torch and no Ray."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from rlvid.data.clips import COLUMNS, EncodedClips, Kind, digest


@dataclass(frozen=True)
class Source:
    """A folder of rows that a run trains on.

    Attributes:
        kind: of its rows: encoded clips, prompts alone, or videos to be encoded.
        place: folder, or URI of one in an object store.
        fingerprint: of its content, so that no other is read in its place.
        count: number of rows.
    """

    kind: Kind
    place: str
    fingerprint: str
    count: int

    @staticmethod
    def of(place: str | Path, fingerprint: str | None = None) -> "Source":
        """Describes a folder that ``EncodedClips.open`` opens, with its arguments and errors."""
        opened = EncodedClips.open(place, fingerprint)
        return Source(opened.kind, opened.place, opened.meta["fingerprint"], len(opened))

    def open(self) -> EncodedClips:
        """Opens the folder; a process opens it once."""
        return _open(self.place, self.fingerprint)


@lru_cache(maxsize=16)
def _open(place: str, fingerprint: str) -> EncodedClips:
    return EncodedClips.open(place, fingerprint)


@dataclass(frozen=True)
class TrainingSet:
    """The rows of all sources of a run, one source after the other.

    Attributes:
        sources: one or more.
        weights: shares of the sources in what is drawn, which need not add up to 1; None draws every row equally often.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None = None

    @staticmethod
    def of(*places: str | Path) -> "TrainingSet":
        """Makes a training set of folders, without weights."""
        return TrainingSet(tuple(map(Source.of, places)))

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of rows of each source."""
        return tuple(source.count for source in self.sources)

    @property
    def places(self) -> str:
        """The places of the sources, as a text."""
        return ", ".join(source.place for source in self.sources)

    @property
    def count(self) -> int:
        """The number of rows of all sources."""
        return sum(self.counts)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the only source, or sixteen hex digits over all of them and their weights."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        return digest({"sources": [source.fingerprint for source in self.sources], "weights": self.weights})

    @property
    def kinds(self) -> set[Kind]:
        """The kinds of its sources."""
        return {source.kind for source in self.sources}

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.counts])

    def rows(self, positions: Sequence[int]) -> pa.Table:
        """Returns rows by position, in any order and any number of times; see ``EncodedClips.rows``.

        Rows have the columns of all kinds among them, with nulls; beside prompts all have ``caption`` alone.
        """
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        tables, places = list[pa.Table](), list[np.ndarray]()
        columns = COLUMNS["prompts"] if "prompts" in self.kinds else None
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            within = [positions[place] - int(self._starts[number]) for place in mine.tolist()]
            tables.append(self.sources[number].open().rows(within, columns))
            places.append(mine)
        if len(tables) == 1:
            return tables[0]
        return pa.concat_tables(tables, promote_options="default").take(np.argsort(np.concatenate(places)))

    def neighbours(self, position: int) -> Iterator[int]:
        """Yields the positions 1, 2, 4, ... places behind one, in the circle of its own source."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        start, count = int(self._starts[number]), self.sources[number].count
        for power in range(count.bit_length()):
            yield start + (position - start + 2**power) % count

    def captions(self, count: int | None = None) -> Iterator[str]:
        """Yields the captions of the first rows, source by source; passes over those of damaged parts.

        Args:
            count: of captions at most, each source giving an equal share; default: all.
        """
        share = None if count is None or count >= self.count else -(-count // len(self.sources))
        for source in self.sources:
            yield from islice(source.open().readable_captions(), share)

    def first_captions(self, count: int) -> tuple[str, ...]:
        """Returns the first different captions, ``count`` at most, the sources in turn; reads no more than it needs."""
        found, open_ones = dict[str, None](), [source.open().readable_captions() for source in self.sources]
        while open_ones and len(found) < count:
            for captions in list(open_ones):
                fresh = next((caption for caption in captions if caption not in found), None)
                if fresh is None:
                    open_ones.remove(captions)
                elif len(found) < count:
                    found[fresh] = None
        return tuple(found)
