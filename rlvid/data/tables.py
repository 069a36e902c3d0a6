"""Tables that users write: rows with named columns from CSV, JSON lines or Parquet."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TABLES = (".csv", ".jsonl", ".parquet")
"""Formats of files that hold rows with named columns."""


def read_rows(path: Path, columns: tuple[str, ...], gaps: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table that a user wrote, as ``(where, {column: value})``; a value that is absent is None.

    Args:
        path: ``.csv``, ``.jsonl`` or ``.parquet``.
        columns: which to read.
        gaps: whether an object of a ``.jsonl`` file may lack a column that another one has.

    Raises:
        ValueError: the file is missing, not UTF-8 or damaged, or lacks a column; the message names those found.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _json_rows(path, columns, gaps)
    elif suffix == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        _check_columns(path, list(reader.fieldnames or []), columns)
        for row in reader:
            yield f"{path}:{reader.line_num}", {name: row[name] for name in columns}
    elif suffix == ".parquet":
        _check_file(path)
        try:
            _check_columns(path, pq.read_schema(path).names, columns)
            rows = pq.read_table(path, columns=list(columns)).to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{path}: is not a Parquet file, or a damaged one: {' '.join(str(error).split())}"
            ) from error
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))
    else:
        raise ValueError(f"{path}: tables are read from {', '.join(TABLES)}")


def _json_rows(path: Path, columns: tuple[str, ...], gaps: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: must be a JSON object with {', '.join(columns)}")
        if not gaps:
            _check_columns(f"{path}:{number}", list(row), columns)
        rows.append((f"{path}:{number}", row))
    if rows:
        _check_columns(path, list(dict.fromkeys(name for _, row in rows for name in row)), columns)
    yield from ((where, {name: row.get(name) for name in columns}) for where, row in rows)


def _check_columns(where: str | Path, found: list[str], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        names = ", ".join(found[:20]) or "none"
        raise ValueError(f"{where}: lacks {' and '.join(map(repr, missing))}; columns found: {names}")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; raises ValueError that names the line where it is not UTF-8."""
    _check_file(path)
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: is not UTF-8 text; save the file as UTF-8") from error
