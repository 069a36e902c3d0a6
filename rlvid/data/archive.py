"""The archive of generated samples: Parquet, one row a video, written beside training.

A part holds what one worker made in one step, and is named after both: a run that resumes writes the same names again
and leaves no duplicates. A part is written atomically. DuckDB, pandas and Ray read the folder as it is:

    select step, avg(reward) from 'archive/*.parquet' group by step

``frames`` are PNG files, 8 bits a channel.
"""

import io
import logging
import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from rlvid.algorithms.base import Samples
from rlvid.data.parquet import open_parquet
from rlvid.files import atomic_file, write_error
from rlvid.plots.video import to_bytes

log = logging.getLogger(__name__)

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
_PART = re.compile(r"step-(\d+)-rank-(\d+)\.parquet")
_WAITING_BYTES = 256 * 2**20
"""Pixels that may be waiting or under way before ``write`` waits too; a part alone may be larger."""


class ArchiveWriter:
    """Writes samples from a background thread; also a context manager that closes itself.

    Args:
        folder: of the archive; made if need be.
        run: name of the run.
        algorithm: name of the method.
        config_hash: fingerprint of the run's settings.
        seed: of the run.
        fps: frames a second of a whole video.
        model: path of the base model; the adapter is the run's at the row's step.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        run: str,
        algorithm: str,
        config_hash: str,
        seed: int,
        fps: float,
        model: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"archive {folder}: the folder cannot be made ({error.strerror}); choose one you can write to"
            ) from error
        self._common: dict[str, Any] = {
            "run": run, "algorithm": algorithm, "config_hash": config_hash, "seed": seed, "fps": fps, "model": model
        }  # fmt: skip
        self._held_up = False
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="archive")
        self._pending: deque[tuple[Future[None], int]] = deque()  # with the bytes of pixels that each holds

    def write(self, step: int, rank: int, samples: Samples, held_out_B: Tensor | None = None) -> None:
        """Hands samples over; waits only when the disk is so far behind that pixels would fill the memory.

        Args:
            step: of the run, from 0.
            rank: of the worker.
            samples: frames_BSCHW about [0, 1] and their scores; may be changed or freed after the call.
            held_out_B: rewards that were not trained on, if there are any.

        Raises:
            OSError: an earlier part could not be written (the disk is full, say); parts before it are whole.
            ValueError: the parts of ``samples`` differ in length, or the writer is closed.
        """
        if self._thread is None:
            raise ValueError(f"archive {self.folder}: the writer is closed")
        rows = [self._common | row for row in _rows(step, rank, samples, held_out_B)]
        size = sum(pixels.nbytes for row in rows for pixels in row["frames"])
        while self._pending and (self._pending[0][0].done() or self._waiting() + size > _WAITING_BYTES):
            if not self._pending[0][0].done() and not self._held_up:
                self._held_up = True
                log.warning("archive %s: storage is slower than training, whose steps wait for it", self.folder)
            self._pending.popleft()[0].result()
        path = self.folder / f"step-{step:06d}-rank-{rank:03d}.parquet"
        self._pending.append((self._thread.submit(_write_part, path, rows), size))

    def flush(self) -> None:
        """Waits until what was handed over is on disk.

        Raises:
            OSError: a part could not be written, and no ``write`` has said so yet.
        """
        while self._pending:
            self._pending.popleft()[0].result()

    def _waiting(self) -> int:
        return sum(size for _, size in self._pending)

    def close(self) -> None:
        """Waits until everything is on disk; a second call does nothing.

        Raises:
            OSError: a part could not be written, and no ``write`` has said so yet.
        """
        if self._thread is None:
            return
        self._thread.shutdown(wait=True)
        self._thread = None
        self.flush()

    def __enter__(self) -> "ArchiveWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def trim(folder: str | Path, from_step: int) -> int:
    """Removes parts of ``from_step`` and later, and what an interrupted write left; returns how many files went.

    For a run that resumes at ``from_step``, perhaps with another number of workers, before its writers start. A folder
    that does not exist has nothing to remove.
    """
    doomed = [path for step, _, path in _parts(Path(folder)) if step >= from_step]
    doomed += Path(folder).glob(".step-*.parquet.*")
    for path in doomed:
        path.unlink(missing_ok=True)
    return len(doomed)


def read_archive(folder: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Returns the archive, ordered by step, rank and place in the batch; without ``frames`` it is small.

    Raises:
        ValueError: no parts there, or one is damaged or lacks a column.
    """
    parts = sorted(_parts(Path(folder)))
    if not parts:
        raise ValueError(f"archive {folder}: no parts (step-*-rank-*.parquet) there")
    schema = SCHEMA if columns is None else pa.schema([_field(name) for name in columns])
    tables = []
    for _, _, path in parts:
        try:
            tables.append(open_parquet(path).read(columns=schema.names).cast(schema))
        except (pa.ArrowInvalid, ValueError, OSError) as error:
            raise ValueError(f"{path}: is not a part of an archive: {' '.join(str(error).split())}") from error
    return pa.concat_tables(tables)


def is_later_part(path: str, from_step: int) -> bool:
    """Returns whether a path below a run's folder is a part of its archive of ``from_step`` or later."""
    match = _PART.fullmatch(path.removeprefix("archive/"))
    return match is not None and path.startswith("archive/") and int(match[1]) >= from_step


def _field(name: str) -> pa.Field:
    if name not in SCHEMA.names:
        raise ValueError(f"archive: no column {name!r}; allowed: {', '.join(SCHEMA.names)}")
    return SCHEMA.field(name)


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, rank, path) of every part."""
    matches = [(match, path) for path in folder.glob("step-*.parquet") if (match := _PART.fullmatch(path.name))]
    return [(int(match[1]), int(match[2]), path) for match, path in matches]


def _rows(step: int, rank: int, samples: Samples, held_out_B: Tensor | None) -> list[dict[str, Any]]:
    """Returns one dict per video, with frames as uint8 (S, H, W, 3); the thread encodes them into PNG."""
    held_out = [None] * len(samples.serials) if held_out_B is None else held_out_B.tolist()
    columns: dict[str, list[Any]] = {
        "serial": samples.serials,
        "prompt": samples.prompts,
        "reward": samples.reward_B.tolist(),
        "held_out": held_out,
        "scores": samples.scores_BS.tolist(),
        "frame_indices": samples.frames_BS.tolist(),
        "frames": [to_bytes(frames_SCHW) for frames_SCHW in samples.frames_BSCHW],
    }
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"samples of step {step}: their parts differ in length: {lengths}")
    each = zip(*columns.values(), strict=True)
    return [{"step": step, "rank": rank, **dict(zip(columns, values, strict=True))} for values in each]


def png_bytes(pixels_HWC: np.ndarray) -> bytes:
    """Returns a PNG file of a uint8 image (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def _write_part(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist([{**row, "frames": [png_bytes(p) for p in row["frames"]]} for row in rows], SCHEMA)
    try:
        with atomic_file(path) as part, open(part, "wb") as file:
            pq.write_table(table, file)
    except OSError as error:
        way_out = "make room or repair the folder; earlier parts are complete"
        raise write_error(f"archive part {path}", error, way_out) from error
