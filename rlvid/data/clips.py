"""The folder of encoded clips, or of prompts alone: its layout, and random access to it.

=====================  ===========================================================================================
file                   content
=====================  ===========================================================================================
``part-00000.parquet`` rows in order of ``index``; no compression, since floats would not shrink
``meta.json``          fingerprints and what they are made of, shapes, number of clips, and of each part its name,
                       rows and bytes; written last
``report.json, .txt``  the files that were skipped, and why
=====================  ===========================================================================================

``mean``, ``std`` (the posterior, scaled like latents) and ``text`` are little-endian float32 in C order, of the shapes
in ``latent_shape`` (C, F, h, w) and ``text_shape`` (L, D), without rows of zeros at its end:

    numpy.frombuffer(row["mean"], "<f4").reshape(row["latent_shape"])

A folder of prompts alone has the columns ``index`` and ``caption``; a list of videos also ``source``, the path of the
file, and ``key``, sixteen hex digits over caption and content.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rlvid.data.parquet import open_parquet
from rlvid.files import damaged
from rlvid.storage import locate, place_of, reaching

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # place in the source
        ("source", pa.string()),
        ("caption", pa.string()),
        ("mean", pa.binary()),
        ("std", pa.binary()),
        ("text", pa.binary()),
        ("latent_shape", pa.list_(pa.int32())),
        ("text_shape", pa.list_(pa.int32())),
    ]
)
PROMPTS = pa.schema([("index", pa.int64()), ("caption", pa.string())])
"""The rows of a folder of prompts."""
ROWS = SCHEMA.append(pa.field("error", pa.string()))
"""The encoder's rows: a row of the folder, or one with an ``error`` and nothing encoded."""


CLIP = ("caption", "text", "text_shape", "mean", "std", "latent_shape")
"""The columns that training needs of a clip."""
Kind = Literal["clips", "prompts", "videos", "pairs"]
"""Kinds of rows; those of videos name files, which are encoded on the way to training."""
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "clips": CLIP, "prompts": ("caption",), "videos": ("caption", "source", "key"),
    "pairs": ("caption", "a", "b", "shape", "preference"),
}  # fmt: skip
"""The columns that training needs of each kind."""
_FOOTERS = 128
"""Parts whose footers a process keeps, at about 1 MB each."""


def read_meta(place: str | Path) -> dict[str, Any] | None:
    """Returns the content of ``meta.json``; None when there is none, so that the folder is not a whole set of clips.

    Raises:
        ValueError: the file is damaged, or the store cannot be reached.
    """
    place = place_of(place)
    store, root = locate(place, "")
    path = f"{root}/meta.json"
    with reaching(place):
        if store.get_file_info(path).type != fs.FileType.File:
            return None
        with store.open_input_stream(path) as file:
            content = file.read()
    try:
        meta = json.loads(content.decode("utf-8"))
        if "parts" not in meta:
            meta["parts"] = _parts_there(store, root)
        parts = [[str(name), int(rows), int(size)] for name, rows, size in meta["parts"]]
        if meta.get("kind", "clips") not in COLUMNS:
            raise ValueError(f"it holds rows of the kind {meta['kind']!r}")
        return {**meta, "clips": int(meta["clips"]), "fingerprint": str(meta["fingerprint"]), "parts": parts}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise damaged(f"{place}/meta.json", error, f"delete {place} and encode again") from error


def _parts_there(store: fs.FileSystem, root: str) -> list[tuple[str, int, int]]:
    """Returns name, rows and bytes of each part of a folder that an earlier version made."""
    found = [info for info in store.get_file_info(fs.FileSelector(root)) if info.base_name.startswith("part-")]
    parts = []
    for info in sorted(found, key=lambda info: info.base_name):
        with store.open_input_file(info.path) as file:
            parts.append((info.base_name, pq.read_metadata(file).num_rows, info.size))
    return parts


_TAIL = 1 << 16
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


class DamagedPart(ValueError):
    """A part, or a row group of it, that cannot be read although storage gives its bytes."""


class EncodedClips:
    """Random access to encoded clips in the Parquet files of a folder or an object store; no torch.

    Positions run from 0 to ``len(clips) - 1`` in order of ``index``; clips that could not be read have none. A part is
    opened when one of its clips is read, and local parts are memory-mapped.

    Attributes:
        place: folder or URI.
        meta: the content of ``meta.json``.
    """

    def __init__(self, place: str, meta: dict[str, Any]) -> None:
        self.place, self.meta = place, meta
        self._store, self._root = locate(place, "")
        self._first_row = np.cumsum([0, *(rows for _, rows, _ in meta["parts"])])  # of each part
        self._local = self._store.type_name == "local"
        self._footers = dict[int, pq.FileMetaData]()

    @staticmethod
    def open(place: str | Path, fingerprint: str | None = None) -> "EncodedClips":
        """Opens what ``rlvid.data.encode`` made; reads ``meta.json`` alone, and compares names and sizes of the parts.

        Args:
            place: folder, or URI of one in an object store.
            fingerprint: what the clips must have been encoded with: ``model_fingerprint`` of the run's model, or the
                whole fingerprint of an ``EncodeReport``; not checked by default.

        Raises:
            ValueError: no such folder, not complete, damaged, encoded with something else, or the store cannot be
                reached.
        """
        place = place_of(place)
        store, root = locate(place, "")
        with reaching(place):
            there = {info.base_name: info.size for info in store.get_file_info(fs.FileSelector(root, True))}
        if not there:
            raise ValueError(f"{place}: no such folder of encoded clips; make it with `rlvid encode`")
        meta = read_meta(place)
        if meta is None:
            raise ValueError(f"{place}: has no meta.json, so it is no complete set of encoded clips; encode again")
        if fingerprint not in (None, meta["fingerprint"], meta.get("model_fingerprint")):
            made = ", ".join(f"{name} {value}" for name, value in sorted(meta.get("made_with", {}).items()))
            raise ValueError(f"{place}: was encoded with another model or size ({made}); encode with this run's model")
        for name, _, size in meta["parts"]:
            if there.get(name) != size:
                found = f"{there[name]:,} bytes" if name in there else "missing"
                raise damaged(f"{place}/{name}", f"{found}, where meta.json says {size:,} bytes", "encode again")
        rows = sum(rows for _, rows, _ in meta["parts"])
        if rows == meta["clips"] == 0:
            raise ValueError(f"{place}: has no clips; encode videos with captions into it, or name another data.source")
        if rows != meta["clips"]:
            raise damaged(f"{place}/meta.json", "its numbers of clips differ", "encode again")
        return EncodedClips(place, meta)

    @property
    def kind(self) -> Kind:
        """The kind of its rows."""
        return next(kind for kind in COLUMNS if kind == self.meta.get("kind", "clips"))

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def captions(self) -> Iterator[str]:
        """Yields the captions in order of position; holds those of one part at a time.

        Raises:
            DamagedPart: they cannot be read.
            OSError: storage fails.
        """
        return self.column("caption")

    def column(self, name: str) -> Iterator[Any]:
        """Yields the values of a column, as ``captions`` does."""
        for number in range(len(self.meta["parts"])):
            yield from self._read(number, None, [name])[name].to_pylist()

    def readable_captions(self) -> Iterator[str]:
        """Yields the captions of the parts that are not damaged, in order of position."""
        for number in range(len(self.meta["parts"])):
            with suppress(DamagedPart):
                yield from self._read(number, None, ["caption"])["caption"].to_pylist()

    def rows(self, positions: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Returns columns of clips by position, in any order and any number of times.

        By default ``COLUMNS`` of their kind.

        Raises:
            ValueError: no position is given, or one is outside [0, len).
            DamagedPart: one of them cannot be read.
            OSError: storage fails.
        """
        wrong = [i for i in positions if not 0 <= i < len(self)]
        if wrong or not positions:
            raise ValueError(f"clips {wrong}: allowed positions are 0 to {len(self) - 1}, at least one")
        parts = (np.searchsorted(self._first_row, positions, side="right") - 1).tolist()
        groups = dict[tuple[int, int], pa.Table]()
        found = []
        columns = columns or COLUMNS[self.kind]
        for position, number in zip(positions, parts, strict=True):
            group, place = divmod(position - int(self._first_row[number]), self._rows_in_group(number))
            if (number, group) not in groups:
                groups[number, group] = self._read(number, group, columns)
            found.append(groups[number, group].slice(place, 1))
        return pa.concat_tables(found)

    def _read(self, number: int, group: int | None, columns: Sequence[str]) -> pa.Table:
        """Returns columns of a row group of a part, or of the whole part.

        Raises:
            DamagedPart: two handles cannot read what storage gives.
            OSError: storage fails.
        """
        name = self.meta["parts"][number][0]
        try:
            return self._attempt(number, group, columns)
        except _UNREADABLE:
            self._footers.pop(number, None)
        try:
            return self._attempt(number, group, columns)
        except _UNREADABLE as error:
            self._probe(number, group)
            raise DamagedPart(str(damaged(f"{self.place}/{name}", error, "encode again"))) from error

    def _attempt(self, number: int, group: int | None, columns: Sequence[str]) -> pa.Table:
        name, rows, _ = self.meta["parts"][number]
        with ExitStack() as stack:
            file = None if self._local else stack.enter_context(self._store.open_input_file(f"{self._root}/{name}"))
            footer, path = self._footers.get(number), f"{self._root}/{name}" if self._local else f"{self.place}/{name}"
            part = stack.enter_context(
                open_parquet(path, file, metadata=footer, memory_map=self._local, page_checksum_verification=True)
            )
            if part.metadata.num_rows != rows:
                raise pa.ArrowInvalid(f"it has {part.metadata.num_rows} rows where meta.json says {rows}")
            missing = [column for column in columns if column not in part.schema_arrow.names]
            if missing:
                raise pa.ArrowInvalid(f"it lacks the column {missing[0]}")
            self._footers[number] = part.metadata
            while len(self._footers) > _FOOTERS:
                del self._footers[next(iter(self._footers))]
            table = part.read(columns=columns) if group is None else part.read_row_group(group, columns=columns)
            return table.select(columns)

    def _rows_in_group(self, number: int) -> int:
        """Returns the rows of a part's first row groups; only the last one may have fewer."""
        if number not in self._footers:
            self._read(number, 0, ["caption"])
        return int(self._footers[number].row_group(0).num_rows)

    def _probe(self, number: int, group: int | None) -> None:
        """Reads the bytes of a row group; raises OSError where storage does not give them."""
        name, _, size = self.meta["parts"][number]
        start, count = max(0, size - _TAIL), _TAIL
        if number in self._footers and group is not None:
            about = self._footers[number].row_group(group)
            columns = [about.column(place) for place in range(about.num_columns)]
            start, count = min(each.data_page_offset for each in columns), about.total_byte_size
        with self._store.open_input_file(f"{self._root}/{name}") as file:
            file.read_at(count, start)


def digest(made_with: object) -> str:
    """Returns sixteen hex digits over what clips or videos are made with, in values that JSON can hold."""
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]
