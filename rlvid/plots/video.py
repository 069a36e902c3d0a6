"""Writes videos: as MP4, as GIF, and as 8-bit frames."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rlvid.files import atomic_file

GIF_SIDE = 256
"""Pixels of the longer side of a video as GIF, at most: a larger one takes half a minute and tens of megabytes."""


def write_mp4(path: str | Path, frames_FCHW: Tensor, fps: float) -> None:
    """Writes an H.264 video (yuv420p, which every player shows), atomically.

    Args:
        path: of the file; an old one is replaced.
        frames_FCHW: three channels in [0, 1], values outside are clamped; height and width must be even.
        fps: frames a second.

    Raises:
        ValueError: odd height or width, or not (F, 3, H, W).
        OSError: the file cannot be written.
    """
    path = Path(path)
    pixels_FHWC = to_bytes(frames_FCHW)
    height, width = pixels_FHWC.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"{path}: H.264 video needs an even height and width; got {height} x {width}: crop or pad first"
        )
    with atomic_file(path) as part, av.open(part, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"}
        for pixels in pixels_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def gif_bytes(frames_FCHW: Tensor, fps: float, scale: int = 1) -> bytes:
    """Makes an animated GIF that loops for ever, each pixel ``scale`` x ``scale`` large; clamps values to [0, 1].

    GIF counts time in hundredths of a second, so the rate is rounded to 100 / n.
    """
    pixels_FHWC = to_bytes(frames_FCHW)
    if scale > 1:
        pixels_FHWC = pixels_FHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    images = [Image.fromarray(pixels) for pixels in pixels_FHWC]
    duration = max(20, round(100 / fps) * 10)  # players slow down anything below 20 ms
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, disposal=1)
    return buffer.getvalue()


def shrunk(frames_BFCHW: Tensor, most: int) -> Tensor:
    """Returns videos whose longer side has at most ``most`` pixels, each a mean over an area; small ones unchanged."""
    height, width = frames_BFCHW.shape[-2:]
    longer = max(height, width)
    if longer <= most:
        return frames_BFCHW
    size = max(1, round(height * most / longer)), max(1, round(width * most / longer))
    return nn.functional.adaptive_avg_pool2d(frames_BFCHW.flatten(0, 1), size).unflatten(0, frames_BFCHW.shape[:2])


def to_bytes(frames_FCHW: Tensor) -> np.ndarray:
    """Returns frames as uint8 (F, H, W, 3): clamped to [0, 1] and rounded, NaN becomes 0.

    Raises:
        ValueError: not (F, 3, H, W) with F at least 1.
    """
    if frames_FCHW.dim() != 4 or frames_FCHW.shape[1] != 3 or not len(frames_FCHW):
        raise ValueError(f"frames must be (F, 3, H, W) with F at least 1; got {tuple(frames_FCHW.shape)}")
    pixels = frames_FCHW.detach().float().nan_to_num(0.0).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
