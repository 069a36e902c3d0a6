"""What pictures are drawn with: tiles of frames, one face of type, lines that fit, and a file that is whole."""

import io
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rlvid.escape import one_line
from rlvid.files import write_whole
from rlvid.plots.style import INK, RULE, SOFT

MARGIN, GAP, TILE = 36, 6, 160
"""Pixels; a tile is at most TILE wide unless a frame's integer multiple says less."""


def tiles(frames_FCHW: Tensor, shown: int) -> list[Image.Image]:
    """At most ``shown`` frames, spread over the video."""
    count = len(frames_FCHW)
    return [tile(frames_FCHW[round(i)]) for i in np.linspace(0, count - 1, min(shown, count))]


def tile(frame_CHW: Tensor, side: int = TILE) -> Image.Image:
    """A frame, enlarged by an integer so that its pixels stay crisp, or reduced to ``side`` pixels of width."""
    height, width = frame_CHW.shape[1:]
    factor = side // width
    size = (width * factor, height * factor) if factor else (side, max(1, round(height * side / width)))
    if not torch.isfinite(frame_CHW.float()).all():
        image = Image.new("RGB", size, "white")
        cross = ImageDraw.Draw(image)
        cross.line((0, 0, size[0], size[1]), SOFT, 2)
        cross.line((0, size[1], size[0], 0), SOFT, 2)
        return image
    pixels = frame_CHW if frame_CHW.dtype == torch.uint8 else (frame_CHW.clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
    return image.resize(size, Image.Resampling.NEAREST if factor else Image.Resampling.LANCZOS)


def paste(image: Image.Image, tiles: list[Image.Image], left: int, top: int, gap: int = GAP) -> None:
    """Tiles side by side, each in a hairline, for frames may be as white as the page."""
    draw = ImageDraw.Draw(image)
    for tile in tiles:
        image.paste(tile, (left, top))
        draw.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline=RULE)
        left += tile.width + gap


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The sans serif that matplotlib brings, so that all pictures share one face."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def fitting(texts: Iterable[str], width: int, most: int, least: int) -> ImageFont.FreeTypeFont:
    """The bold face at the largest size, between the two, at which every text fits; at the least where none does."""
    texts = [one_line(text) for text in texts]
    sizes = range(most, least, -1)
    found = (size for size in sizes if all(font(size, True).getlength(text) <= width for text in texts))
    return font(next(found, least), True)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text in one line, or as much of it as fits with an ellipsis."""
    text = one_line(text[: 8 * width])  # a character takes a pixel or more
    if len(text) <= width and font.getlength(text) <= width:
        return text
    text = text[:width]
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    whole = text.rpartition(" ")[0] or text  # words are cut only where there is but one
    return whole.rstrip(" ,") + "…"


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """At most so many lines of at most ``width`` pixels; the last one ends in an ellipsis where text is left over."""
    words, wrapped = one_line(text[: 8 * width * lines])[: width * lines].split(), list[str]()
    while words and len(wrapped) + 1 < lines:
        fit = next((n for n in range(len(words), 0, -1) if font.getlength(" ".join(words[:n])) <= width), 1)
        wrapped.append(shorten(" ".join(words[:fit]), font, width))
        words = words[fit:]
    return [*wrapped, shorten(" ".join(words), font, width)] if words or not wrapped else wrapped


def write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: list[str], font: ImageFont.FreeTypeFont, leading: int
) -> int:
    """Writes lines below each other and returns where they end."""
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * leading), line, INK, font)
    return place[1] + leading * len(lines)


def save(image: Image.Image, path: str | Path) -> None:
    """Writes a PNG, whole or not at all."""
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    write_whole(Path(path), data.getvalue())
