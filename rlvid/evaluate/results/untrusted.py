"""Checks of files that may come from somebody else, before they are used.

An error is a ``ValueError`` of one line that names the file. A link that leads out of the folder is not followed.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import yaml
from pyarrow import parquet
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from rlvid import files
from rlvid.data.parquet import open_parquet

KINDS = {
    "model": "text", "set": "text", "steps": "whole", "index": "whole", "copy": "whole", "prompt": "text",
    "fps": "number", "frames": "frames", "metric": "text", "pairs": "whole", "difference": "number", "low": "number",
    "high": "number",
}  # fmt: skip
"""The kind of each column that has a name of its own; every other one is a metric, and a number."""
MAX_ROWS = 10**7
"""Largest number of rows of a table; more would be an attack on memory."""
_MAX_BYTES = 2**26  # of YAML and JSON
_MAX_BYTES_OF_GROUP = 2**32
_LARGEST = 1e38  # of a score; float32 holds no larger one, and its square must not overflow
MIN_FPS, MAX_FPS = 0.1, 1000.0
"""Frames a second."""


T = TypeVar("T")


class CheckedModel(BaseModel):
    """A model with strict types: no text and no truth value is a number; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


def damaged(path: Path, why: object) -> ValueError:
    """Makes the error of a file that is not what rlvid writes."""
    way_out = "get a complete copy, or delete it and run `rlvid evaluate` again: it makes only what is missing"
    return files.damaged(path, why, way_out)


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """Turns an error in the block, which reads a file, into a ValueError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, OverflowError) as error:
        raise damaged(path, error) from None


def inside(folder: Path, path: Path) -> Path:
    """Returns the path of a file, after a check that it lies in the folder.

    Raises:
        ValueError: it is missing, or no file; or a link that leads out of the folder.
    """
    with sound(path):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path}: a link that leads out of {folder}; put the file itself there")
        if not path.is_file():
            raise ValueError(f"{path} is missing; run `rlvid evaluate` again: what is there is not made again")
    return path


def check(path: Path, kind: type[T], value: object) -> T:
    """Returns a value as one of the types above.

    Raises:
        ValueError: it is not; names the file, the key and what is allowed.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise damaged(path, f"{where}: {first['msg']}") from None


def read_text(folder: Path, path: Path) -> str:
    """Returns the text of a file; raises ValueError where it is missing, too large or not UTF-8."""
    with sound(inside(folder, path)), open(path, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise damaged(path, f"more than {_MAX_BYTES >> 20} MiB")
        return data.decode("utf-8")


def read_json(folder: Path, path: Path) -> Any:
    """Returns the content of a JSON file; raises ValueError where it is missing or damaged."""
    text = read_text(folder, path)
    with sound(path):
        try:
            return json.loads(text)
        except ValueError as error:
            raise damaged(path, error) from None


def open_table(folder: Path, path: Path, columns: Iterable[str]) -> parquet.ParquetFile:
    """Opens a Parquet file and checks that it has these columns, each once and of its kind.

    Raises:
        ValueError: it is missing, damaged or too large, or lacks a column.
    """
    with sound(inside(folder, path)):
        file = open_parquet(path)
        about, schema = file.metadata, file.schema_arrow
        sizes = (about.row_group(index).total_byte_size for index in range(about.num_row_groups))
        if about.num_rows > MAX_ROWS or max(sizes, default=0) > _MAX_BYTES_OF_GROUP:
            raise damaged(path, f"{about.num_rows} rows, or more bytes than a table has")
        for name in columns:
            if schema.names.count(name) != 1:
                raise damaged(path, f"no column {name}" if name not in schema.names else f"two columns {name}")
            kind = KINDS.get(name, "number")
            if not _is(kind, schema.field(name).type):
                raise damaged(path, f"column {name}: expected {kind}, and it has {schema.field(name).type}")
    return file


def _is(kind: str, found: pa.DataType) -> bool:
    types = pa.types
    if kind == "text":
        return types.is_string(found) or types.is_large_string(found)
    if kind == "whole":
        return types.is_integer(found)
    if kind == "number":
        return types.is_floating(found) or types.is_integer(found)
    is_list = types.is_list(found) or types.is_large_list(found)
    return is_list and (types.is_binary(found.value_type) or types.is_large_binary(found.value_type))


def rows_of(path: Path, table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Returns the rows of a table of ``open_table``; NaN where a number is missing.

    Raises:
        ValueError: another cell is missing, or a number is beyond what a score can be.
    """
    with sound(path):
        rows = table.to_pylist()
    for name in table.schema.names:
        kind = KINDS.get(name, "number")
        for row in rows:
            value = row[name]
            if kind == "number":
                row[name] = value = math.nan if value is None else float(value)
                if math.isfinite(value) and abs(value) > _LARGEST:
                    raise damaged(path, f"column {name} has {value:g}, which is no score")
            elif value is None or (kind == "frames" and None in value):
                raise damaged(path, f"column {name} has an empty cell")
            if name == "fps" and not MIN_FPS <= value <= MAX_FPS:
                raise damaged(path, f"fps of {value:g}; allowed: {MIN_FPS:g} to {MAX_FPS:g}")
    return rows


def read_table(
    folder: Path, path: Path, columns: Sequence[str], *, metrics: bool = False, limit: int = MAX_ROWS
) -> list[dict[str, Any]]:
    """Returns the rows of a whole Parquet file.

    Args:
        folder: of the evaluation.
        path: of the file.
        columns: that it must have.
        metrics: every further column of floats too.
        limit: most rows.

    Raises:
        ValueError: as ``open_table`` and ``rows_of``.
    """
    file = open_table(folder, path, columns)
    further = [f.name for f in file.schema_arrow if metrics and pa.types.is_floating(f.type) and f.name not in columns]
    if file.metadata.num_rows > limit:
        raise damaged(path, f"{file.metadata.num_rows} rows; expected {limit}")
    with sound(path), open_table(folder, path, [*columns, *further]) as file:
        return rows_of(path, file.read(columns=[*columns, *further]))
