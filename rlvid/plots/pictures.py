"""Pictures of an evaluation: before and after, along the run, and the reward's curve. All on white, all one style.

What tells things apart is place, label and line style, and colour only on top, so all are readable in black and white.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from torch import Tensor

from rlvid.files import write_whole
from rlvid.plots.drawing import GAP, MARGIN, TILE, font, paste, save, shorten, tile, tiles, wrap, write
from rlvid.plots.style import INK, RULE, SOFT, STYLES, Dash, drawing, legend_label

_LINES = tuple((style.colour, style.dash) for style in STYLES[:4])


def before_after(
    path: str | Path,
    prompts: Sequence[str],
    base_frames: Tensor,
    tuned_frames: Tensor,
    base_reward: Sequence[float] | Tensor,
    tuned_reward: Sequence[float] | Tensor,
    *,
    labels: tuple[str, str] = ("Base model", "Fine-tuned"),
    shown: int = 4,
    reward_name: str = "reward",
) -> None:
    """Writes a PNG with a row a prompt: frames of the base on the left, of the tuned model on the right, rewards below.

    Args:
        path: of the PNG; written whole or not at all.
        prompts: N prompts, written above their rows.
        base_frames: (N, F, 3, H, W), float in [0, 1] or uint8; a frame that is not finite is drawn as a crossed box.
        tuned_frames: the same for the tuned model.
        base_reward: N rewards.
        tuned_reward: the same for the tuned model.
        labels: headings of the two blocks.
        shown: most frames a block, spread over the video.
        reward_name: how the reward is called.

    Raises:
        ValueError: no prompts, or counts and shapes that do not fit.
    """
    count = len(prompts)
    _check(prompts, base_frames, "base_frames")
    _check(prompts, tuned_frames, "tuned_frames")
    sizes = {tuple(frames.shape[3:]) for frames in (base_frames, tuned_frames)}
    if len(base_reward) != count or len(tuned_reward) != count or len(sizes) > 1 or shown < 1:
        raise ValueError(
            f"before_after: {count} prompts, {len(base_reward)} and {len(tuned_reward)} rewards, frame sizes "
            f"{sorted(sizes)}, shown = {shown}; expected a reward a prompt, one size, and shown of 1 or more"
        )
    blocks = [[tiles(clip, shown) for clip in frames] for frames in (base_frames, tuned_frames)]
    tile_width, tile_height = blocks[0][0][0].size
    block = max(len(clips[0]) for clips in blocks) * (tile_width + GAP) - GAP
    lefts = (MARGIN, MARGIN + block + 44)
    width = lefts[1] + block + MARGIN
    heading, text = font(22, bold=True), font(18)
    titles = [wrap(prompt, text, width - 2 * MARGIN, 2) for prompt in prompts]
    heights = [26 * len(title) + 8 + tile_height + 36 for title in titles]
    top = MARGIN + 54
    image = Image.new("RGB", (width, top + sum(heights) + 26 * (count - 1) + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    for left, label in zip(lefts, labels, strict=True):
        draw.text((left, MARGIN), shorten(label, heading, block), INK, heading)
        draw.line((left, MARGIN + 34, left + block - 1, MARGIN + 34), INK, 2)
    for row, title in enumerate(titles):
        below = write(draw, (MARGIN, top), title, text, 26) + 8
        for left, clips in zip(lefts, blocks, strict=True):
            paste(image, clips[row], left, below)
        under = below + tile_height + 8
        _rewards(draw, lefts, under, block, reward_name, float(base_reward[row]), float(tuned_reward[row]))
        top += heights[row] + 26
        if row + 1 < count:
            draw.line((MARGIN, top - 14, width - MARGIN - 1, top - 14), RULE, 1)
    save(image, path)


def _rewards(
    draw: ImageDraw.ImageDraw, lefts: tuple[int, int], top: int, block: int, name: str, before: float, after: float
) -> None:
    """The line under a row: both rewards, and the gain where both are finite."""
    draw.text((lefts[0], top), f"{name} {_number(before)}", SOFT, font(16))
    draw.text((lefts[1], top), f"{name} {_number(after)}", INK, font(16, bold=True))
    if math.isfinite(before) and math.isfinite(after):
        gain = f"{after - before:+.3f}".replace("-", "−")
        draw.text((lefts[1] + block, top), f"{gain} over base", SOFT, font(16), anchor="ra")


def evolution(
    path: str | Path, prompts: Sequence[str], frames: Mapping[int, Tensor], *, columns: int = 8, unit: str = "step"
) -> None:
    """Writes a PNG with a row a prompt and a column a training step: the central frame of each video.

    Args:
        path: of the PNG; written whole or not at all.
        prompts: N prompts, written left of their rows.
        frames: training step -> (N, F, 3, H, W), float in [0, 1] or uint8.
        columns: most steps that are shown; with more, the first, the last and some between.
        unit: what the columns count.

    Raises:
        ValueError: no prompts or steps, or shapes that do not fit.
    """
    if not frames or columns < 2:
        raise ValueError(
            f"evolution: {len(frames)} steps in {columns} columns; needs a step or more and two columns or more"
        )
    for step in frames:
        _check(prompts, frames[step], f"frames of step {step}")
    steps = sorted(frames)
    steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(columns, len(steps)))]
    side = 128 if len(steps) > 5 else TILE
    grid = [
        [tile(frames[step][row][frames[step].shape[1] // 2], side) for step in steps] for row in range(len(prompts))
    ]
    tile_width, tile_height = grid[0][0].size
    heading, text = font(18, bold=True), font(18)
    aside, gap = 250, 12
    left = MARGIN + aside + 24
    width = left + len(steps) * (tile_width + gap) - gap + MARGIN
    top = MARGIN + 40
    image = Image.new("RGB", (width, top + len(prompts) * (tile_height + gap) - gap + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    for column, step in enumerate(steps):
        label = f"{unit} {step:,}" if column == 0 else f"{step:,}"
        draw.text((left + column * (tile_width + gap), MARGIN), label, INK, heading)
    draw.line((MARGIN, MARGIN + 28, width - MARGIN - 1, MARGIN + 28), INK, 2)
    for row, prompt in enumerate(prompts):
        lines = wrap(prompt, text, aside, max(1, tile_height // 26))
        write(draw, (MARGIN, top + (tile_height - 26 * len(lines)) // 2), lines, text, 26)
        paste(image, grid[row], left, top, gap)
        top += tile_height + gap
    save(image, path)


def reward_curve(
    path: str | Path,
    steps: Sequence[int],
    series: Mapping[str, Sequence[float]],
    *,
    window: int | None = None,
    x_label: str = "optimiser step",
    y_label: str = "reward (cosine similarity)",
    title: str | None = None,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Writes a PNG with each series against the training step: raw and light, and smoothed on top.

    Args:
        path: of the PNG; written whole or not at all.
        steps: N training steps, ascending.
        series: label -> N values; NaN where there is none. At most four.
        window: values that the smoothed line averages around each step; default: a twentieth of the run, at least 1.
        x_label: of the horizontal axis.
        y_label: of the vertical axis, with its unit.
        title: above the curve, if any.
        marks: label -> step that gets a vertical line.

    Raises:
        ValueError: no values, more than four series, or lengths that do not fit.
    """
    if not 1 <= len(series) <= len(_LINES) or len(steps) == 0:
        raise ValueError(
            f"reward_curve: {len(series)} series over {len(steps)} steps; allowed: 1 to {len(_LINES)} over 1 or more"
        )
    for label, values in series.items():
        if len(values) != len(steps):
            raise ValueError(f"reward_curve: series {label!r} has {len(values)} values for {len(steps)} steps")
    reach = (max(1, len(steps) // 20) if window is None else window) // 2
    with drawing(11):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=(9.6, 5.0), dpi=150, layout=layout, facecolor="white")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        for (label, values), (colour, dashes) in zip(series.items(), _LINES, strict=False):
            _curve(
                axes,
                np.asarray(steps),
                np.asarray(values, dtype=np.float64),
                reach,
                legend_label(label),
                colour,
                dashes,
            )
        for place, (label, step) in enumerate((marks or {}).items()):
            axes.axvline(step, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
            side, shift = ("right", -4) if step > (steps[0] + steps[-1]) / 2 else ("left", 4)
            axes.annotate(
                label, (step, 0), (shift, 4 + 14 * place), axes.get_xaxis_transform(), "offset points", color=SOFT,
                fontsize=9, ha=side, va="bottom",
            )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.margins(x=0.01)
        if title is not None:
            figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold")
        columns = len(series) if sum(map(len, series)) <= 70 else 2
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, handlelength=3, borderaxespad=0.2
        )
        if reach:
            note = f"light: as logged; bold: smoothed over {2 * reach + 1} values"
            axes.annotate(
                note, (1, 0), (0, -27), "axes fraction", "offset points", ha="right", va="top", color=SOFT, fontsize=9
            )
        data = io.BytesIO()
        figure.savefig(data, format="png")
    write_whole(Path(path), data.getvalue())


def _curve(axes: Axes, steps: np.ndarray, raw: np.ndarray, reach: int, label: str, colour: str, dashes: Dash) -> None:
    """One series, its raw values light and its smoothed ones on top; a value that is missing is passed over."""
    known = np.isfinite(raw)
    smooth, marker = _smooth(raw, reach)[known], "o" if known.sum() == 1 else None
    if reach:
        axes.plot(steps[known], raw[known], color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps[known], smooth, color=colour, linestyle=dashes, linewidth=2.2, marker=marker, label=label)


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of the finite values within ``reach`` places, in triangular weights; NaN where there are none."""
    finite = np.isfinite(values)
    weights = np.bartlett(2 * reach + 3)[1:-1]
    total = np.convolve(np.where(finite, values, 0.0), weights)[reach : reach + len(values)]
    weight = np.convolve(finite.astype(np.float64), weights)[reach : reach + len(values)]
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 1e-9)


def _check(prompts: Sequence[str], frames: Tensor, name: str) -> None:
    shape = tuple(frames.shape)
    if not prompts or len(shape) != 5 or shape[0] != len(prompts) or shape[1] < 1 or shape[2] != 3:
        raise ValueError(
            f"{name}: shape {shape} for {len(prompts)} prompts; expected (N, F, 3, H, W) with N >= 1 prompts"
        )


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else "not finite"
