"""The archive of generated samples as tensors and tables: what workers hand over, and what readers get.

``rlvid.data.chunks`` says how its files are named and written.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from rlvid.algorithms.base import Samples
from rlvid.data.chunks import SCHEMA, read_parts
from rlvid.data.parquet import open_parquet
from rlvid.plots.video import to_bytes

_ORDER = ("step", "rank", "serial")


def piece_of(step: int, rank: int, samples: Samples, held_out_B: Tensor | None = None) -> dict[str, Any]:
    """Returns the samples of one worker in one step without tensors: a list a column, see ``chunks.table_of``.

    Args:
        step: of the run, from 0.
        rank: of the worker.
        samples: frames_BSCHW about [0, 1] and their scores; may be changed or freed after the call.
        held_out_B: rewards that were not trained on, if there are any.

    Returns:
        ``step``, ``rank``, and columns of N videos; ``frames`` is uint8 (N, S, H, W, 3).

    Raises:
        ValueError: the parts of ``samples`` differ in length.
    """
    count = len(samples.frames_BSCHW)
    pixels_BSHWC = to_bytes(samples.frames_BSCHW.flatten(0, 1))
    columns: dict[str, Any] = {
        "serial": samples.serials,
        "prompt": samples.prompts,
        "reward": samples.reward_B.tolist(),
        "held_out": [None] * len(samples.serials) if held_out_B is None else held_out_B.tolist(),
        "scores": samples.scores_BS.tolist(),
        "frame_indices": samples.frames_BS.tolist(),
        "frames": pixels_BSHWC.reshape(count, -1, *pixels_BSHWC.shape[1:]),
    }
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"samples of step {step}: their parts differ in length: {lengths}")
    return {"step": step, "rank": rank, **columns}


def read_archive(folder: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Returns the archive, ordered by step, rank and place in the run's order; without ``frames`` it is small.

    Raises:
        ValueError: no parts there, or one is damaged or lacks a column.
    """
    wanted = SCHEMA.names if columns is None else columns
    schema = pa.schema([_field(name) for name in dict.fromkeys([*wanted, *_ORDER])])

    def read(path: Path) -> pa.Table:
        try:
            return open_parquet(path).read(columns=schema.names).select(schema.names).cast(schema)
        except FileNotFoundError:
            raise
        except (pa.ArrowInvalid, ValueError, KeyError, OSError) as error:
            raise ValueError(f"{path}: is not a part of an archive: {' '.join(str(error).split())}") from error

    tables = read_parts(Path(folder), read)
    if not tables:
        raise ValueError(f"archive {folder}: no parts (step-*-to-*-part-*.parquet) there")
    return pa.concat_tables(tables).sort_by([(name, "ascending") for name in _ORDER]).select(wanted)


def _field(name: str) -> pa.Field:
    if name not in SCHEMA.names:
        raise ValueError(f"archive: no column {name!r}; allowed: {', '.join(SCHEMA.names)}")
    return SCHEMA.field(name)
