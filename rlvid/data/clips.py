"""The folder of encoded clips, or of prompts alone: its layout, and random access to it.

=====================  ===========================================================================================
file                   content
=====================  ===========================================================================================
``part-00000.parquet`` rows in order of ``index``; no compression, since floats would not shrink
``meta.json``          fingerprints and what they are made of, shapes, number of clips; written last
``report.json, .txt``  the files that were skipped, and why
=====================  ===========================================================================================

``mean``, ``std`` (the posterior, scaled like latents) and ``text`` are little-endian float32 in C order, of the shapes
in ``latent_shape`` (C, F, h, w) and ``text_shape`` (L, D):

    numpy.frombuffer(row["mean"], "<f4").reshape(row["latent_shape"])

A folder of prompts alone has the columns ``index`` and ``caption``.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlvid.data.parquet import open_parquet
from rlvid.files import damaged

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


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Returns the content of ``meta.json``; None when there is none, so that the folder is not a whole set of clips.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        return {**meta, "clips": int(meta["clips"]), "fingerprint": str(meta["fingerprint"])}
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error, f"delete {folder} and encode again") from error


CLIP = ("caption", "text", "text_shape", "mean", "std", "latent_shape")
"""The columns that training needs of a clip."""


class EncodedClips:
    """Random access to encoded clips, straight from the (memory-mapped) Parquet files; no torch.

    Positions run from 0 to ``len(clips) - 1`` in order of ``index``; clips that could not be read have none. Memory
    holds the files' footers, and nothing for each clip.

    Attributes:
        folder: of the files.
        meta: the content of ``meta.json``.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], files: list[pq.ParquetFile]) -> None:
        self.folder, self.meta = folder, meta
        self._files = files
        rows = [[file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] for file in files]
        self._first_group = np.cumsum([0, *map(len, rows)])  # of each file
        self._first_row = np.cumsum([0, *(count for counts in rows for count in counts)])  # of each group

    @staticmethod
    def open(folder: str | Path, fingerprint: str | None = None) -> "EncodedClips":
        """Opens a folder that ``rlvid.data.encode`` made.

        Args:
            folder: of the clips.
            fingerprint: what the clips must have been encoded with: ``model_fingerprint`` of the run's model, or the
                whole fingerprint of an ``EncodeReport``; not checked by default.

        Raises:
            ValueError: no such folder, not complete, damaged, or encoded with something else.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder of encoded clips; make it with `rlvid encode`")
        meta = read_meta(folder)
        if meta is None:
            raise ValueError(f"{folder}: has no meta.json, so it is no complete set of encoded clips; encode again")
        if fingerprint not in (None, meta["fingerprint"], meta.get("model_fingerprint")):
            made = ", ".join(f"{name} {value}" for name, value in sorted(meta.get("made_with", {}).items()))
            raise ValueError(f"{folder}: was encoded with another model or size ({made}); encode with this run's model")
        paths = sorted(folder.glob("part-*.parquet"))
        files = [_open_part(path, PROMPTS.names if meta.get("kind") == "prompts" else SCHEMA.names) for path in paths]
        rows = sum(file.metadata.num_rows for file in files)
        if rows != meta["clips"] or not rows:
            raise ValueError(f"{folder}: holds {rows} clips where meta.json says {meta['clips']}; encode again")
        with _reading(folder):
            return EncodedClips(folder, meta, files)

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def captions(self) -> Iterator[str]:
        """Yields the captions in order of position; holds those of one file at a time.

        Raises:
            ValueError: they are damaged.
        """
        for file in self._files:
            with _reading(self.folder):
                captions = file.read(columns=["caption"])["caption"].to_pylist()
            yield from captions

    def first_captions(self, count: int) -> tuple[str, ...]:
        """Returns the first different captions, ``count`` at most; reads no more than it needs."""
        found = dict[str, None]()
        for caption in self.captions():
            if len(found) == count:
                break
            found[caption] = None
        return tuple(found)

    def rows(self, positions: Sequence[int]) -> pa.Table:
        """Returns the columns ``CLIP`` of clips by position, in any order and any number of times.

        Of prompts alone there is ``caption``.

        Raises:
            ValueError: no position is given, one is outside [0, len), or a file is damaged.
        """
        wrong = [i for i in positions if not 0 <= i < len(self)]
        if wrong or not positions:
            raise ValueError(f"clips {wrong}: allowed positions are 0 to {len(self) - 1}, at least one")
        groups = np.searchsorted(self._first_row, positions, side="right") - 1
        with _reading(self.folder):
            read = {group: self._read_group(group) for group in dict.fromkeys(groups.tolist())}
        starts = self._first_row[groups].tolist()
        return pa.concat_tables(
            read[group].slice(position - start, 1)
            for position, group, start in zip(positions, groups.tolist(), starts, strict=True)
        )

    def placeholder(self) -> pa.Table:
        """Returns a row like those of ``rows``, of zeros, for a clip that cannot be read."""
        row: dict[str, Any] = {"caption": "unreadable"}
        for name, shape in (("mean", "latent_shape"), ("std", "latent_shape"), ("text", "text_shape")):
            if shape in self.meta:
                row |= {name: bytes(4 * math.prod(self.meta[shape])), shape: self.meta[shape]}
        schema = self._files[0].schema_arrow
        return pa.Table.from_pylist([row], pa.schema([schema.field(name) for name in CLIP if name in schema.names]))

    def _read_group(self, group: int) -> pa.Table:
        number = int(np.searchsorted(self._first_group, group, side="right")) - 1
        file = self._files[number]
        columns = [name for name in CLIP if name in file.schema_arrow.names]
        return file.read_row_group(group - int(self._first_group[number]), columns=columns).select(columns)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns errors of damaged files into one line."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(folder, error, "encode again") from error


def _open_part(path: Path, names: Sequence[str]) -> pq.ParquetFile:
    try:
        file = open_parquet(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error, "encode again") from error
    missing = [name for name in names if name not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; columns found: {', '.join(file.schema_arrow.names)}")
    return file


def digest(made_with: object) -> str:
    """Returns sixteen hex digits over what clips or videos are made with, in values that JSON can hold."""
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]
