"""The archive of an evaluation: read video by video, and laid out as sprites that a page can play."""

import io
from collections.abc import Iterator
from math import ceil, sqrt
from typing import NamedTuple

import numpy as np
from PIL import Image

from rlvid.evaluate.results.about import Case, describe
from rlvid.evaluate.results.read import EvaluationData
from rlvid.evaluate.results.videos import decode_frames, read_frames
from rlvid.plots.frames import crossed

_CRISP = 128
"""Frames up to so many pixels wide are kept pixel by pixel as PNG; larger ones are WebP, a tenth of the size."""


class Video(NamedTuple):
    """One model's video of one case: frames (F, H, W, 3), uint8; None where its pixels were no numbers."""

    model: str
    case: Case
    frames: np.ndarray | None


def read_videos(evaluation: EvaluationData) -> Iterator[Video]:
    """Yields every video once, in the order on disk.

    Raises:
        ValueError: a file or a frame is damaged, or videos differ in shape.
    """
    first: tuple[str, tuple[int, ...]] | None = None
    stored = evaluation.videos
    for (name, case), frames in zip(stored, read_frames(stored.values()), strict=True):
        path = stored[name, case].path
        if not frames:  # as an evaluation keeps a video that is not finite
            yield Video(name, case, None)
            continue
        pixels = decode_frames(frames, f"{path}: {describe((name, case))}")
        first = first or (name, pixels.shape)
        if pixels.shape != first[1]:
            (f0, h0, w0, _), (f1, h1, w1, _) = first[1], pixels.shape
            raise ValueError(
                f"models of different shapes: {first[0]!r} makes {f0} frames of {h0} x {w0} pixels and {name!r} "
                f"{f1} of {h1} x {w1} ({path}); evaluate models of one shape together"
            )
        yield Video(name, case, pixels)


def sprite(frames: np.ndarray) -> tuple[bytes, str, int]:
    """Returns frames (F, H, W, 3) in rows of one image: its bytes, its suffix, and how many frames a row has."""
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
    """Returns a white video of ``shape`` (F, H, W, 3) with a cross over it."""
    count, height, width, _ = shape
    return np.repeat(np.asarray(crossed((width, height)))[None], count, 0)
