"""Two videos as one moving picture, so that they cannot drift apart."""

import io

import numpy as np
from PIL import Image


def under_noise(pixels_FHWC: np.ndarray, seed: int) -> np.ndarray:
    """Returns the video under clearly visible noise: half of it Gaussian, with a deviation of 80 of 255."""
    noise = np.random.default_rng(seed).normal(0, 80, pixels_FHWC.shape)
    return (0.5 * pixels_FHWC + 64 + noise).clip(0, 255).astype(np.uint8)


def side_by_side(left_FHWC: np.ndarray, right_FHWC: np.ndarray, fps: float, still: bool = False) -> bytes:
    """Returns a lossless WebP of twice the width that repeats for ever; ``still`` is its first frame alone."""
    pixels = np.concatenate([left_FHWC, right_FHWC], axis=2)
    first, *others = [Image.fromarray(frame) for frame in pixels[: 1 if still else None]]
    buffer = io.BytesIO()
    first.save(
        buffer, "WEBP", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, lossless=True, method=0
    )
    return buffer.getvalue()
