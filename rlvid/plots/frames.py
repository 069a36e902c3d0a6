"""Pictures of frames: models side by side, along a run, and videos beside each other. All on white, one style.

Place and labels tell things apart, so all are readable in black and white.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rlvid.escape import one_line
from rlvid.files import write_atomic
from rlvid.metric_names import metric_of
from rlvid.plots.style import INK, RULE, SOFT
from rlvid.plots.video import GIF_SIDE, gif_bytes, shrunk, to_bytes, write_mp4

MARGIN, GAP, TILE = 36, 6, 160
"""Pixels; a tile is at most TILE wide unless a frame's integer multiple says less."""
_SIDE = 192  # pixels of a frame in a moving file, at least
_COLUMNS = 8  # of `draw_steps`, at most
_SOURCE = "Source"  # a keyword of the PNG specification


def draw_models(
    path: str | Path,
    prompts: Sequence[str],
    videos: Mapping[str, Sequence[Tensor]],
    values: Mapping[str, Sequence[float]] | None = None,
    *,
    shown: int = 3,
    metric: str = "reward",
    gains: bool = False,
    source: str = "",
) -> None:
    """Writes a PNG with a row a prompt and a column a model: frames of each video, the model's value below.

    Args:
        path: of the PNG; written as a whole.
        prompts: N prompts, written above their rows.
        videos: model -> N videos (F, 3, H, W), float in [0, 1] or uint8, all of one size; a frame that is not finite
            is drawn as a crossed box.
        values: model -> N values that are written below the videos, if any.
        shown: most frames of a video; with more than three models, only the central one is shown.
        metric: of the values, which gives their name and format.
        gains: whether each model's gain over the first is written too.
        source: what the picture is of, for ``source_of``.

    Raises:
        ValueError: no prompts or models, or counts and shapes that do not fit.
    """
    _check_models(prompts, videos, values or {}, shown)
    rows = {name: [_still(video, shown if len(videos) <= 3 else 1) for video in each] for name, each in videos.items()}
    wide, high = next(iter(rows.values()))[0][0].size
    block, gutter = max(len(found) for each in rows.values() for found in each) * (wide + GAP) - GAP, 28
    lefts = {name: MARGIN + place * (block + gutter) for place, name in enumerate(rows)}
    width = MARGIN * 2 + len(rows) * (block + gutter) - gutter
    heading, text, small = fitting(videos, block, 18, 11), font(17), font(14)
    titles = [wrap(prompt, text, width - 2 * MARGIN, 2) for prompt in prompts]
    heights = [24 * len(lines) + 8 + high + (26 if values else 4) for lines in titles]
    top = MARGIN + 44
    known = metric_of(metric)
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
                value, under = float(values[name][row]), below + high + 7
                said = f"{known.spoken} {known.number(value).replace('-', '−')}"
                draw.text((left, under), shorten(said, small, block), SOFT, small)
                gain = value - float(next(iter(values.values()))[row])
                if gains and left > MARGIN and math.isfinite(gain):
                    over = f"{known.change(gain).replace('-', '−')} over {next(iter(rows))}"
                    draw.text((left + block, under), over, SOFT, small, anchor="ra")
        top += heights[row] + 22
        if row + 1 < len(prompts):
            draw.line((MARGIN, top - 12, width - MARGIN - 1, top - 12), RULE, 1)
    save(image, path, source)


def _check_models(
    prompts: Sequence[str],
    videos: Mapping[str, Sequence[Tensor]],
    values: Mapping[str, Sequence[float]],
    shown: int,
) -> None:
    """Raises ValueError where ``draw_models`` has no prompts or models, or counts or shapes that do not fit."""
    shapes = {tuple(video.shape[1:]) for each in videos.values() for video in each}
    counts = {len(each) for each in [*videos.values(), *values.values()]}
    if (
        not prompts
        or counts != {len(prompts)}
        or len(shapes) != 1
        or any(len(shape) != 3 or shape[0] != 3 for shape in shapes)
        or not all(len(video) for each in videos.values() for video in each)
        or shown < 1
    ):
        raise ValueError(
            f"draw_models: {len(prompts)} prompts, {len(videos)} models, videos or values {sorted(counts)}, frames "
            f"{sorted(shapes)}, shown = {shown}; expected a video (F, 3, H, W) a prompt of each model, and one size"
        )


def draw_steps(path: str | Path, prompts: Sequence[str], frames: Mapping[int, Tensor]) -> None:
    """Writes a PNG with a row a prompt and a column a training step: the central frame of each video.

    Args:
        path: of the PNG; written as a whole.
        prompts: N prompts, written above their rows.
        frames: training step -> (N, F, 3, H, W), float in [0, 1] or uint8; of many, the first, the last and some
            between are shown.

    Raises:
        ValueError: no prompts or steps, or shapes that do not fit.
    """
    if not frames:
        raise ValueError("draw_steps: 0 steps; expected 1 or more")
    shown = spread(sorted(frames), _COLUMNS)
    draw_models(path, prompts, {f"step {step:,}": list(frames[step]) for step in shown}, shown=1)


def spread(values: Sequence[int], most: int) -> list[int]:
    """Returns at most ``most`` of the values, evenly spaced, with the first and the last."""
    return [values[round(i)] for i in np.linspace(0, len(values) - 1, min(most, len(values)))]


def side_by_side(prompt: str, films: Mapping[str, np.ndarray]) -> np.ndarray:
    """Places videos side by side under their models' names, the prompt above: (F, H', W', 3), uint8, even H' and W'.

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


def write_moving(stem: Path, prompt: str, films: Mapping[str, np.ndarray], fps: float) -> list[Path]:
    """Writes what ``side_by_side`` makes as ``.mp4`` and as animated ``.webp`` and ``.gif``; returns the paths.

    In the GIF large videos are shrunk, each to ``GIF_SIDE`` pixels.
    """
    film = side_by_side(prompt, films)
    small = {name: to_bytes(shrunk(_frames(each)[None], GIF_SIDE)[0]) for name, each in films.items()}
    mp4, webp, gif = (stem.with_name(stem.name + suffix) for suffix in (".mp4", ".webp", ".gif"))
    write_mp4(mp4, _frames(film), fps)
    write_atomic(gif, gif_bytes(_frames(side_by_side(prompt, small)), fps))
    first, *others = map(Image.fromarray, film)
    data = io.BytesIO()
    first.save(
        data, "WEBP", save_all=True, append_images=others, loop=0, duration=round(1000 / fps), quality=85, method=3
    )
    write_atomic(webp, data.getvalue())
    return [mp4, webp, gif]


def _frames(film: np.ndarray) -> Tensor:
    """Returns frames_FCHW in [0, 1] of (F, H, W, 3), uint8."""
    return torch.from_numpy(film).permute(0, 3, 1, 2) / 255


def _still(video_FCHW: Tensor, shown: int) -> list[Image.Image]:
    """Returns at most ``shown`` frames, spread over the video, or its central one alone."""
    count = len(video_FCHW)
    places = [count // 2] if shown == 1 else spread(range(count), shown)
    return [tile(video_FCHW[place]) for place in places]


def tile(frame_CHW: Tensor) -> Image.Image:
    """Returns a frame, enlarged by an integer so that its pixels stay crisp, or reduced to ``TILE`` pixels of width."""
    height, width = frame_CHW.shape[1:]
    factor = TILE // width
    size = (width * factor, height * factor) if factor else (TILE, max(1, round(height * TILE / width)))
    if not torch.isfinite(frame_CHW.float()).all():
        return crossed(size)
    pixels = frame_CHW if frame_CHW.dtype == torch.uint8 else (frame_CHW.clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
    return image.resize(size, Image.Resampling.NEAREST if factor else Image.Resampling.LANCZOS)


def crossed(size: tuple[int, int]) -> Image.Image:
    """Returns a white frame with a cross over it, which stands for one whose pixels are no numbers."""
    image = Image.new("RGB", size, "white")
    cross, (right, low) = ImageDraw.Draw(image), (size[0] - 1, size[1] - 1)
    cross.line((0, 0, right, low), SOFT, 2)
    cross.line((0, low, right, 0), SOFT, 2)
    return image


def paste(image: Image.Image, tiles: list[Image.Image], left: int, top: int) -> None:
    """Tiles side by side, each in a hairline, for frames may be as white as the page."""
    draw = ImageDraw.Draw(image)
    for tile in tiles:
        image.paste(tile, (left, top))
        draw.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline=RULE)
        left += tile.width + GAP


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns the sans serif that matplotlib brings, so that all pictures share one face."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def fitting(texts: Iterable[str], width: int, most: int, least: int) -> ImageFont.FreeTypeFont:
    """Returns the bold font in the largest size between the two at which every text fits, else in the smallest."""
    texts = [one_line(text) for text in texts]
    sizes = range(most, least, -1)
    found = (size for size in sizes if all(font(size, True).getlength(text) <= width for text in texts))
    return font(next(found, least), True)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Returns the text in one line, or as much of it as fits with an ellipsis."""
    text = one_line(text[: 8 * width])  # a character takes a pixel or more
    if len(text) <= width and font.getlength(text) <= width:
        return text
    text = text[:width]
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    whole = text.rpartition(" ")[0] or text  # words are cut only where there is but one
    return whole.rstrip(" ,") + "…"


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Wraps text into at most ``lines`` lines of ``width`` pixels; an ellipsis marks text that does not fit."""
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


def save(image: Image.Image, path: str | Path, source: str = "") -> None:
    """Writes a PNG as a whole, with a note of its source if that is given."""
    data, notes = io.BytesIO(), PngInfo()
    if source:
        notes.add_text(_SOURCE, source)
    image.save(data, format="PNG", optimize=True, pnginfo=notes)
    write_atomic(Path(path), data.getvalue())


def source_of(path: Path) -> str:
    """Returns the source that ``save`` noted in a PNG; empty where there is none, or no whole PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return str(image.info.get(_SOURCE, ""))
    except (OSError, SyntaxError, ValueError):  # Pillow's errors at damaged files
        return ""
