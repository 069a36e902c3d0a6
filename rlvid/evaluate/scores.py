"""Scores of videos and differences of models as Parquet, and the scores of a portion on disk."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rlvid.evaluate.results.untrusted import read_table
from rlvid.evaluate.rows import EXTRA, Comparison, Row, metrics_of


def rows_table(rows: Iterable[Row]) -> pa.Table:
    """All videos, one a row, without their frames: float32 scores, NaN where there is none."""
    rows = list(rows)
    named: dict[str, pa.DataType] = {"model": pa.string(), "set": pa.string(), "steps": pa.int32(), "index": pa.int32()}
    named |= {"copy": pa.int32(), "prompt": pa.string()}
    columns = {name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in named.items()}
    scores = {m: pa.array([row.score(m) for row in rows], pa.float32()) for m in metrics_of(rows)}
    return pa.table(columns | scores)


def comparisons_table(comparisons: Iterable[Comparison]) -> pa.Table:
    """All differences, one a row: of a model to its base, in a metric, for a prompt set and number of steps."""
    comparisons = list(comparisons)
    named = {"model": "tuned", "base": "base", "set": "set", "steps": "steps", "metric": "metric", "pairs": "pairs"}
    kinds = {"steps": pa.int32(), "pairs": pa.int32()} | dict.fromkeys(("difference", "low", "high"), pa.float64())
    named |= {name: name for name in ("difference", "low", "high")}
    return pa.table(
        {
            name: pa.array([getattr(c, field) for c in comparisons], kinds.get(name, pa.string()))
            for name, field in named.items()
        }
    )


@contextmanager
def told_if_full(folder: Path) -> Iterator[None]:
    """Around whatever an evaluation writes into its folder.

    Raises:
        ValueError: there was no space for it; says what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{folder}: {os.strerror(error.errno)}; make room and start the same command again: what was finished is "
            "kept, and it goes on from there"
        ) from None


def write_rows(path: Path, rows: list[Row]) -> None:
    """Keeps rows, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            pq.write_table(rows_table(rows), file)
            file.flush()
            os.fsync(file.fileno())  # else a machine that goes down leaves a file of this name and no content
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_rows(path: Path) -> list[Row]:
    """What ``write_rows`` kept.

    Raises:
        ValueError: the file is damaged.
    """
    kept = read_table(path.parent, path, [f.name for f in fields(Row) if f.name != "extra"], metrics=True)
    known = {each.name for each in fields(Row)}
    return [
        Row(
            **{name: value for name, value in row.items() if name in known},
            extra={name: value for name, value in row.items() if name.startswith(EXTRA) and name not in known},
        )
        for row in kept
    ]
