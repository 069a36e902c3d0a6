"""Two videos as one moving picture, so that they cannot drift apart."""

import io
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

import numpy as np
from PIL import Image

LOSSLESS = 2**23
"""Most pixels of a lossless film, over all frames of both videos; it has about 16 MiB."""
QUALITY = 95
"""WebP quality of larger films, which have about a seventh of a lossless film's bytes."""


def under_noise(pixels_FHWC: np.ndarray, seed: int) -> np.ndarray:
    """Returns the video under clearly visible noise: half of it Gaussian, with a deviation of 80 of 255."""
    drawn, noisy_FHWC = np.random.default_rng(seed), np.empty_like(pixels_FHWC)
    for pixels_HWC, noisy_HWC in zip(pixels_FHWC, noisy_FHWC, strict=True):  # the noise has 8 bytes where a pixel has 1
        noisy_HWC[:] = (0.5 * pixels_HWC + 64 + drawn.normal(0, 80, pixels_HWC.shape)).clip(0, 255)
    return noisy_FHWC


def side_by_side(left_FHWC: np.ndarray, right_FHWC: np.ndarray, fps: float, still: bool = False) -> bytes:
    """Returns a WebP of twice the width that repeats for ever; ``still`` is its first frame alone.

    It is lossless up to ``LOSSLESS`` pixels.
    """
    pixels = np.concatenate([left_FHWC, right_FHWC], axis=2)[: 1 if still else None]
    milliseconds = round(1000 / fps)
    if pixels[..., 0].size > LOSSLESS:
        return _lossy(pixels, milliseconds)
    first, *others = [Image.fromarray(frame) for frame in pixels]
    buffer = io.BytesIO()
    first.save(
        buffer, "WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, lossless=True, method=0
    )
    return buffer.getvalue()


def _lossy(pixels_FHWC: np.ndarray, milliseconds: int) -> bytes:
    """Returns an animation of which every frame is compressed alone.

    libwebp's own encoder of animations keeps pixels that differ little from the frame before: slow motion would stop.
    """
    height, width = pixels_FHWC.shape[1:3]
    size = _number(width - 1, 3) + _number(height - 1, 3)
    # https://developers.google.com/speed/webp/docs/riff_container: flags, place, size, duration, no blending
    parts = [_chunk(b"VP8X", _number(2, 4) + size), _chunk(b"ANIM", bytes(6))]
    about = bytes(6) + size + _number(milliseconds, 3) + _number(2, 1)
    for pixels_HWC in pixels_FHWC:
        buffer = io.BytesIO()
        Image.fromarray(pixels_HWC).save(buffer, "WEBP", quality=QUALITY, method=0)
        parts.append(_chunk(b"ANMF", about + buffer.getvalue()[12:]))  # without the head of a file
    return _chunk(b"RIFF", b"WEBP" + b"".join(parts))


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + _number(len(content), 4) + content + bytes(len(content) % 2)


def _number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


class RecentFilms:
    """Keeps the films that were asked for last.

    Args:
        most: bytes that are kept at most; the newest film always is.
    """

    def __init__(self, most: int) -> None:
        self._most, self._kept, self._lock = most, OrderedDict[Hashable, bytes](), Lock()

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """Returns the film of a key, made unless it is kept; what ``make`` raises is passed on."""
        with self._lock:
            film = self._kept.get(key)
        film = make() if film is None else film  # others need not wait
        with self._lock:
            self._kept[key] = film
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > self._most:
                self._kept.popitem(last=False)
        return film
