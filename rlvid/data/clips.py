"""The folder of encoded clips: its layout, and random access to it.

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
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rlvid.data.parquet import open_parquet
from rlvid.files import damaged
from rlvid.models.base import Posterior
from rlvid.randomness import permutation

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
ROWS = SCHEMA.append(pa.field("error", pa.string()))
"""The encoder's rows: a row of the folder, or one with an ``error`` and nothing encoded."""


def clip_index(serial: int, count: int, seed: int) -> int:
    """Returns the clip from which a run's sample ``serial`` starts: each clip once an epoch, in the epoch's order.

    Args:
        serial: place of the sample in the run's global order, from 0.
        count: number of clips.
        seed: of the run.

    Returns:
        An index in [0, count), a function of the arguments alone.

    Raises:
        ValueError: ``count`` is not positive or ``serial`` is negative.
    """
    if count < 1 or serial < 0:
        raise ValueError(f"serial = {serial} of count = {count} clips: serial starts at 0 and count at 1")
    epoch, place = divmod(serial, count)
    return int(_order(count, seed, epoch)[place])


@lru_cache(maxsize=4)  # the epoch's, and the next one's when a batch lies across the border
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return permutation(count, seed, "order", epoch)


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


class EncodedClips:
    """Random access to encoded clips, straight from the (memory-mapped) Parquet files.

    Attributes:
        meta: what ``meta.json`` holds.
        captions: of all clips, by position. Positions run from 0 to ``len(clips) - 1`` in order of ``index``; clips
            that could not be read have none.
    """

    def __init__(self, meta: dict[str, Any], files: list[pq.ParquetFile]) -> None:
        self.meta = meta
        self._files = files
        indices: list[int] = []
        captions: list[str] = []
        places: list[tuple[int, int, int]] = []  # file, row group, row in it
        for number, file in enumerate(files):
            head = file.read(columns=["index", "caption"])
            indices += head["index"].to_pylist()
            captions += head["caption"].to_pylist()
            for group in range(file.num_row_groups):
                places += [(number, group, row) for row in range(file.metadata.row_group(group).num_rows)]
        order = np.argsort(np.array(indices, dtype=np.int64), kind="stable").tolist()
        self.captions = [captions[i] for i in order]
        self._places = [places[i] for i in order]

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
        files = [_open_part(path) for path in paths]
        rows = sum(file.metadata.num_rows for file in files)
        if rows != meta["clips"] or not rows:
            raise ValueError(f"{folder}: holds {rows} clips where meta.json says {meta['clips']}; encode again")
        try:
            return EncodedClips(meta, files)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged(folder, error, "encode again") from error

    def __len__(self) -> int:
        return len(self.captions)

    def fetch(self, indices: list[int]) -> tuple[list[str], Tensor, Posterior]:
        """Clips by position, in any order and any number of times.

        Returns:
            ``(captions, text_BLD, posterior)``, tensors float32 on the CPU.

        Raises:
            ValueError: no position is given, or one is outside [0, len).
        """
        wrong = [i for i in indices if not 0 <= i < len(self)]
        if wrong or not indices:
            raise ValueError(f"clips {wrong}: allowed positions are 0 to {len(self) - 1}, at least one")
        groups: dict[tuple[int, int], pa.Table] = {}
        texts, means, stds = [], [], []
        for index in indices:
            number, group, row = self._places[index]
            if (number, group) not in groups:
                groups[number, group] = self._files[number].read_row_group(group, columns=SCHEMA.names[3:])
            values = {name: groups[number, group][name][row] for name in SCHEMA.names[3:]}
            texts.append(_tensor(values["text"], values["text_shape"]))
            means.append(_tensor(values["mean"], values["latent_shape"]))
            stds.append(_tensor(values["std"], values["latent_shape"]))
        return [self.captions[i] for i in indices], torch.stack(texts), Posterior(torch.stack(means), torch.stack(stds))


def _open_part(path: Path) -> pq.ParquetFile:
    try:
        file = open_parquet(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error, "encode again") from error
    missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; columns found: {', '.join(file.schema_arrow.names)}")
    return file


def _tensor(data: pa.BinaryScalar, shape: pa.ListScalar) -> Tensor:
    values = np.frombuffer(data.as_buffer(), dtype="<f4").reshape(shape.as_py())
    return torch.from_numpy(values.astype(np.float32))  # a copy: Arrow's memory is read-only


def digest(made_with: object) -> str:
    """Returns sixteen hex digits over what clips or videos are made with, in values that JSON can hold."""
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]
