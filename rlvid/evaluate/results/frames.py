"""Frames of an evaluation's videos, which may come from somebody else: PNG within limits, under no other format."""

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image

MOST_PIXELS, MOST_PIXELS_OF_VIDEO = 2**24, 2**28
"""Of a frame (4096 x 4096), and of a video: more is an attack on memory."""


@contextmanager
def open_frame(data: bytes, where: str) -> Iterator[Image.Image]:
    """A frame, not yet decoded, whose size is within the limits.

    Raises:
        ValueError: it is no PNG, damaged, or too large; begins with ``where``.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            sides = (image.width, image.height)
            if image.width * image.height > MOST_PIXELS or max(sides) > 32 * min(sides):
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
        f"{where} {reason}; allowed are {MOST_PIXELS} pixels, and a side at most 32 times the other"
    ) from None


class _FrameError(Exception):
    """A frame beyond the limits."""


def decode_frames(frames: Sequence[bytes], where: str) -> np.ndarray:
    """The frames of a video as pixels (F, H, W, 3), uint8.

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
        if height * width * len(frames) > MOST_PIXELS_OF_VIDEO:
            raise ValueError(
                f"{where} has {len(frames)} frames of {width} x {height} pixels; allowed are {MOST_PIXELS_OF_VIDEO} "
                "pixels in all"
            )
    if not made:
        raise ValueError(f"{where} has no frames; delete that file and evaluate again")
    return np.stack(made)
