"""The moving picture of a pair at real sizes: its bytes, its motion, and how many of them are kept."""

import io
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageSequence

from rlvid.study import film
from rlvid.study.film import RecentFilms, side_by_side, under_noise


def textured(count: int, brighter: float = 0.0, height: int = 64, width: int = 48) -> np.ndarray:
    """A video with structure and grain, (F, H, W, 3), that brightens by so much a frame."""
    drawn = np.random.default_rng(0)
    row, column = np.mgrid[:height, :width]
    picture = 100 + 60 * np.sin(row / 9) * np.cos(column / 7)
    picture = picture[..., None] + drawn.normal(0, 6, (height, width, 3))
    return np.stack([(picture + brighter * place).clip(0, 255).round().astype(np.uint8) for place in range(count)])


def shown(data: bytes) -> Iterator[tuple[np.ndarray, int]]:
    image = Image.open(io.BytesIO(data))
    assert image.info["loop"] == 0
    for each in ImageSequence.Iterator(image):
        yield np.asarray(each.convert("RGB")).astype(int), each.info["duration"]


def test_a_large_film_is_small_and_both_sides_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = textured(5, 4.0, height=120, width=208)
    monkeypatch.setattr(film, "LOSSLESS", 2 * frames[..., 0].size - 1)
    data = side_by_side(frames, frames, 16)
    assert len(data) < 2 * frames.size / 6
    pictures = list(shown(data))
    assert [duration for _, duration in pictures] == [62] * 5
    for (picture, _), frame in zip(pictures, frames, strict=True):
        assert picture.shape == (120, 416, 3)
        left, right = (np.abs(half - frame).mean() for half in (picture[:, :208], picture[:, 208:]))
        assert left == pytest.approx(right, rel=0.02)
        assert left < 5, "of grain, mostly in colour"
    still = Image.open(io.BytesIO(side_by_side(frames, frames, 16, still=True)))
    assert np.array_equal(np.asarray(still.convert("RGB"))[:, 208:], frames[0]), "one frame has few pixels"


def test_videos_of_real_sizes_are_large_and_those_of_256_pixels_are_not() -> None:
    assert 2 * 16 * 256 * 256 < film.LOSSLESS < 2 * 33 * 480 * 832


def test_slow_motion_does_not_stop_in_a_large_film(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = textured(9, brighter=0.5)
    monkeypatch.setattr(film, "LOSSLESS", 0)
    pictures = np.stack([picture for picture, _ in shown(side_by_side(slow, textured(9), 8))])
    assert len(pictures) == 9
    moved = np.diff(pictures[:, :, :48].mean((1, 2, 3)))
    assert moved == pytest.approx([0.5] * 8, abs=0.3)
    assert np.diff(pictures[:, :, 48:].mean((1, 2, 3))) == pytest.approx([0] * 8, abs=0.1)
    odd = textured(3, height=33, width=21)
    assert [picture.shape for picture, _ in shown(side_by_side(odd, odd, 8))] == [(33, 42, 3)] * 3


def test_small_films_are_as_before() -> None:
    frames = textured(8)
    frames[:, 0, 0, 0] = np.arange(8)  # of two equal frames, an animation has one
    pictures = np.stack([picture for picture, _ in shown(side_by_side(frames, frames[:, ::-1], 8))])
    assert np.array_equal(pictures, np.concatenate([frames, frames[:, ::-1]], axis=2))
    noise = np.random.default_rng(3).normal(0, 80, frames.shape)
    assert np.array_equal(under_noise(frames, 3), (0.5 * frames + 64 + noise).clip(0, 255).astype(np.uint8))


def test_noise_takes_the_memory_of_a_frame() -> None:
    frames = textured(40)
    tracemalloc.start()
    under_noise(frames, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * frames.size


def test_so_many_bytes_of_films_are_kept_and_the_newest_always() -> None:
    films, made = RecentFilms(10), list[str]()

    def get(name: str, size: int) -> None:
        assert len(films.get(name, lambda: (made.append(name), bytes(size))[1])) == size

    for name, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4)):
        get(name, size)
    assert made == ["a", "b", "c"], "b was asked for longest ago"
    get("b", 4)
    assert made == ["a", "b", "c", "b"]
    get("large", 50)
    get("large", 50)
    get("a", 4)
    assert made == ["a", "b", "c", "b", "large", "a"], "the newest is kept, and alone"
    get("large", 50)
    assert made[-1] == "large"

    def fail() -> bytes:
        raise ValueError("gone")

    with pytest.raises(ValueError, match="gone"):
        films.get("d", fail)
    get("d", 1)
    assert made[-1] == "d"
