"""The archive of an evaluation: read video by video, and laid out as sprites that a page can play."""

import io
from collections.abc import Iterator
from math import ceil, sqrt
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from rlvid.evaluate.results.frames import decode_frames
from rlvid.evaluate.results.untrusted import KEY, open_table, rows_of, sound
from rlvid.plots.style import SOFT
from rlvid.report.evidence import Case, Evidence, Part, describe

_CRISP = 128
"""Frames up to so many pixels wide are kept pixel by pixel as PNG; larger ones are WebP, a tenth of the size."""


class Video(NamedTuple):
    """One model's video of one case: frames (F, H, W, 3), uint8; None where its pixels were no numbers."""

    model: str
    case: Case
    frames: np.ndarray | None


def check_archive(evidence: Evidence) -> None:
    """Looks whether every video is there, by its key alone.

    Raises:
        ValueError: videos are missing, or a file is damaged.
    """
    there = set()
    for part in evidence.parts:
        for row in _batches(part, KEY):
            if row["model"] in part.names:
                there.add((part.names[row["model"]], _case(row)))
    missing = [key for key in evidence.scores if key not in there]
    if missing:
        raise ValueError(
            f"{_places(evidence)}: {len(missing)} of {len(evidence.scores)} videos are missing, the first of "
            f"{describe(*missing[0])}; run `rlvid evaluate` again: it makes only what is missing"
        )


def read_videos(evidence: Evidence) -> Iterator[Video]:
    """Every video once, in the order of the archive.

    Raises:
        ValueError: a file or a frame is damaged, a prompt is not the evaluation's, or videos differ in shape.
    """
    seen: set[tuple[str, Case]] = set()
    first: tuple[str, tuple[int, ...]] | None = None
    for part in evidence.parts:
        for row in _batches(part, (*KEY, "prompt", "frames")):
            name, case = part.names.get(row["model"]), _case(row)
            if name is None or (name, case) not in evidence.scores or (name, case) in seen:
                continue
            seen.add((name, case))
            if row["prompt"] != evidence.prompt(case):
                raise ValueError(
                    f"{part.path}: {describe(name, case)} was made for {row['prompt']!r}, and evaluation.yaml has "
                    f"{evidence.prompt(case)!r} there; evaluate into a new folder"
                )
            if row["frames"] == []:  # as an evaluation keeps a video that is not finite
                yield Video(name, case, None)
                continue
            frames = decode_frames(row["frames"], f"{part.path}: {describe(name, case)}")
            first = first or (name, frames.shape)
            if frames.shape != first[1]:
                (f0, h0, w0, _), (f1, h1, w1, _) = first[1], frames.shape
                raise ValueError(
                    f"models of different shapes: {first[0]!r} makes {f0} frames of {h0} x {w0} pixels and {name!r} "
                    f"{f1} of {h1} x {w1} ({part.path}); evaluate models of one shape together"
                )
            yield Video(name, case, frames)


def sprite(frames: np.ndarray) -> tuple[bytes, str, int]:
    """Frames (F, H, W, 3) in rows of one image: its bytes, its suffix, and how many frames a row has."""
    count, height, width, _ = frames.shape
    columns = ceil(sqrt(count))
    rows = ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:count] = frames
    sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    image = Image.fromarray(sheet.reshape(rows * height, columns * width, 3))
    out = io.BytesIO()
    if width <= _CRISP:
        image.save(out, "PNG", optimize=True)
        return out.getvalue(), ".png", columns
    image.save(out, "WEBP", quality=88, method=4)
    return out.getvalue(), ".webp", columns


def crossed_out(shape: tuple[int, ...]) -> np.ndarray:
    """A white video of ``shape`` (F, H, W, 3) with a cross over it."""
    count, height, width, _ = shape
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.line((0, 0, width - 1, height - 1), SOFT, 2)
    draw.line((0, height - 1, width - 1, 0), SOFT, 2)
    return np.repeat(np.asarray(image)[None], count, 0)


def _batches(part: Part, columns: tuple[str, ...]) -> Iterator[dict]:
    with open_table(part.folder, part.path, columns) as file, sound(part.path):
        for batch in file.iter_batches(batch_size=8 if "frames" in columns else 4096, columns=list(columns)):
            yield from rows_of(part.path, batch)


def _case(row: dict) -> Case:
    return Case(row["set"], row["steps"], row["index"], row["copy"])


def _places(evidence: Evidence) -> str:
    return ", ".join(str(folder / "videos") for folder in evidence.folders)
