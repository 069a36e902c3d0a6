"""Files of the archive of generated samples: Parquet, one row a video, in any file system of pyarrow; no torch, no Ray.

A chunk is what a run archives between two checkpoints. Its parts are staged first, and get their names when the
checkpoint after them is about to count:

    archive/.staging/EPOCH/000025-000.parquet  -->  archive/step-000025-to-000049-part-00.parquet

So no file holds rows of both sides of a checkpoint, and a run that resumes deletes whole files. DuckDB, pandas and Ray
do not look into the staging folder, and read the rest as it is:

    select step, avg(reward) from 'archive/*.parquet' group by step

``frames`` are PNG or lossless WebP files, 8 bits a channel; each file says which it is.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from rlvid.files import atomic_file, write_error
from rlvid.storage import locate

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("step", pa.int64()),
        ("rank", pa.int32()),
        ("serial", pa.int64()),  # place in the run's global order; randomness is drawn at it
        ("prompt", pa.string()),
        ("algorithm", pa.string()),
        ("reward", pa.float32()),
        ("held_out", pa.float32()),  # null where no held-out reward was computed
        ("scores", pa.list_(pa.float32())),  # one for each scored frame
        ("frame_indices", pa.list_(pa.int32())),  # which frames of the video these are
        ("frames", pa.list_(pa.binary())),
        ("fps", pa.float32()),  # of the whole video; scored frames lie further apart
        ("seed", pa.int64()),
        ("config_hash", pa.string()),
        ("model", pa.string()),  # the base model; the adapter is the run's at this step
    ]
)
T = TypeVar("T")
_ATTEMPTS = 5
"""Times that an archive is read while its files are replaced."""
Form = Literal["png", "webp"]
"""Formats of pictures, both without loss."""
_OPTIONS: dict[Form, dict[str, Any]] = {"png": {}, "webp": {"lossless": True, "quality": 20, "method": 1}}
"""Options of Pillow; quality and method of lossless WebP are its effort, here about that of PNG."""
WAY_OUT = "make room or repair the folder; earlier parts are complete"
MERGING, JOURNAL = ".merging", "journal.json"
"""Folder in the archive for files that are merged, and the file in it that says what is to be done; see ``parts``."""
_STAGING = ".staging"
_NAME = re.compile(r"step-(\d+)-to-(\d+)-part-(\d+)\.parquet")
_FORMER = re.compile(r"step-(\d+)-rank-\d+\.parquet")
"""Names that earlier versions gave: a file holds one step of one worker."""
LAYOUT: dict[str, Any] = {
    "write_statistics": ["step", "rank", "serial", "reward", "held_out"],
    "use_dictionary": ["run", "prompt", "algorithm", "config_hash", "model"],
    "compression": "none",  # pictures are compressed already
}
ROW_GROUP_BYTES = 16 * 2**20


@dataclass(frozen=True, order=True)
class Part:
    """A file of the archive: rows of steps ``first`` to ``last``, both included; ``number`` counts those of a chunk."""

    first: int
    last: int
    number: int

    @property
    def name(self) -> str:
        """The file's name."""
        return f"step-{self.first:06d}-to-{self.last:06d}-part-{self.number:02d}.parquet"

    @staticmethod
    def of(name: str) -> "Part | None":
        """Returns the part that a file's name stands for; None if it is no part's."""
        match = _NAME.fullmatch(name)
        return Part(*map(int, match.groups())) if match else None


@dataclass(frozen=True)
class Staged:
    """A file in the staging folder.

    Attributes:
        name: of the file.
        first: step of its first row.
        last: step of its last row.
        rows: number of rows.
    """

    name: str
    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class ArchiveFolder:
    """The folder of an archive, on a disk or in an object store.

    Attributes:
        storage: folder or URI that the run is kept in.
        run: name of the run.
    """

    storage: str
    run: str

    @cached_property
    def place(self) -> tuple[fs.FileSystem, str]:
        """The file system, and the path in it."""
        return locate(self.storage, f"{self.run}/archive")

    @cached_property
    def run_place(self) -> tuple[fs.FileSystem, str]:
        """The file system, and the path of the run's folder in it."""
        return locate(self.storage, self.run)

    def begin(self, first_step: int, epoch: str | None) -> None:
        """Prepares the archive for a run that starts, or resumes, at a step.

        The order matters. A process of an earlier start that still moves a staged file has either moved it before the
        staging folder goes, and then the file is among the deleted parts; or it finds nothing to move.

        Args:
            first_step: what was archived of it and later steps is deleted: the run makes those samples again.
            epoch: name of this start's staging folder; None for a start that archives nothing.

        Raises:
            OSError: the folder cannot be made, or a file cannot be deleted.
        """
        store, root = self.place
        try:
            if store.get_file_info(f"{root}/{_STAGING}").type != fs.FileType.NotFound:
                store.delete_dir(f"{root}/{_STAGING}")
            for info in store.get_file_info(fs.FileSelector(root, allow_not_found=True)):
                if (last := _last_step(info.base_name)) is not None and last >= first_step:
                    store.delete_file(f"{root}/{info.base_name}")
            store.create_dir(f"{root}/{_STAGING}/{epoch}" if epoch else root)
        except OSError as error:
            raise write_error(f"archive {root}", error, "choose a folder that you may write to") from error

    def stage(self, epoch: str, table: pa.Table) -> Staged:
        """Writes rows into a staged file, which is on disk when the call returns.

        The name follows from the first row: a task that runs a second time replaces the file of the first.

        Raises:
            OSError: the file cannot be written, or a later start of the run has begun.
        """
        store, root = self.place
        steps = table["step"]
        first, last = steps[0].as_py(), steps[-1].as_py()
        name = f"{first:06d}-{table['rank'][0].as_py():03d}.parquet"
        path = f"{root}/{_STAGING}/{epoch}/{name}"
        rows = max(1, ROW_GROUP_BYTES * table.num_rows // max(1, table.nbytes))
        try:
            with new_file(store, path) as file:
                pq.write_table(table, file, row_group_size=rows, **LAYOUT)
        except OSError as error:
            raise write_error(f"archive part {path}", error, WAY_OUT) from error
        return Staged(name, first, last, table.num_rows)

    def commit(self, epoch: str, staged: Iterable[Staged]) -> list[Part]:
        """Makes a chunk of staged files: moves them out of the staging folder; returns its parts.

        A kill in between leaves some parts. No checkpoint counts yet that holds their steps, so the next start deletes
        them.

        Raises:
            OSError: a file cannot be moved.
        """
        store, root = self.place
        files = sorted(staged, key=lambda file: file.name)
        first, last = min(file.first for file in files), max(file.last for file in files)
        parts = [Part(first, last, number) for number in range(len(files))]
        for file, part in zip(files, parts, strict=True):
            target = f"{root}/{part.name}"
            try:
                store.move(f"{root}/{_STAGING}/{epoch}/{file.name}", target)
            except OSError as error:
                raise write_error(f"archive part {target}", error, WAY_OUT) from error
        return parts

    def end(self) -> None:
        """Deletes the staging folder, if there is one."""
        store, root = self.place
        if store.get_file_info(f"{root}/{_STAGING}").type != fs.FileType.NotFound:
            store.delete_dir(f"{root}/{_STAGING}")


def _last_step(name: str) -> int | None:
    """Returns the last step of a file of the archive; None if a name is no such file's."""
    if part := Part.of(name):
        return part.last
    match = _FORMER.fullmatch(name)
    return int(match[1]) if match else None


@contextmanager
def new_file(store: fs.FileSystem, path: str) -> Iterator[Any]:
    """Opens a file that appears once it is whole, and is on disk then."""
    if store.type_name == "local":
        with atomic_file(Path(path)) as part, open(part, "wb") as file:
            yield file
    else:
        with store.open_output_stream(path) as file:
            yield file


def part_paths(folder: Path) -> list[Path]:
    """Returns the files of an archive on disk, ordered by their steps; each row is in one of them."""
    try:
        plan = json.loads((folder / MERGING / JOURNAL).read_bytes())
    except FileNotFoundError:
        plan = {"sources": [], "made": [], "targets": []}
    parts = {path.name: path for path in folder.glob("step-*.parquet") if _last_step(path.name) is not None}
    for name in plan["sources"]:
        parts.pop(name, None)
    for name, target in zip(plan["made"], plan["targets"], strict=True):
        made = folder / MERGING / name
        parts[target] = made if made.exists() else folder / target
    return [parts[name] for name in sorted(parts)]  # steps have six digits


def read_parts(folder: Path, read: Callable[[Path], T]) -> list[T]:
    """Reads all files of an archive on disk, also while files are merged and so replaced.

    Raises:
        FileNotFoundError: files go faster than they can be read.
    """
    for attempt in range(_ATTEMPTS):
        try:
            before = part_paths(folder)
            found = [read(path) for path in before]
            if part_paths(folder) == before or attempt == _ATTEMPTS - 1:
                return found
        except FileNotFoundError:
            if attempt == _ATTEMPTS - 1:
                raise
    return []


def table_of(common: dict[str, Any], pieces: Iterable[dict[str, Any]], form: Form = "png") -> pa.Table:
    """Encodes pieces, each the samples of one worker in one step, into rows of ``SCHEMA``.

    Args:
        common: values that all rows share: run, algorithm, config_hash, seed, fps, model.
        pieces: ``step``, ``rank``, and a list a column; ``frames`` are uint8 (N, S, H, W, 3).
        form: format of the pictures.
    """
    rows = []
    for piece in pieces:
        shared = common | {"step": piece["step"], "rank": piece["rank"]}
        columns = {name: values for name, values in piece.items() if name not in shared}
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            rows.append(shared | row | {"frames": [image_bytes(pixels_HWC, form) for pixels_HWC in row["frames"]]})
    return pa.Table.from_pylist(rows, SCHEMA)


def image_bytes(pixels_HWC: np.ndarray, form: Form = "png") -> bytes:
    """Returns a file of a uint8 image (H, W, 3), from which the same pixels are read again."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, form, **_OPTIONS[form])
    return buffer.getvalue()
