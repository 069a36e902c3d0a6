"""Folders of encoded clips, for tests of what writes and of what reads them."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import torch

from rlvid.data.clips import digest
from rlvid.data.encoders import encode_items
from rlvid.data.find import Skipped
from rlvid.data.sources import read_rendered
from rlvid.data.videos import VideoError
from rlvid.data.writing import ClipWriter
from rlvid.models.base import VideoModel
from rlvid.toy.tiny import tiny_model

Encoded = tuple[Path, dict, pa.Table]
"""A folder, what it says that it was made with, and the table of its clips, those that could not be read too."""


def write_folder(
    out: Path, tables: Iterable[pa.Table], made_with: dict, skipped: Iterable[Skipped] = (), **meta: str
) -> int:
    with ClipWriter(out, made_with) as writer:
        for table in tables:
            writer.add(table)
        return writer.finish({"fingerprint": digest(made_with), **meta}, list(skipped))


def encoded_folder(out: Path) -> Encoded:
    """Writes a folder in two parts: eight clips of a tiny model, over and over; every sixth of eight cannot be read."""
    model = tiny_model(frames=2, size=8)

    def read(item: dict, model: VideoModel) -> tuple[str, torch.Tensor]:
        if item["index"] == 5:
            raise VideoError("clip 5: is cut off")
        return read_rendered(0, item, model)

    eight = encode_items(model, [{"index": i, "source": f"clip {i}", "caption": ""} for i in range(8)], read)
    table = pa.concat_tables([eight] * 40).set_column(0, "index", pa.array(range(320)))
    made_with = {"size": 8, "weights": "abc"}
    assert write_folder(out, [table.slice(0, 150), table.slice(150)], made_with, model_fingerprint="m") == 280
    return out, made_with, table
