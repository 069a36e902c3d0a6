"""Reads the shares of global batches from encoded clips; no torch and no Ray, so that readers start fast."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa

from rlvid.data.clips import DamagedPart
from rlvid.data.training_set import TrainingSet

_ROW = pa.schema(
    [
        ("step", pa.int64()),
        ("rank", pa.int64()),
        ("serials", pa.list_(pa.int64())),
        ("lost", pa.list_(pa.int64())),  # those of the serials whose clip cannot be read
        ("fault", pa.string()),  # what is wrong with the first of these
        ("note", pa.string()),  # what else the user should know
        ("clips", pa.large_binary()),  # an Arrow stream
    ]
)


@dataclass(frozen=True)
class Shares:
    """The shares of consecutive global batches.

    Attributes:
        clips: the run's training set.
        workers: W.
        first_step: step of the first batch.
        positions_SB: the row of each sample of each batch (steps, batch size), integers.
    """

    clips: TrainingSet
    workers: int
    first_step: int
    positions_SB: np.ndarray

    def part(self, start: int, stop: int) -> Self:
        """Returns the batches from ``start`` to before ``stop``, counted from the first one."""
        return replace(self, first_step=self.first_step + start, positions_SB=self.positions_SB[start:stop])

    def __call__(self) -> Iterator[pa.Table]:
        """Reads the shares; yields a table of one row for each worker of each step.

        Another clip stands in the place of one that is damaged, and ``lost`` has its serial.

        Raises:
            ValueError: the folder cannot be opened, or a clip and those around it are damaged.
            OSError: storage fails.
        """
        batch_size = self.positions_SB.shape[1]
        for step, positions in enumerate(self.positions_SB.tolist(), self.first_step):
            for rank in range(self.workers):
                places = range(rank, batch_size, self.workers)
                rows, faults = _read(self.clips, [positions[place] for place in places])
                serials = [step * batch_size + place for place in places]
                lost = [serial for serial, fault in zip(serials, faults, strict=True) if fault]
                yield row_of(step, rank, serials, lost, next(filter(None, faults), None), rows)


def _read(clips: TrainingSet, positions: list[int]) -> tuple[pa.Table, list[str | None]]:
    """Returns the clips at these positions, and what is wrong with each; another one stands in for a damaged one."""
    try:
        return clips.rows(positions), [None] * len(positions)
    except DamagedPart as error:
        if len(positions) == 1:
            return _stand_in(clips, positions[0], error), [str(error)]
    tables, faults = zip(*(_read(clips, [position]) for position in positions), strict=True)
    return pa.concat_tables(tables, promote_options="default"), [fault for each in faults for fault in each]


def _stand_in(clips: TrainingSet, position: int, error: DamagedPart) -> pa.Table:
    """Returns the clip 1, 2, 4, ... places behind a damaged one: the first of these that can be read."""
    for neighbour in clips.neighbours(position):
        with suppress(DamagedPart):
            return clips.rows([neighbour])
    raise error


def row_of(
    step: int,
    rank: int,
    serials: Sequence[int],
    lost: Sequence[int],
    fault: str | None,
    clips: pa.Table,
    note: str | None = None,
) -> pa.Table:
    """Returns a share as a table of one row, see ``Share``; ``clips`` are its rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, clips.schema) as stream:
        stream.write_table(clips)
    buffer = sink.getvalue()
    ends = pa.py_buffer(np.array([0, buffer.size], dtype=np.int64))
    data = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, buffer])  # not copied
    columns = {
        "step": [step],
        "rank": [rank],
        "serials": [serials],
        "lost": [lost],
        "fault": [fault],
        "note": [note],
        "clips": data,
    }
    return pa.table(columns, _ROW)
