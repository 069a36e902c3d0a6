"""Pictures show the frames they were given, pixel by pixel, with nothing clipped and nothing half written."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlvid.plots import curves, frames
from rlvid.plots.curves import draw_rewards
from rlvid.plots.frames import draw_models, draw_steps
from rlvid.world.captions import write_captions
from rlvid.world.render import degrade, render, sample_clips


def before_after(path: Path, prompts: list[str], base: Tensor, tuned: Tensor, *rewards: Sequence[float]) -> None:
    """As training ends."""
    values = dict(zip(("base", "tuned"), rewards, strict=True))
    draw_models(path, prompts, {"base": base, "tuned": tuned}, values, shown=4, gains=True)


LONG = "a very long prompt that goes on and on, " * 20


def clips(count: int = 2, size: int = 32) -> tuple[list[str], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    drawn = sample_clips(count, generator)
    clean = render(drawn, size=size)
    spoilt = degrade(clean, torch.full((count,), 2), torch.ones(count), generator)
    return write_captions(drawn, generator), spoilt, clean


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def contains(page: np.ndarray, frame_CHW: Tensor, factor: int) -> list[int]:
    """Left edges of the places where an enlarged frame lies in a picture."""
    tile = (frame_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)
    height, width = tile.shape[:2]
    first = (page[: 1 - height, : 1 - width] == tile[0, 0]).all(2)
    last = (page[height - 1 :, width - 1 :] == tile[-1, -1]).all(2)
    corners = np.argwhere(first & last)
    return [int(x) for y, x in corners if (page[y : y + height, x : x + width] == tile).all()]


def test_before_is_left_and_after_is_right_and_pixels_are_enlarged_whole(tmp_path: Path) -> None:
    prompts, spoilt, clean = clips()
    before_after(tmp_path / "a.png", prompts, spoilt, clean, [0.1, 0.2], torch.tensor([0.3, math.nan]))
    page = pixels(tmp_path / "a.png")
    width = page.shape[1]
    assert 1000 <= width <= 1600
    for clip in range(2):
        for frame in (0, 2, 5, 7):
            assert any(x < width / 2 for x in contains(page, spoilt[clip, frame], 5))
            assert any(x > width / 2 for x in contains(page, clean[clip, frame], 5))
    margin = np.concatenate([page[:20].reshape(-1, 3), page[-20:].reshape(-1, 3), page[:, :20].reshape(-1, 3),
                             page[:, -20:].reshape(-1, 3)])  # fmt: skip
    assert (margin == 255).all(), "something runs into the margin"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_the_shown_rewards_change_the_picture_and_a_broken_frame_is_crossed_out(tmp_path: Path) -> None:
    prompts, spoilt, clean = clips()
    before_after(tmp_path / "a.png", prompts, spoilt, clean, [0.1, 0.2], [0.3, 0.4])
    before_after(tmp_path / "b.png", prompts, spoilt, clean, [0.1, 0.2], [0.3, 0.5])
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    changed = np.argwhere((a != b).any(2))
    assert len(changed)
    assert changed.min(0)[0] > a.shape[0] / 2
    broken = clean.clone()
    broken[0, 0, 0, 0, 0] = torch.nan
    before_after(tmp_path / "c.png", prompts, spoilt, broken, [0.1, 0.2], [0.3, 0.4])
    assert not contains(pixels(tmp_path / "c.png"), clean[0, 0], 5)


@pytest.mark.parametrize("size", [16, 256])
def test_small_and_large_frames_make_pictures_of_like_width(tmp_path: Path, size: int) -> None:
    _, spoilt, clean = clips(1, size)
    before_after(tmp_path / "a.png", [LONG], (spoilt * 255).to(torch.uint8), clean, [0.1], [0.3])
    assert 1000 <= pixels(tmp_path / "a.png").shape[1] <= 1600


def test_evolution_shows_the_central_frames_from_the_first_step_to_the_last(tmp_path: Path) -> None:
    prompts, spoilt, clean = clips()
    shown = {step: spoilt * (1 - step / 1000) for step in range(0, 1000, 50)} | {1000: clean}
    draw_steps(tmp_path / "a.png", [prompts[0], LONG], shown)
    page = pixels(tmp_path / "a.png")
    assert page.shape[1] <= 1600
    (first,), (last,) = (contains(page, shown[step][0, 4], 5) for step in (0, 1000))
    assert first < last
    assert not contains(page, clean[0, 0], 5)
    draw_steps(tmp_path / "b.png", prompts, {0: spoilt})
    assert contains(pixels(tmp_path / "b.png"), spoilt[1, 4], 5)


def test_text_is_wrapped_and_ends_in_an_ellipsis_within_its_width() -> None:
    font = frames.font(18)
    lines = frames.wrap(LONG, font, 300, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 300 for line in lines)
    assert LONG.startswith(" ".join(lines)[:-1])
    assert frames.wrap("a short one", font, 300, 3) == ["a short one"]
    assert frames.wrap("", font, 300, 3) == [""]
    assert font.getlength(frames.wrap("x" * 500, font, 300, 2)[0]) <= 300


def test_curve_is_drawn_for_whole_sparse_and_single_values(tmp_path: Path) -> None:
    steps = list(range(100))
    rising = [0.2 + 0.001 * s for s in steps]
    sparse = [0.2 if s % 10 == 0 else math.nan for s in steps]
    draw_rewards(tmp_path / "a.png", steps, {"trained reward": rising, "held-out reward": sparse})
    draw_rewards(tmp_path / "b.png", steps, {"trained reward": rising})
    draw_rewards(tmp_path / "c.png", [3], {"trained reward": [0.5]})
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    vermillion = np.array([0xD5, 0x5E, 0x00])
    assert (a == vermillion).all(2).sum() > 300
    assert not (b == vermillion).all(2).any()
    assert (pixels(tmp_path / "c.png") == [0x00, 0x72, 0xB2]).all(2).any()
    for page in (a, b):
        assert (page[:, :8] == 255).all()
        assert (page[:, -8:] == 255).all()


def test_smoothing_is_a_triangular_mean_of_the_finite_values() -> None:
    values = np.array([1.0, np.nan, 4.0, 10.0, np.nan, np.nan, np.nan])
    assert curves._smooth(values, 1)[:4] == pytest.approx([1.0, (1 + 4) / 2, (2 * 4 + 10) / 3, (4 + 2 * 10) / 3])
    assert np.isnan(curves._smooth(values, 1)[5:]).all()
    assert curves._smooth(values[2:4], 0) == pytest.approx([4.0, 10.0])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    prompts, spoilt, clean = clips()
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"draw_models: 2 prompts, 2 models, videos or values \[1, 2\]"):
        before_after(path, prompts, spoilt[:1], clean, [0.1, 0.2], [0.1, 0.2])
    with pytest.raises(ValueError, match=r"draw_models: 2 prompts, 2 models, videos or values \[1, 2\]"):
        before_after(path, prompts, spoilt, clean, [0.1], [0.1, 0.2])
    with pytest.raises(ValueError, match="0 steps"):
        draw_steps(path, prompts, {})
    with pytest.raises(ValueError, match="has 1 values for 2 steps"):
        draw_rewards(path, [0, 1], {"reward": [0.1]})
    with pytest.raises(ValueError, match="0 series"):
        draw_rewards(path, [0, 1], {})
    assert not list(tmp_path.iterdir())


def test_marks_are_lines_in_a_curve(tmp_path: Path) -> None:
    series = {"a": [0.1, 0.2, 0.3]}
    draw_rewards(tmp_path / "plain.png", [0, 10, 20], series, window=1)
    draw_rewards(tmp_path / "marked.png", [0, 10, 20], series, window=1, marks={"best: step 0": 0, "warning": 20})
    soft = tuple(int(curves.SOFT[i : i + 2], 16) for i in (1, 3, 5))
    counts = [(pixels(tmp_path / f"{name}.png") == soft).all(2).sum() for name in ("plain", "marked")]
    assert counts[1] > counts[0] + 200
