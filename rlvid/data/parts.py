"""Merges the archive's small files into parts of a size; no torch, no Ray.

A run makes a chunk of one or more files at each checkpoint. Chunks older than every kept checkpoint are never deleted
again, so they are merged, in their order:

    1. archive/.merging/TOKEN-000.parquet, ...            the rows once more
    2. archive/.merging/journal.json                      the names of the old files and of the new ones
    3. the new files get their names, the old ones are deleted, then the journal

A process that is killed before step 2 leaves files that the next merge or start deletes. After step 2 the next merge or
start finishes step 3, and ``chunks.part_paths`` reads the new files wherever they are.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from uuid import uuid4

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
    new_file,
)
from rlvid.data.parquet import open_parquet
from rlvid.files import write_error
from rlvid.runs.checkpoints import step_of

_Sized = tuple[Part, int]


def merge(folder: ArchiveFolder, size: int, rest: bool = False) -> list[Part]:
    """Merges the first chunks that fill a part and are older than every kept checkpoint; returns what was made of them.

    Args:
        folder: of the archive; nobody else merges it.
        size: bytes of a part, about.
        rest: whether chunks that do not fill a part are merged too, such as at the end of a run.

    Raises:
        OSError: a file cannot be read or written; no row is lost.
    """
    finish(folder)
    store, root = folder.place
    try:
        behind = _oldest_checkpoint(folder)
        found = store.get_file_info(fs.FileSelector(root, allow_not_found=True))
        sized = sorted((part, info.size) for info in found if (part := Part.of(info.base_name)) and part.last < behind)
        group = next(_groups(sized, size, rest), None)
        return [] if group is None else _merge(store, root, [part for part, _ in group], size)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise write_error(f"merged part of the archive {root}", error, WAY_OUT) from error


def finish(folder: ArchiveFolder) -> None:
    """Finishes what a killed process began to merge, or deletes its files if there is no journal yet.

    Raises:
        OSError: a file cannot be moved or deleted, or the journal is damaged.
    """
    store, root = folder.place
    journal = f"{root}/{MERGING}/{JOURNAL}"
    try:
        if store.get_file_info(f"{root}/{MERGING}").type == fs.FileType.NotFound:
            return
        if store.get_file_info(journal).type == fs.FileType.File:
            with store.open_input_stream(journal) as file:
                _carry_out(store, root, json.loads(file.read()))
        with suppress(FileNotFoundError):
            store.delete_dir(f"{root}/{MERGING}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise write_error(f"merged parts, which {journal} names,", error, WAY_OUT) from error


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
    made = _write(store, root, sources, size)
    first, last = sources[0].first, max(part.last for part in sources)
    taken = [part.number for part in sources if (part.first, part.last) == (first, last)]
    targets = [Part(first, last, number) for number in range(len(made))]
    if taken:  # no new file has the name of an old one
        targets = [Part(first, last, max(taken) + 1 + number) for number in range(len(made))]
    plan = {"sources": [part.name for part in sources], "made": made, "targets": [part.name for part in targets]}
    with new_file(store, f"{root}/{MERGING}/{JOURNAL}") as file:
        file.write(json.dumps(plan).encode())
    _carry_out(store, root, plan)
    with suppress(FileNotFoundError):
        store.delete_dir(f"{root}/{MERGING}")
    return targets


def _carry_out(store: fs.FileSystem, root: str, plan: dict[str, list[str]]) -> None:
    """Names the new files and deletes the old ones; may have been begun before.

    Raises:
        FileNotFoundError: a new file is gone; no old one has been deleted then.
    """
    for name, target in zip(plan["made"], plan["targets"], strict=True):
        path = f"{root}/{MERGING}/{name}"
        if store.get_file_info(path).type == fs.FileType.File:
            store.move(path, f"{root}/{target}")
        elif store.get_file_info(f"{root}/{target}").type != fs.FileType.File:
            raise FileNotFoundError(2, "a merged file is gone", f"{root}/{target}")
    for name in plan["sources"]:
        with suppress(FileNotFoundError):
            store.delete_file(f"{root}/{name}")
    with suppress(FileNotFoundError):
        store.delete_file(f"{root}/{MERGING}/{JOURNAL}")


def _write(store: fs.FileSystem, root: str, sources: list[Part], size: int) -> list[str]:
    """Writes the rows of the sources into files of a size; returns their names. Holds a few row groups at a time."""
    token, names = uuid4().hex[:8], list[str]()
    tables = _row_groups(store, root, sources)
    try:
        table = next(tables, None)
        while table is not None:
            names.append(f"{token}-{len(names):03d}.parquet")
            written, path = 0, f"{root}/{MERGING}/{names[-1]}"
            with new_file(store, path) as sink, pq.ParquetWriter(sink, table.schema, **LAYOUT) as writer:
                while table is not None and written < size:
                    writer.write_table(table, row_group_size=table.num_rows)
                    written += table.nbytes
                    table = next(tables, None)
    except BaseException:
        for name in names:  # they may fill the disk that training writes to
            with suppress(OSError):
                store.delete_file(f"{root}/{MERGING}/{name}")
        raise
    return names


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
