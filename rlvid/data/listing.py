"""Folders of rows that name what training begins with: prompts alone, or videos to be encoded; no Ray, no torch."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlvid.data.clips import PROMPTS, Kind
from rlvid.files import atomic_folder, write_atomic


def write_listing(
    rows: Iterable[dict[str, Any]],
    kind: Kind,
    schema: pa.Schema,
    notes: Callable[[], dict[str, Any]],
    out: Path,
    *,
    in_part: int = 65_536,
    in_group: int = 64,
) -> None:
    """Writes a folder of rows that ``EncodedClips`` opens; holds the rows of one part at a time.

    Args:
        rows: without ``index``, which counts them.
        kind: of the rows.
        schema: of the rows.
        notes: gives the fingerprints and further keys of ``meta.json``, once all rows were taken.
        out: folder to be made.
        in_part: rows of a part.
        in_group: rows that are read together.
    """
    with atomic_folder(out) as folder:
        parts, count = [], 0
        for number, part in enumerate(_batches(rows, in_part)):
            table = pa.Table.from_pylist([{"index": count + place, **row} for place, row in enumerate(part)], schema)
            path = folder / f"part-{number:05d}.parquet"
            pq.write_table(table, path, row_group_size=in_group, write_page_checksum=True)
            parts.append((path.name, table.num_rows, path.stat().st_size))
            count += table.num_rows
        meta = {"kind": kind, "clips": count, **notes(), "parts": parts}
        write_atomic(folder / "meta.json", json.dumps(meta).encode())


def _batches(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    left = iter(rows)
    while part := list(islice(left, size)):
        yield part


def write_prompts(prompts: Iterable[str], out: Path) -> None:
    """Writes a folder of prompts alone."""
    content = hashlib.sha256(b'{"prompts": [')

    def rows() -> Iterator[dict[str, Any]]:
        for number, prompt in enumerate(prompts):
            content.update((", " if number else "").encode() + json.dumps(prompt).encode())
            yield {"caption": prompt}

    def fingerprint() -> dict[str, str]:  # that of `digest({"prompts": [...]})`, without the list
        content.update(b"]}")
        return {"fingerprint": content.hexdigest()[:16]}

    write_listing(rows(), "prompts", PROMPTS, fingerprint, out)
