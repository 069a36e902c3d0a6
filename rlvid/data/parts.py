"""Merges the archive's small files into parts of a size; no torch, no Ray.

A run makes a chunk of one or more files at each checkpoint. Chunks that every kept checkpoint has behind it are never
deleted again, so they are merged, in their order:

    1. archive/.merging/000.parquet, 001.parquet, ...     the rows once more
    2. archive/.merging/journal.json                      names the files to delete and the names of the new ones
    3. the old files are deleted, the new ones get their names, the journal is deleted

A process that is killed before step 2 leaves files that the next start deletes. After step 2 the next start finishes
step 3, and ``chunks.part_paths`` reads the new files wherever they are.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rlvid.data.chunks import (
    JOURNAL,
    LAYOUT,
    MERGING,
    ROW_GROUP_BYTES,
    WAY_OUT,
    ArchiveFolder,
    Part,
    merged_name,
    new_file,
)
from rlvid.data.parquet import open_parquet
from rlvid.files import write_error
from rlvid.runs.checkpoints import step_of

_Sized = tuple[Part, int]


def merge(folder: ArchiveFolder, size: int, rest: bool = False) -> list[Part]:
    """Merges chunks that all kept checkpoints have behind them; returns the parts that were made.

    Args:
        folder: of the archive; nobody else merges it.
        size: bytes of a part, about.
        rest: whether chunks that do not fill a part are merged too, such as at the end of a run.

    Raises:
        OSError: a file cannot be read or written; no row is lost.
    """
    store, root = folder.place
    try:
        behind = _oldest_checkpoint(folder)
        found = store.get_file_info(fs.FileSelector(root, allow_not_found=True))
        sized = sorted((part, info.size) for info in found if (part := Part.of(info.base_name)) and part.last < behind)
        made = list[Part]()
        for group in _groups(sized, size, rest):
            made += _merge(store, root, [part for part, _ in group], size)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise write_error(f"merged part of the archive {root}", error, WAY_OUT) from error
    return made


def finish(folder: ArchiveFolder) -> None:
    """Finishes what a killed process began to merge, or deletes it where it had decided nothing.

    Raises:
        OSError: a file cannot be moved or deleted.
    """
    store, root = folder.place
    if store.get_file_info(f"{root}/{MERGING}").type == fs.FileType.NotFound:
        return
    if store.get_file_info(f"{root}/{MERGING}/{JOURNAL}").type == fs.FileType.File:
        with store.open_input_stream(f"{root}/{MERGING}/{JOURNAL}") as file:
            _carry_out(store, root, json.loads(file.read()))
    with suppress(FileNotFoundError):
        store.delete_dir(f"{root}/{MERGING}")


def _oldest_checkpoint(folder: ArchiveFolder) -> int:
    """Returns the step of the oldest checkpoint that a run may resume from; 0 without one."""
    store, root = folder.run_place
    names = [info.base_name for info in store.get_file_info(fs.FileSelector(root, allow_not_found=True))]
    return min((step for name in names if (step := step_of(name)) is not None), default=0)


def _groups(sized: Iterable[_Sized], size: int, rest: bool) -> Iterator[list[_Sized]]:
    """Yields neighbouring files that become fewer when they are merged; chunks stay whole."""
    group = list[_Sized]()
    for _, chunk in groupby(sized, key=lambda each: (each[0].first, each[0].last)):
        files = list(chunk)
        if sum(each for _, each in files) >= len(files) * size / 2:  # large already
            if rest and _fewer(group, size):
                yield group
            group = []
            continue
        group += files
        if sum(each for _, each in group) >= size:
            if _fewer(group, size):
                yield group
            group = []
    if rest and _fewer(group, size):
        yield group


def _fewer(files: list[_Sized], size: int) -> bool:
    return len(files) > max(1, -(-sum(each for _, each in files) // size))


def _merge(store: fs.FileSystem, root: str, sources: list[Part], size: int) -> list[Part]:
    store.create_dir(f"{root}/{MERGING}")
    count = _write(store, root, sources, size)
    first, last = sources[0].first, max(part.last for part in sources)
    targets = [Part(first, last, number) for number in range(count)]
    plan = {"sources": [part.name for part in sources], "targets": [part.name for part in targets]}
    with new_file(store, f"{root}/{MERGING}/{JOURNAL}") as file:
        file.write(json.dumps(plan).encode())
    _carry_out(store, root, plan)
    return targets


def _carry_out(store: fs.FileSystem, root: str, plan: dict[str, list[str]]) -> None:
    """Deletes the old files and names the new ones; may have been begun before."""
    for name in set(plan["sources"]) - set(plan["targets"]):
        with suppress(FileNotFoundError):
            store.delete_file(f"{root}/{name}")
    for number, name in enumerate(plan["targets"]):
        made = f"{root}/{MERGING}/{merged_name(number)}"
        if store.get_file_info(made).type == fs.FileType.File:
            store.move(made, f"{root}/{name}")  # over an old file of that name
    with suppress(FileNotFoundError):
        store.delete_file(f"{root}/{MERGING}/{JOURNAL}")


def _write(store: fs.FileSystem, root: str, sources: list[Part], size: int) -> int:
    """Writes the rows of the sources into files of a size; returns their number. Holds a few row groups at a time."""
    number = 0
    tables = _row_groups(store, root, sources)
    table = next(tables, None)
    while table is not None:
        path = f"{root}/{MERGING}/{merged_name(number)}"
        written = 0
        with new_file(store, path) as sink, pq.ParquetWriter(sink, table.schema, **LAYOUT) as writer:
            while table is not None and written < size:
                writer.write_table(table, row_group_size=table.num_rows)
                written += table.nbytes
                table = next(tables, None)
        number += 1
    return number


def _row_groups(store: fs.FileSystem, root: str, sources: list[Part]) -> Iterator[pa.Table]:
    """Yields the rows in tables of about the size of a row group."""
    waiting, size = list[pa.Table](), 0
    for part in sources:
        with store.open_input_file(f"{root}/{part.name}") as content:
            file = open_parquet(f"{root}/{part.name}", content)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                if waiting and size + table.nbytes > ROW_GROUP_BYTES:
                    yield pa.concat_tables(waiting)
                    waiting, size = [], 0
                waiting.append(table)
                size += table.nbytes
    if waiting:
        yield pa.concat_tables(waiting)
