"""Reads the videos and images of preference pairs side by side, and keeps them at the size of a reward's input.

    pairs --Ray Data: read, resize--> rows in their order --> a folder that the feed of a fit reads

Every pair is read by itself, so that the rows depend neither on the number of readers nor on the machine. A pair that
cannot be read is left out and named.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rlvid.data.find import Skipped
from rlvid.data.images import ImageError, decode_image, read_image
from rlvid.data.listing import write_listing
from rlvid.data.parquet import open_parquet
from rlvid.data.videos import read_video
from rlvid.fitting.pairs import Media, Pair
from rlvid.reward.preprocess import Preprocess
from rlvid.reward.segments import middle_frames

ROWS = pa.schema(
    [
        ("index", pa.int64()), ("caption", pa.string()), ("a", pa.binary()), ("b", pa.binary()),
        ("shape", pa.list_(pa.int32())), ("preference", pa.list_(pa.float32())), ("votes", pa.list_(pa.int32())),
        ("kind", pa.string()), ("held_out", pa.bool_()), ("source", pa.string()), ("a_base", pa.bool_()),
        ("b_base", pa.bool_()),
    ]
)  # fmt: skip
"""A pair: ``a`` and ``b`` are uint8 of ``shape`` (F, 3, size, size); a preference and a number of votes for each axis,
NaN and 0 where nobody was asked; the place of its first vote; and whether each side sets the unit of scores."""
_TOLD = ("caption", "shape", "preference", "votes", "kind", "held_out", "a_base", "b_base")
_READ = ROWS.append(pa.field("error", pa.string()))
_CPUS = 0.5
_BATCH_BYTES, _PART_BYTES, _GROUP_BYTES = 2**24, 2**28, 2**18
"""Pixels that a task of Ray reads, of a file and of a row group in it."""


def read_media(media: Media, frames: int, preprocess: Preprocess) -> Tensor:
    """Returns the frames of a video, evenly from end to end, or the one of an image, as a reward's input.

    Args:
        media: a file, or a place in a study's export.
        frames: F of a video.
        preprocess: the policy of the reward.

    Returns:
        (F or 1, 3, size, size), uint8.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    if media.row is not None:
        files = _exported(media)
        chosen = middle_frames(len(files), frames)
        seen = {place: decode_image(files[place], f"{media}: frame {place}") for place in set(chosen)}
        if len({each.shape for each in seen.values()}) > 1:
            raise ImageError(f"{media}: has frames of several sizes; export the study again")
        pixels_FCHW = preprocess(_as_floats(np.stack([seen[place] for place in chosen])))
    elif media.is_image:
        pixels_FCHW = preprocess(_as_floats(read_image(media.path)[None]))
    else:
        pixels_FCHW = read_video(media.path, frames=frames, size=preprocess, fps=None)
    return (pixels_FCHW.clamp(0, 1) * 255).round().to(torch.uint8)


def _as_floats(pixels_FHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_FHWC.astype(np.float32) / 255).permute(0, 3, 1, 2)


def _exported(media: Media) -> list[bytes]:
    """Returns the PNG frames of one side of a row of an export."""
    assert media.row is not None
    try:
        changed = media.path.stat().st_mtime_ns
        _, ends = _footer(media.path, changed)
        if (group := bisect_right(ends, media.row)) < len(ends):
            first = ends[group - 1] if group else 0
            found = _group(media.path, changed, group)[media.side][media.row - first].as_py()
            if not found:
                raise ImageError(f"{media}: has no frames; export the study again")
            return [bytes(frame) for frame in found]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise ValueError(f"{media}: cannot be read: {' '.join(str(error).split())[:120]}") from error
    raise ValueError(f"{media}: the file has {ends[-1] if ends else 0} rows; export the study again")


@lru_cache(maxsize=1)
def _footer(path: Path, changed: int) -> tuple[pq.FileMetaData, list[int]]:
    """Returns the footer, and the number of rows up to the end of each row group."""
    with open_parquet(path) as file:
        footer = file.metadata
        return footer, [*accumulate(footer.row_group(group).num_rows for group in range(footer.num_row_groups))]


@lru_cache(maxsize=1)
def _group(path: Path, changed: int, group: int) -> pa.Table:
    """Returns both sides of a row group: neighbouring pairs lie in one."""
    with open_parquet(path, metadata=_footer(path, changed)[0]) as file:
        return file.read_row_group(group, columns=["a", "b"])


def read_batch(batch: pa.Table, frames: int, preprocess: Preprocess) -> pa.Table:
    """Reads a batch of ``items``; returns rows of the schema ``ROWS``, or with an ``error`` and without pixels."""
    rows = []
    for item in batch.to_pylist():
        row = {name: item[name] for name in ROWS.names if name not in ("a", "b", "shape")}
        try:
            media = [_media_of(item, side) for side in "ab"]
            a, b = (read_media(each, frames, preprocess) for each in media)
            if a.shape == b.shape and torch.equal(a, b):
                raise ValueError(f"{media[0]} and {media[1]}: both sides have the same pixels")
            pixels = {"a": a.numpy().tobytes(), "b": b.numpy().tobytes(), "shape": list(a.shape)}
            rows.append(row | pixels | {"error": None})
        except ValueError as error:
            rows.append(row | {"a": None, "b": None, "shape": None, "error": str(error)})
    return pa.Table.from_pylist(rows, _READ)


def _media_of(item: dict[str, Any], side: str) -> Media:
    return Media(Path(item[f"{side}_path"]), item[f"{side}_row"], item[f"{side}_side"])


def held_out_prompts(prompts: Iterable[str], share: float, seed: int) -> set[str]:
    """Returns the prompts whose pairs are not fitted on: a share, drawn by a hash, at least one.

    A video stands in several pairs of a prompt, so prompts are divided and not pairs.

    Raises:
        ValueError: there are fewer than two prompts.
    """
    each = sorted(set(prompts), key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())
    if len(each) < 2:
        raise ValueError("all pairs have one prompt, and some are held out by prompt; ask about 2 or more")
    return set(each[: min(len(each) - 1, max(1, round(share * len(each))))])


def items(pairs: Sequence[Pair], axes: Sequence[str], held_out: set[str], base: str = "") -> list[dict[str, Any]]:
    """Returns what the readers need of each pair with a vote on the axes, in their order.

    The samples of the model ``base`` set the unit of scores; those of all models, where none is of that one.
    """
    named = any(base in pair.models for pair in pairs)
    made: list[dict[str, Any]] = []
    for index, pair in enumerate(pair for pair in pairs if pair.axes & {*axes}):
        votes = [sum(vote.axis == axis for vote in pair.votes) for axis in axes]
        item = {"index": index, "caption": pair.prompt, "kind": pair.kind, "held_out": pair.prompt in held_out}
        item |= {"preference": [pair.preference(axis) for axis in axes], "votes": votes, "source": pair.votes[0].where}
        item |= {f"{side}_base": not named or model == base for side, model in zip("ab", pair.models, strict=True)}
        for side, media in (("a", pair.a), ("b", pair.b)):
            item |= {f"{side}_path": str(media.path), f"{side}_row": media.row, f"{side}_side": media.side}
        made.append(item)
    return made


def write_pairs(
    read: Iterable[pa.Table],
    out: Path,
    axes: Sequence[str],
    frames: int,
    size: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Skipped]:
    """Writes the rows that were read as a folder of the kind ``pairs``; returns the pairs that are left out.

    Raises:
        ValueError: none is left.
    """
    content, skipped, done = hashlib.sha256(json.dumps(list(axes)).encode()), list[Skipped](), 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal done
        for table in read:
            for row in table.to_pylist():
                assert row.pop("index") == done, "the pairs are not in their order"
                done += 1
                if error := row.pop("error"):
                    skipped.append(Skipped(Path(error.partition(":")[0]), error))
                    continue
                told = [row[name] for name in _TOLD]
                content.update(json.dumps(told).encode() + row["a"] + row["b"])
                yield row
            if on_progress is not None:
                on_progress(done)
        if done == len(skipped) > 0:
            raise ValueError(f"no pair can be read; the first reason: {skipped[0].reason}")

    bytes_of_pair = _bytes_of_pair(frames, size)
    write_listing(
        rows(), "pairs", ROWS, lambda: {"fingerprint": content.hexdigest()[:16], "axes": list(axes)}, out,
        in_part=max(1, _PART_BYTES // bytes_of_pair), in_group=max(1, _GROUP_BYTES // bytes_of_pair),
    )  # fmt: skip
    return skipped


def _bytes_of_pair(frames: int, size: int) -> int:
    return 6 * frames * size * size


def read_on_ray(made: list[dict[str, Any]], frames: int, preprocess: Preprocess, readers: int) -> Iterator[pa.Table]:
    """Yields the rows of ``items``, in their order, read by Ray Data."""
    import ray

    from rlvid.cluster.connect import start_ray

    start_ray()
    batch = min(64, max(4, _BATCH_BYTES // _bytes_of_pair(frames, preprocess.size)))
    blocks = min(10_000, math.ceil(len(made) / batch))
    table = pa.Table.from_pylist(made)  # keeps NaN and None apart
    dataset = ray.data.from_arrow(table).repartition(blocks)
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    rows = dataset.map_batches(
        read_batch, fn_kwargs={"frames": frames, "preprocess": preprocess}, batch_size=batch, batch_format="pyarrow",
        num_cpus=_CPUS, compute=ray.data.TaskPoolStrategy(size=readers),
    )  # fmt: skip
    yield from rows.iter_batches(batch_size=None, batch_format="pyarrow")
