"""Pixels of a decoded video frame as a player shows them: turned, mirrored, and in the colours of BT.709."""

from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from torch import Tensor
from torch.nn import functional as F

from rlvid.data.images import MAX_RATIO

_MAX_PIXELS = 2**26
"""Largest number of pixels of a frame, 8192 x 8192. A small file may announce any number."""
_OTHER_CURVES: dict[int, str] = {
    ColorTrc.LINEAR: "linear light",
    ColorTrc.LOG: "a logarithmic curve",
    ColorTrc.LOG_SQRT: "a logarithmic curve",
    ColorTrc.SMPTE2084: "HDR (PQ)",
    ColorTrc.SMPTE428: "digital cinema (SMPTE ST 428)",
    ColorTrc.ARIB_STD_B67: "HDR (HLG)",
}
_UNSPECIFIED = (0, 2)
_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
"""Codes in ITU-T H.273 of the ways to store RGB as YUV that swscale reads: not YCgCo, constant luminance or ICtCp."""
_WIDE_GAMUTS: dict[int, tuple[tuple[float, float], ...]] = {
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
"""Primaries (x, y) of red, green and blue that players convert, with the white of BT.709 (D65)."""
_BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))


def problem(frame: av.VideoFrame, codec_tag: str) -> str | None:
    """Returns why a decoded frame cannot be shown as a player shows it; None if it can.

    ``codec_tag``: of the stream in its container, such as ``hvc1``.
    """
    if frame.is_corrupt:
        return "is damaged"
    if frame.width * frame.height > _MAX_PIXELS:
        return f"has {frame.width} x {frame.height} pixels; allowed: up to {_MAX_PIXELS:,}"
    curve = _OTHER_CURVES.get(frame.color_trc)
    if frame.color_trc in _UNSPECIFIED and codec_tag.lower()[:2] in ("dv", "da"):
        curve = "HDR (Dolby Vision)"  # dvh1, dvhe, dva1, dvav, dav1: without a base that other players know
    if curve:
        return f"is stored as {curve}, and not with the curve of BT.709 or sRGB; convert it first"
    if not frame.format.is_rgb and frame.colorspace not in _MATRICES:
        return f"has colour matrix {frame.colorspace} of H.273, which cannot be read; convert it to BT.709 first"
    if _orientation(frame) is None:
        return "is turned by other than quarter turns; turn it first"
    return None


def shown(frame: av.VideoFrame, size: tuple[int, int] | None, aspect: float) -> Tensor:
    """Returns one frame: (C, H, W), float32 in [0, 1].

    Args:
        frame: as decoded.
        size: H and W that the frame covers, and is cut to; None for the whole frame, with as many pixels as are stored.
        aspect: width / height of a stored pixel.
    """
    transposed, upside_down, mirrored = _orientation(frame) or (False, False, False)
    pixels_HWC = _rgb(frame)
    if transposed:
        pixels_HWC, aspect = pixels_HWC.swapaxes(0, 1), 1 / aspect
    pixels_HWC = pixels_HWC[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    pixels_CHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)
    most = int(MAX_RATIO * max(1, min(pixels_CHW.shape[1], pixels_CHW.shape[2] * aspect)))
    pixels_CHW = _middle(pixels_CHW, most, max(1, int(most / aspect)))
    return (_whole(pixels_CHW, aspect) if size is None else _fit(pixels_CHW, size, aspect)).clamp(0, 1)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool] | None:
    """Returns whether a player transposes, then mirrors rows, then columns; None for other matrices than these eight.

    The display matrix maps a pixel (x, y) to (a x + c y, b x + d y), stored in rows (a, b, u), (c, d, v), (x, y, w).
    """
    side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    (a, b), (c, d) = np.frombuffer(side_data, np.int32).reshape(3, 3)[:2, :2].astype(float)
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(a), abs(b), abs(c), abs(d)) == 0:
        return False, False, False  # players take it for none
    if straight > 100 * max(abs(b), abs(c)):
        return False, d < 0, a < 0
    if crossed > 100 * max(abs(a), abs(d)):
        return True, b < 0, c < 0
    return None


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1] of one frame as stored, in the primaries of BT.709."""
    matrix = None
    if frame.colorspace in _UNSPECIFIED and min(frame.width, frame.height) >= 720:
        matrix = Colorspace.ITU709  # as players take it; swscale would take BT.601 for all sizes
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", src_colorspace=matrix).astype(np.float32) / 255
        pixels = rgba[..., :3] * rgba[..., 3:]
    else:
        pixels = frame.to_ndarray(format="rgb24", src_colorspace=matrix).astype(np.float32) / 255
    gamut = _WIDE_GAMUTS.get(frame.color_primaries)
    if gamut is None:
        return pixels
    change = np.linalg.solve(_to_xyz(_BT709), _to_xyz(gamut)).astype(np.float32)
    light = (pixels**2.4) @ change.T  # the curve of displays, ITU-R BT.1886
    return light.clip(0, 1) ** np.float32(1 / 2.4)


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """(3, 3) matrix from linear RGB to CIE XYZ with white at D65."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    return columns * np.linalg.solve(columns, white)


def _fit(pixels_CHW: Tensor, size: tuple[int, int], aspect: float) -> Tensor:
    """Scales a frame to cover ``size`` and cuts out the middle; ``aspect`` is a pixel's width over its height."""
    height, width = pixels_CHW.shape[1], pixels_CHW.shape[2] * aspect
    scale = max(size[0] / height, size[1] / width)
    shape = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    return _middle(_resized(pixels_CHW, shape), *size)


def _whole(pixels_CHW: Tensor, aspect: float) -> Tensor:
    """Makes the pixels of a frame square, as many as they are; ``aspect`` is a pixel's width over its height."""
    height, width = pixels_CHW.shape[1:]
    root = aspect**0.5
    return _resized(pixels_CHW, (max(1, round(height / root)), max(1, round(width * root))))


def _resized(pixels_CHW: Tensor, shape: tuple[int, int]) -> Tensor:
    if shape == tuple(pixels_CHW.shape[1:]):
        return pixels_CHW
    return F.interpolate(pixels_CHW[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]


def _middle(pixels_CHW: Tensor, height: int, width: int) -> Tensor:
    """Returns the middle of at most that height and width."""
    top, left = (
        (have - most) // 2 if have > most else 0
        for have, most in zip(pixels_CHW.shape[1:], (height, width), strict=True)
    )
    return pixels_CHW[:, top : top + height, left : left + width]
