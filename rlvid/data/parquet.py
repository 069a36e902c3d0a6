"""Opens Parquet files safely: refuses columns of Python objects, because reading them would run code."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def open_parquet(path: str | Path, content: pa.NativeFile | None = None, **options: Any) -> pq.ParquetFile:
    """Opens a Parquet file of plain columns; ``options`` are those of ``pyarrow.parquet.ParquetFile``.

    A file of a store is given as ``content``; then ``path`` only names it.

    Where Ray Data is loaded, it gives pyarrow a type whose values are pickles.

    Raises:
        ValueError: a column is of such a type, or of any other that is not Arrow's own.
        OSError, pyarrow.ArrowException: the file cannot be read, or is damaged.
    """
    file = pq.ParquetFile(content or path, **options)
    for field in file.schema_arrow:
        if (name := _extension(field.type)) is not None:
            file.close()
            raise ValueError(
                f"{path}: column {field.name!r} is of the type {name}, and reading it could run code; write it with "
                "plain text, numbers, bytes and lists"
            )
    return file


def _extension(kind: pa.DataType) -> str | None:
    """Returns the name of the extension type that a type is or contains; None without one."""
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    if pa.types.is_dictionary(kind):
        return _extension(kind.value_type)
    inner = (kind.field(place).type for place in range(kind.num_fields))
    return next((name for each in inner if (name := _extension(each)) is not None), None)
