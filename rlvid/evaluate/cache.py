"""The videos of an evaluation on disk: Parquet, one row a video, frames as PNG of 8 bits.

A part is written atomically, and says in its metadata what its videos were made from: an evaluation takes a
part for its own only if that is what it would make. ``frames`` is empty where the model gave a pixel that is no number.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rlvid.data.chunks import image_bytes
from rlvid.evaluate.results.rows import METRICS, VIDEO, Row, rows_table
from rlvid.evaluate.results.untrusted import damaged, open_table, read_table, sound
from rlvid.evaluate.results.videos import decode_frames
from rlvid.files import atomic_file
from rlvid.plots.video import to_bytes

_LABELS = VIDEO.append(pa.field("fps", pa.float32()))
SCHEMA = _LABELS.append(pa.field("frames", pa.list_(pa.binary())))
_KEY = b"rlvid.identity"
_IDENTITY = re.compile(rb"[0-9a-f]{16}")
_ROWS_IN_GROUP = 4  # a group is read whole, and pages show one video here and one there


def write_part(path: Path, rows: Sequence[dict[str, Any]], frames_BFCHW: Tensor, identity: str) -> None:
    """Writes the videos of a shard.

    Args:
        path: of the file.
        rows: all of ``SCHEMA`` but the frames, a dict a video.
        frames_BFCHW: their frames in [0, 1]; NaN in a video that is not finite.
        identity: what they were made from, as ``identity_of`` gives it back.

    Raises:
        OSError: it cannot be written; nothing of it is left then.
    """
    frames = [
        [image_bytes(pixels) for pixels in to_bytes(video)] if video.isfinite().all() else [] for video in frames_BFCHW
    ]
    table = pa.Table.from_pylist([{**row, "frames": each} for row, each in zip(rows, frames, strict=True)], SCHEMA)
    _write(path, table, identity)


def _write(path: Path, table: pa.Table, identity: str) -> None:
    table = table.replace_schema_metadata({_KEY: identity.encode()})
    with atomic_file(path) as part, open(part, "wb") as file:
        pq.write_table(table, file, row_group_size=_ROWS_IN_GROUP, compression="none")


def identity_of(path: Path) -> str:
    """Reads the identity that ``write_part`` wrote; empty for another file.

    Raises:
        ValueError: the file is damaged.
    """
    with sound(path):
        found = (pq.read_schema(path).metadata or {}).get(_KEY) or b""
    return found.decode() if _IDENTITY.fullmatch(found) else ""  # it becomes the name of a file


def copy_part(source: Path, target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the same videos under the names of ``rows``, atomically."""
    with open_table(source.parent, source, ["frames"]) as file, sound(source):
        frames = file.read(columns=["frames"])["frames"]
    if len(frames) != len(rows):
        raise damaged(source, f"{len(frames)} videos; expected {len(rows)}")
    table = pa.Table.from_pylist([dict(row) for row in rows], _LABELS)
    _write(target, table.append_column(SCHEMA.field("frames"), frames), identity_of(source))


def labels_of(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a part without their frames."""
    return read_table(path.parent, path, _LABELS.names)


def read_part(path: Path) -> Tensor:
    """frames_BFCHW of a part, float32 in [0, 1], each one of 256 levels; NaN where a video has no frames.

    Raises:
        ValueError: the file is damaged.
    """
    kept = [row["frames"] for row in read_table(path.parent, path, ["frames"])]
    videos = [_video(frames, f"{path}: video {place}") if frames else None for place, frames in enumerate(kept)]
    shape = next((video.shape for video in videos if video is not None), (2, 3, 8, 8))
    if any(video is not None and video.shape != shape for video in videos):
        raise damaged(path, "videos of several shapes")
    broken = torch.full(shape, torch.nan)
    return torch.stack([broken if video is None else video for video in videos])


def _video(frames: Sequence[bytes], where: str) -> Tensor:
    return torch.from_numpy(decode_frames(frames, where)).permute(0, 3, 1, 2).float() / 255


def shape_of(path: Path) -> tuple[float, int, int, int] | None:
    """fps, frames, width and height of the first video of a part that has frames; None where none has."""
    for row in read_table(path.parent, path, ["fps", "frames"]):
        if row["frames"]:
            height, width = _video(row["frames"][:1], f"{path}: a video").shape[-2:]
            return row["fps"], len(row["frames"]), width, height
    return None


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turns an error of a full disk, in the block, into a message with the way out.

    Raises:
        ValueError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{folder}: {os.strerror(error.errno)}; make room and start the same command again: it keeps finished "
            "videos and scores"
        ) from None


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes the scores of a shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part, open(part, "wb") as file:
        pq.write_table(rows_table(rows), file)


def read_rows(path: Path) -> list[Row]:
    """Reads the scores of a shard.

    Raises:
        ValueError: the file is damaged.
    """
    return [Row.of(row) for row in read_table(path.parent, path, [*VIDEO.names, *METRICS], metrics=True)]
