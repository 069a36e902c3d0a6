"""Reads the shares of global batches from encoded clips; no torch and no Ray, so that readers start fast."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from rlvid.data.clips import EncodedClips
from rlvid.storage import clips_here


@dataclass(frozen=True)
class Shares:
    """The shares of consecutive global batches.

    Attributes:
        clips: folder of encoded clips.
        fingerprint: of the clips, so that no others are read in their place.
        storage: URI of the object store that the folder is kept in, if it is kept in one.
        workers: W.
        first_step: step of the first batch.
        positions_SB: the clip of each sample of each batch (steps, batch size), integers.
    """

    clips: Path
    fingerprint: str
    storage: str | None
    workers: int
    first_step: int
    positions_SB: np.ndarray

    def part(self, start: int, stop: int) -> Self:
        """Returns the batches from ``start`` to before ``stop``, counted from the first one."""
        return replace(self, first_step=self.first_step + start, positions_SB=self.positions_SB[start:stop])

    def __call__(self) -> Iterator[pa.Table]:
        """Reads the shares; yields a table of one row for each worker of each step."""
        clips, batch_size = _open(self.clips, self.fingerprint, self.storage), self.positions_SB.shape[1]
        for step, positions in enumerate(self.positions_SB.tolist(), self.first_step):
            for rank in range(self.workers):
                places = range(rank, batch_size, self.workers)
                rows = clips.rows([positions[place] for place in places])
                serials = [step * batch_size + place for place in places]
                yield _row(step, rank, serials, rows)


@lru_cache(maxsize=2)
def _open(clips: Path, fingerprint: str, storage: str | None) -> EncodedClips:
    return EncodedClips.open(clips_here(clips, storage), fingerprint)


def _row(step: int, rank: int, serials: Sequence[int], clips: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, clips.schema) as stream:
        stream.write_table(clips)
    buffer = sink.getvalue()
    ends = pa.py_buffer(np.array([0, buffer.size], dtype=np.int64))
    data = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, buffer])  # not copied
    return pa.table({"step": [step], "rank": [rank], "serials": [list(serials)], "clips": data})
