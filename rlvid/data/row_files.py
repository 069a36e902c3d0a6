"""Files of encoded rows on their way into the parts of a folder of clips; written by the processes that encode."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlvid.data.clips import SCHEMA
from rlvid.data.parquet import open_parquet
from rlvid.files import atomic_file, write_atomic

_LAYOUT: dict[str, Any] = {
    "row_group_size": 2, "compression": "none", "use_dictionary": False, "write_statistics": ["index"],
    "write_page_checksum": True,  # a flipped bit is seen when its page is read
}  # fmt: skip
# Two rows in a group: a group is read whole, and clips are fetched one here, one there. One row would double the time
# that it takes to read all captions, and the footers (0.3 KB a clip).


def keep_rows(work: Path, table: pa.Table, by: str = "") -> pa.Table:
    """Keeps encoded rows; they survive the process once the call has returned.

    Args:
        work: folder of an encoding.
        table: rows of schema ``ROWS``.
        by: what the names of the files end with; a process of a killed start may still write beside a new one.

    Returns:
        Their ``index``, ``source`` and ``error``, and ``file``, the name of the file that has the row now.
    """
    good = table.filter(table["error"].is_null()).select(SCHEMA.names).cast(SCHEMA)
    about = table.select(["index", "source", "error"])
    bad = about.filter(table["error"].is_valid()).to_pylist()
    names = {True: "", False: ""}
    if bad:
        names[False] = f"skipped-{bad[0]['index']:09d}{by}.json"
        write_atomic(work / names[False], json.dumps(bad).encode())
    if good.num_rows:
        names[True] = f"rows-{good['index'][0].as_py():09d}{by}.parquet"
        write_rows(good, work / names[True])
    return about.append_column("file", pa.array([names[not error.is_valid] for error in table["error"]], pa.string()))


def make_part(files: Sequence[Path], indices: Sequence[int], path: Path) -> None:
    """Writes a part: the rows with these indices, in order and each once, out of files of rows.

    Raises:
        ValueError: the files lack some of them.
    """
    table = pa.concat_tables([open_parquet(file).read() for file in files])
    table = table.filter(pc.is_in(table["index"], value_set=pa.array(indices)))
    found, places = np.unique(table["index"].to_numpy(), return_index=True)
    if found.tolist() != sorted(indices):
        raise ValueError(
            f"{path.parent}: rows of {len(indices) - len(found)} clips are gone; delete it and encode again"
        )
    write_rows(table.take(places).combine_chunks(), path)


def write_rows(table: pa.Table, path: Path) -> None:
    """Writes encoded rows in the layout of the parts of a folder of clips; the file appears whole."""
    with atomic_file(path) as part:
        pq.write_table(table, part, **_LAYOUT)
