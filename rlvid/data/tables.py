"""Tables that users write: rows with named columns from CSV, TSV, JSON lines or Parquet.

One rule for all formats. Where rows or columns are in doubt (encoding, line ends, header, quotation marks, types of
columns, damage), the file is refused with the line. Where one row is at fault (its number of cells, its JSON, one
value), the row says so and the others count.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlvid.files import stand_in
from rlvid.text import printable

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Formats of files that hold rows with named columns."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        where: file and line, or file and number of the row.
        values: by column, of the columns that were asked for; None where the row has none.
        fault: what is wrong with the row itself; it has no values then.
    """

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


def table_files(path: Path) -> list[Path]:
    """Returns the files of a table: itself, or the parts in a folder with a table's name; none where it is no table.

    Parts lie anywhere in the folder and have its suffix; names that begin with ``_`` or ``.`` are notes of writers.
    """
    if path.suffix.lower() not in TABLES:
        return []
    if not path.is_dir():
        return [path] if path.is_file() else []
    parts = sorted(part for part in path.rglob(f"*{path.suffix}") if part.is_file())
    return [part for part in parts if not any(name[0] in "_." for name in part.relative_to(path).parts)]


def read_rows(
    path: Path,
    columns: tuple[str, ...],
    gaps: bool = False,
    *,
    optional: tuple[str, ...] = (),
    numbers: tuple[str, ...] = (),
) -> Iterator[Row]:
    """Yields rows of a table.

    Args:
        path: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``; or a folder of that name with parts of that format.
        columns: which to read.
        gaps: whether an object of a ``.jsonl`` file may lack a column that another one has.
        optional: further columns to read, which a file may lack: its rows then have None there.
        numbers: those of the columns that may hold numbers in a Parquet file; others hold text.

    Raises:
        ValueError: the file is missing, not UTF-8 or damaged, lacks a column or has it twice, or its rows cannot be
            told apart; the message names file and line.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise ValueError(f"{path}: tables are read from {', '.join(TABLES)}")
    files = table_files(path)
    if not files:
        raise ValueError(f"{path}: {f'is a folder without {suffix} files' if path.is_dir() else 'no such file'}")
    for file in files:
        if suffix == ".jsonl":
            yield from _json_rows(file, columns, gaps, optional)
        elif suffix == ".parquet":
            yield from _parquet_rows(file, columns, optional, numbers)
        else:
            yield from _cell_rows(file, columns, optional, _DELIMITERS[suffix])


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: it is missing, cannot be read, is a Git LFS pointer or a web page, is not UTF-8, or ends lines with
            a lone carriage return; the message names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        data, found = path.read_bytes(), stand_in(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if found:
        raise ValueError(f"{path}: {found}")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or data.count(0) * 4 > len(data):
        raise ValueError(f"{path}:1: is not UTF-8 text but UTF-16 or UTF-32, or no text; save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: is not UTF-8 text; save the file as UTF-8") from error
    if lone := re.search(r"\r(?!\n)", text):
        line = text.count("\n", 0, lone.start()) + 1
        raise ValueError(f"{path}:{line}: has a lone carriage return (CR); end lines with LF or CR LF")
    return text


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text with their numbers from 1 on, without a list of them."""
    number, start = 1, 0
    while (end := text.find("\n", start)) >= 0:
        yield number, text[start:end]
        number, start = number + 1, end + 1
    yield number, text[start:]


def _cell_rows(path: Path, columns: tuple[str, ...], optional: tuple[str, ...], delimiter: str) -> Iterator[Row]:
    records = _records(path, read_text(path), delimiter)
    line, header = next(records, (1, []))
    names = [name.strip() for name in header]
    if not set(columns) <= set(names):
        for other in set(",;\t|") - {delimiter}:
            if set(columns) <= {part.strip() for part in ",".join(names).split(other)}:
                raise ValueError(f"{path}:{line}: its cells are separated by {other!r}; separate them by {delimiter!r}")
    _check_columns(f"{path}:{line}", names, columns, optional)
    for line, cells in records:
        where, shape = f"{path}:{line}", f"has {len(cells)} cells under {len(names)} column{'s' * (len(names) > 1)}"
        if len(cells) > len(names):
            yield Row(where, fault=f'{shape}; put a text with {delimiter!r} into quotation marks, "..."')
        elif len(cells) < len(names) and not set(columns) - set(names[: len(cells)]):
            yield Row(where, fault=shape)
        else:
            found_cells = dict(zip(names, cells, strict=False))
            yield Row(where, {name: found_cells.get(name) for name in columns + optional})


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the line and the cells of each record, by RFC 4180; skips blank lines.

    The csv module cannot do this: it takes quotation marks within a cell as they come, and refuses long cells.
    """
    cell = re.compile(rf'(?:"((?:[^"]+|"")*+)"|([^"{delimiter}\r\n]*))({delimiter}|\r?\n|\Z)')
    place, line, begin = 0, 1, 1
    cells: list[str] = []
    while place < len(text) or cells:
        found = cell.match(text, place)
        if found is None:
            quoted = re.compile(r'"(?:[^"]+|"")*+').match(text, place)
            if quoted is not None and quoted.end() == len(text):
                raise ValueError(f'{path}:{line}: has a quotation mark that nothing closes; close the cell with "')
            raise ValueError(
                f'{path}:{line}: has a quotation mark within a cell; put the whole cell into quotation marks, "...", '
                "and write each mark in it twice"
            )
        quoted_cell, plain, end = found.groups()
        cells.append(plain if quoted_cell is None else quoted_cell.replace('""', '"'))
        line += found[0].count("\n")
        place = found.end()
        if end != delimiter:
            if cells != [""] or quoted_cell is not None:
                yield begin, cells
            cells, begin = [], line


def _json_rows(path: Path, columns: tuple[str, ...], gaps: bool, optional: tuple[str, ...]) -> Iterator[Row]:
    if not gaps:
        yield from _json_objects(path, columns, gaps, optional, {})
        return
    names: dict[str, None] = {}
    rows = list(_json_objects(path, columns, gaps, optional, names))  # the names of all rows are known at the end
    if names:
        _check_columns(path, list(names), columns)
    yield from rows


def _json_objects(
    path: Path, columns: tuple[str, ...], gaps: bool, optional: tuple[str, ...], names: dict[str, None]
) -> Iterator[Row]:
    """Yields a row for each line; adds the names that they have to ``names``."""
    for number, line in numbered_lines(read_text(path)):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            found = json.loads(line, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            yield Row(where, fault=f"is not JSON: {error}")
            continue
        if not isinstance(found, _Object):
            yield Row(where, fault=f"must be a JSON object with {', '.join(columns)}")
            continue
        names.update(dict.fromkeys(found))
        fault = _fault(found.keys_read, columns, gaps, optional)
        read = columns + optional
        yield Row(where, fault=fault) if fault else Row(where, {name: found.get(name) for name in read})


class _Object(dict[str, Any]):
    """A JSON object that also has its keys as they were read, repeated ones too."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.keys_read = [name for name, _ in pairs]


def _parquet_rows(
    path: Path, columns: tuple[str, ...], optional: tuple[str, ...], numbers: tuple[str, ...]
) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_columns(path, schema.names, columns, optional)
            there = tuple(name for name in columns + optional if name in schema.names)
            for name in there:
                _check_type(path, schema.field(name), name in numbers)
            lacking = dict.fromkeys(set(optional) - set(there))
            for batch in file.iter_batches(columns=list(there)):
                for scalars in zip(*(batch[name] for name in there), strict=True):
                    number += 1
                    yield _parquet_row(f"{path}: row {number}", there, scalars, lacking)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if found := path.is_file() and stand_in(path):
            raise ValueError(f"{path}: {found}") from error
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: is not a Parquet file, or a damaged one: {printable(reason)}") from error


def _check_type(path: Path, field: pa.Field, number: bool) -> None:
    """Raises ValueError where a column holds neither text nor, where it may, numbers."""
    if number and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
        return
    if not _is_text(field.type):
        allowed = "numbers or text" if number else "text"
        raise ValueError(f"{path}: column {field.name!r} is of type {field.type}; it must hold {allowed}")


def _parquet_row(where: str, columns: tuple[str, ...], scalars: tuple[pa.Scalar, ...], lacking: dict[str, None]) -> Row:
    try:
        return Row(where, {name: scalar.as_py() for name, scalar in zip(columns, scalars, strict=True)} | lacking)
    except UnicodeDecodeError:
        return Row(where, fault="is not UTF-8 text")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks: tuple[Callable[[pa.DataType], bool], ...] = (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null
    )  # fmt: skip
    return any(check(kind) for check in checks)


def _fault(found: list[str], needed: tuple[str, ...], gaps: bool = False, optional: tuple[str, ...] = ()) -> str | None:
    """Returns the fault of the names of columns: a required one is missing, or one is there twice."""
    if twice := [name for name in needed + optional if found.count(name) > 1]:
        return f"has {' and '.join(map(repr, twice))} twice; keep one"
    missing = [name for name in needed if name not in found]
    if missing and not gaps:
        names = printable(", ".join(found[:20])) or "none"
        return f"lacks {' and '.join(map(repr, missing))}; columns found: {names}"
    return None


def _check_columns(
    where: str | Path, found: list[str], needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    if fault := _fault(found, needed, optional=optional):
        raise ValueError(f"{where}: {fault}")
