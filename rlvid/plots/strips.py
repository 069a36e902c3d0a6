"""Models side by side on the same prompts and noise: a still strip, and moving files to pass on."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rlvid.files import write_whole
from rlvid.plots.drawing import GAP, MARGIN, fitting, font, paste, save, shorten, tile, tiles, wrap, write
from rlvid.plots.style import INK, RULE, SOFT
from rlvid.plots.video import write_mp4

_SIDE = 192  # pixels of a frame in a moving file, at least


def comparison(
    path: str | Path,
    prompts: Sequence[str],
    frames: Mapping[str, Sequence[Tensor]],
    values: Mapping[str, Sequence[float]] | None = None,
    *,
    shown: int = 3,
    value_name: str = "reward",
) -> None:
    """Writes a PNG with a row a prompt and a column a model: frames of each video, the model's value below.

    Args:
        path: of the PNG; written whole or not at all.
        prompts: N prompts, written above their rows.
        frames: model -> N videos (F, 3, H, W), float in [0, 1] or uint8, all of one size.
        values: model -> N values that are written below the videos, if any.
        shown: most frames of a video; with more than three models, only one is shown.
        value_name: how the value is called.

    Raises:
        ValueError: no prompts or models, or counts and shapes that do not fit.
    """
    shapes = {tuple(video.shape[2:]) for videos in frames.values() for video in videos}
    counts = {len(videos) for videos in [*frames.values(), *(values or {}).values()]}
    if not prompts or not frames or counts != {len(prompts)} or len(shapes) != 1 or shown < 1:
        raise ValueError(
            f"comparison: {len(prompts)} prompts, {len(frames)} models, videos or values {sorted(counts)}, frame sizes "
            f"{sorted(shapes)}, shown = {shown}; expected a video a prompt of each model, and one size"
        )
    shown = shown if len(frames) <= 3 else 1
    rows = {name: [_still(video, shown) for video in videos] for name, videos in frames.items()}
    wide, high = next(iter(rows.values()))[0][0].size
    most = max(len(found) for videos in rows.values() for found in videos)
    block, gutter = most * (wide + GAP) - GAP, 28
    lefts = {name: MARGIN + place * (block + gutter) for place, name in enumerate(rows)}
    width = MARGIN * 2 + len(rows) * (block + gutter) - gutter
    heading, text, small = fitting(frames, block, 18, 11), font(17), font(14)
    titles = [wrap(prompt, text, width - 2 * MARGIN, 2) for prompt in prompts]
    heights = [24 * len(lines) + 8 + high + (26 if values else 4) for lines in titles]
    top = MARGIN + 44
    image = Image.new("RGB", (width, top + sum(heights) + 22 * (len(prompts) - 1) + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    for name, left in lefts.items():
        draw.text((left, MARGIN + 24), shorten(name, heading, block), INK, heading, anchor="ld")
        draw.line((left, MARGIN + 28, left + block - 1, MARGIN + 28), INK, 2)
    for row, lines in enumerate(titles):
        below = write(draw, (MARGIN, top), lines, text, 24) + 8
        for name, left in lefts.items():
            paste(image, rows[name][row], left, below)
            if values:
                told = shorten(f"{value_name} {_number(values[name][row])}", small, block)
                draw.text((left, below + high + 7), told, SOFT, small)
        top += heights[row] + 22
        if row + 1 < len(prompts):
            draw.line((MARGIN, top - 12, width - MARGIN - 1, top - 12), RULE, 1)
    save(image, path)


def side_by_side(prompt: str, films: Mapping[str, np.ndarray]) -> np.ndarray:
    """Videos beside each other under their models' names, the prompt above: (F, H', W', 3), uint8, even H' and W'.

    Args:
        prompt: of all of them.
        films: model -> (F, H, W, 3), uint8, all of one shape.

    Raises:
        ValueError: no videos, or of several shapes.
    """
    shapes = {film.shape for film in films.values()}
    if len(shapes) != 1:
        raise ValueError(f"side_by_side: videos of shapes {sorted(shapes)}; expected one shape, and a video or more")
    count, height, width, _ = shapes.pop()
    factor = max(1, math.ceil(_SIDE / width))
    wide, high, margin = width * factor, height * factor, 16
    label, text = fitting(films, wide, 15, 11), font(15)
    whole = margin + len(films) * (wide + margin)
    lines = wrap(prompt, text, whole - 2 * margin, 2)
    above = margin + 22 * len(lines) + 32
    page = Image.new("RGB", (whole + whole % 2, above + high + margin + (above + high + margin) % 2), "white")
    draw = ImageDraw.Draw(page)
    write(draw, (margin, margin - 4), lines, text, 22)
    made = []
    lefts = [margin + place * (wide + margin) for place in range(len(films))]
    for left, name in zip(lefts, films, strict=True):
        draw.text((left, above - 24), shorten(name, label, wide), INK, label)
    for place in range(count):
        frame = np.array(page)
        for left, film in zip(lefts, films.values(), strict=True):
            frame[above : above + high, left : left + wide] = film[place].repeat(factor, 0).repeat(factor, 1)
        made.append(frame)
    return np.stack(made)


def write_moving(stem: Path, film: np.ndarray, fps: float) -> list[Path]:
    """Writes a video (F, H, W, 3), uint8, as ``.mp4`` and as animated ``.webp`` and ``.gif``; returns the paths."""
    paths = [stem.with_name(stem.name + suffix) for suffix in (".mp4", ".webp", ".gif")]
    write_mp4(paths[0], torch.from_numpy(film).permute(0, 3, 1, 2) / 255, fps)
    images = [Image.fromarray(frame) for frame in film]
    animated: dict[str, Any] = {"save_all": True, "append_images": images[1:], "loop": 0}
    webp = animated | {"format": "WEBP", "duration": round(1000 / fps), "quality": 85, "method": 3}
    gif = animated | {"format": "GIF", "duration": max(20, round(100 / fps) * 10), "disposal": 1}
    for path, options in ((paths[1], webp), (paths[2], gif)):
        data = io.BytesIO()
        images[0].save(data, **options)
        write_whole(path, data.getvalue())
    return paths


def _still(video_FCHW: Tensor, shown: int) -> list[Image.Image]:
    """Frames spread over the video, or its central one alone."""
    return tiles(video_FCHW, shown) if shown > 1 else [tile(video_FCHW[len(video_FCHW) // 2])]


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else "–"
