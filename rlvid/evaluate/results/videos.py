"""Reads the videos of an evaluation, which may come from somebody else: frames are PNG within limits, nothing else."""

import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pyarrow import parquet

from rlvid.data.images import MAX_PIXELS, MAX_RATIO
from rlvid.evaluate.results.about import About, VideoKey, describe, key_of
from rlvid.evaluate.results.rows import VIDEO
from rlvid.evaluate.results.untrusted import open_table, rows_of, sound
from rlvid.files import damaged

MAX_PIXELS_OF_VIDEO = 2**28
"""Largest number of pixels of a video; more would be an attack on memory."""
_VIDEOS_AT_ONCE = 8


@contextmanager
def open_frame(data: bytes, where: str) -> Iterator[Image.Image]:
    """A frame, not yet decoded, whose size is within the limits.

    Raises:
        ValueError: it is no PNG, damaged, or too large; begins with ``where``.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            sides = (image.width, image.height)
            if image.width * image.height > MAX_PIXELS or max(sides) > MAX_RATIO * min(sides):
                raise _FrameError(f"has {image.width} x {image.height} pixels")
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = "has too many pixels"
    except _FrameError as error:
        reason = str(error)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error):
        raise ValueError(f"{where} is no whole PNG; delete that file and evaluate again") from None
    else:
        return
    raise ValueError(
        f"{where} {reason}; allowed are {MAX_PIXELS} pixels, and a side at most {MAX_RATIO} times the other"
    ) from None


class _FrameError(Exception):
    """A frame beyond the limits."""


def decode_frames(frames: Sequence[bytes], where: str) -> np.ndarray:
    """Returns the frames of a video as pixels (F, H, W, 3), uint8.

    Raises:
        ValueError: there are none, one is damaged or too large, or they have several sizes; begins with ``where``.
    """
    made: list[np.ndarray] = []
    for place, data in enumerate(frames):
        with open_frame(data, f"{where}: frame {place}") as image:
            made.append(np.asarray(image.convert("RGB")))
        if made[place].shape != made[0].shape:
            raise ValueError(f"{where} has frames of several sizes; delete that file and evaluate again")
        height, width, _ = made[0].shape
        if height * width * len(frames) > MAX_PIXELS_OF_VIDEO:
            raise ValueError(
                f"{where} has {len(frames)} frames of {width} x {height} pixels; allowed are {MAX_PIXELS_OF_VIDEO} "
                "pixels in all"
            )
    if not made:
        raise ValueError(f"{where} has no frames; delete that file and evaluate again")
    return np.stack(made)


@dataclass(frozen=True)
class StoredVideo:
    """A video's place on disk, and its columns without frames.

    ``has_frames`` is False for a video of which a pixel was no number.
    """

    folder: Path
    path: Path
    group: int
    row: int
    fps: float
    has_frames: bool


def find_videos(folder: Path, about: About) -> dict[VideoKey, StoredVideo]:
    """Finds the videos of ``evaluation.yaml`` in ``videos/``, in the order on disk; other models' are passed over.

    Raises:
        ValueError: there are no files, one is damaged or has a video twice, or a prompt is not the evaluation's.
    """
    paths = sorted((folder / "videos").glob("part-*.parquet"))
    if not paths:
        raise ValueError(f"{folder}: its videos are missing (no videos/part-*.parquet); run `rlvid evaluate` again")
    found: dict[VideoKey, StoredVideo] = {}
    for path in paths:
        for row, video in _stored(folder, path):
            key = key_of(row)
            if not about.has(key):
                continue
            if key in found:
                raise ValueError(
                    f"{path}: the video of {describe(key)} is there twice, also in {found[key].path.name}; delete the "
                    "file that is a copy"
                )
            if row["prompt"] != (prompt := about.sets[key[1].set][key[1].index]):
                raise ValueError(
                    f"{path}: {describe(key)} was made for {row['prompt']!r}, and evaluation.yaml has {prompt!r} "
                    "there; evaluate into a new folder"
                )
            found[key] = video
    return found


def _stored(folder: Path, path: Path) -> Iterator[tuple[dict[str, Any], StoredVideo]]:
    """Yields the columns of each video but its frames, and where it is."""
    with open_table(folder, path, [*VIDEO.names, "fps", "frames"]) as file:
        for group in range(file.num_row_groups):
            with sound(path):
                table = file.read_row_group(group, columns=[*VIDEO.names, "fps"])
                empty = _without_frames(file, group)
            for place, row in enumerate(rows_of(path, table)):
                yield row, StoredVideo(folder, path, group, place, row["fps"], place not in empty)


def _without_frames(file: parquet.ParquetFile, group: int) -> set[int]:
    """Returns the rows of a group without frames; reads them only where the file's statistics do not decide."""
    about = file.metadata.row_group(group)
    columns = (about.column(index) for index in range(about.num_columns))
    known = next(each.statistics for each in columns if each.path_in_schema.split(".")[0] == "frames")
    if known is not None and known.has_null_count and not known.null_count:  # an empty list counts as a null
        return set()
    lengths = (pc.list_value_length(batch.column(0)).to_pylist() for batch in _batches(file, group))
    return {row for row, length in enumerate(chain.from_iterable(lengths)) if not length}


def _batches(file: parquet.ParquetFile, group: int) -> Iterator[pa.RecordBatch]:
    """Yields the frames of a row group, few videos at a time: a small file can hold far more than fits into memory."""
    return iter(file.iter_batches(_VIDEOS_AT_ONCE, row_groups=[group], columns=["frames"]))


def read_frames(videos: Iterable[StoredVideo]) -> Iterator[list[bytes]]:
    """Reads the frames of each video, PNG each; a row group is opened once for videos that come in its order.

    Raises:
        ValueError: a file is missing or damaged, or has fewer videos than it had.
    """
    for (folder, path, group), members in groupby(videos, lambda video: (video.folder, video.path, video.group)):
        with open_table(folder, path, ["frames"]) as file:
            batches, table, first = _batches(file, group), None, 0
            for video in members:
                assert video.row >= first, "videos of a row group come in its order"
                while table is None or video.row >= first + len(table):
                    first += len(table) if table is not None else 0
                    with sound(path):
                        batch = next(batches, None)
                    if batch is None:
                        raise damaged(path, "it has fewer videos than before")
                    table = pa.Table.from_batches([batch])
                yield rows_of(path, table.slice(video.row - first, 1))[0]["frames"]
