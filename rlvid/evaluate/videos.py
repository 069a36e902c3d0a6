"""The videos of an evaluation on disk: Parquet, one row a video, frames as PNG of 8 bits.

A part is written whole or not at all, and says in its metadata what its videos were made from: an evaluation takes a
part for its own only if that is what it would make. ``frames`` is empty where the model gave a pixel that is no number.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from rlvid.data.archive import png_bytes
from rlvid.data.videos import to_bytes
from rlvid.evaluate.scores import told_if_damaged

SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("set", pa.string()),
        ("steps", pa.int32()),  # D
        ("index", pa.int32()),  # place of the prompt in its set
        ("copy", pa.int32()),  # which of the prompt's videos
        ("prompt", pa.string()),
        ("fps", pa.float32()),
        ("frames", pa.list_(pa.binary())),
    ]
)
_KEY = b"rlvid.identity"
_ROWS_IN_GROUP = 4  # a group is read whole, and pages show one video here and one there


def write_part(path: Path, rows: Sequence[dict[str, Any]], frames_BFCHW: Tensor, identity: str) -> None:
    """Writes the videos of a portion.

    Args:
        path: of the file.
        rows: all of ``SCHEMA`` but the frames, a dict a video.
        frames_BFCHW: their frames in [0, 1]; NaN in a video that is not finite.
        identity: what they were made from, as ``identity_of`` gives it back.

    Raises:
        OSError: it cannot be written; nothing of it is left then.
    """
    frames = [
        [png_bytes(pixels) for pixels in to_bytes(video)] if video.isfinite().all() else [] for video in frames_BFCHW
    ]
    table = pa.Table.from_pylist([{**row, "frames": each} for row, each in zip(rows, frames, strict=True)], SCHEMA)
    _write(path, table, identity)


def _write(path: Path, table: pa.Table, identity: str) -> None:
    table = table.replace_schema_metadata({_KEY: identity.encode()})
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            pq.write_table(table, file, row_group_size=_ROWS_IN_GROUP, compression="none")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def identity_of(path: Path) -> str:
    """What ``write_part`` was given; empty for a part that it did not write.

    Raises:
        ValueError: the file is damaged.
    """
    with told_if_damaged(path):
        return ((pq.read_schema(path).metadata or {}).get(_KEY) or b"").decode()


def copy_part(source: Path, target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The same videos under other names: what the rows say, whole or not at all."""
    with told_if_damaged(source):
        frames = pq.ParquetFile(source).read(columns=["frames"])["frames"]
    table = pa.Table.from_pylist([dict(row) for row in rows], pa.schema([f for f in SCHEMA if f.name != "frames"]))
    _write(target, table.append_column(SCHEMA.field("frames"), frames), identity_of(source))


def labels_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a part without their frames."""
    names = [field.name for field in SCHEMA if field.name != "frames"]
    with told_if_damaged(path):
        return pq.ParquetFile(path).read(columns=names).to_pylist()


def read_part(path: Path) -> Tensor:
    """frames_BFCHW of a part, float32 in [0, 1], each one of 256 levels; NaN where a video has no frames.

    Raises:
        ValueError: the file is damaged.
    """
    with told_if_damaged(path):
        kept = pq.ParquetFile(path).read(columns=["frames"])["frames"].to_pylist()
        videos = [None if not frames else torch.stack([_frame(each) for each in frames]) for frames in kept]
    shape = next((video.shape for video in videos if video is not None), (2, 3, 8, 8))
    broken = torch.full(shape, torch.nan)
    return torch.stack([broken if video is None else video for video in videos])


def _frame(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def shape_of(path: Path) -> tuple[float, int, int] | None:
    """fps, frames and size of the first video of a part that has frames; None where none has."""
    with told_if_damaged(path):
        for row in pq.ParquetFile(path).read(columns=["fps", "frames"]).to_pylist():
            if row["frames"]:
                return row["fps"], len(row["frames"]), _frame(row["frames"][0]).shape[-1]
    return None
