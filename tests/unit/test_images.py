"""Image files: pixels as a viewer shows them, and files that are refused in one line."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlvid.data.images import ImageError, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_lossless_files_have_the_pixels_that_were_saved(tmp_path: Path) -> None:
    for name, options in (("x.png", {}), ("x.webp", {"lossless": True})):
        found = read_image(save(tmp_path / name, Image.fromarray(PIXELS), **options))
        assert found.dtype == np.uint8
        assert np.array_equal(found, PIXELS)


def test_jpeg_is_near_and_grey_has_three_channels(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    grey = read_image(save(tmp_path / "x.jpg", Image.fromarray(smooth), quality=95))
    assert grey.shape == (8, 8, 3)
    assert np.abs(grey[..., 0].astype(int) - smooth).max() < 12


def test_an_image_is_turned_and_laid_on_black(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it by 90 degrees clockwise
    found = read_image(save(tmp_path / "x.png", Image.fromarray(PIXELS), exif=exif))
    assert np.array_equal(found, np.rot90(PIXELS, -1))
    half = np.dstack([PIXELS, np.full((6, 8), 128, np.uint8)])
    found = read_image(save(tmp_path / "y.png", Image.fromarray(half)))
    assert np.abs(found - PIXELS * (128 / 255)).max() < 2


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(PIXELS).save(whole, "PNG")
    deep = Image.fromarray(np.zeros((4, 4), np.uint16))
    files = {
        "gone.png": (None, "no such file"),
        "empty.png": (b"", "is empty"),
        "cut.png": (whole.getvalue()[:-40], "is no whole PNG"),
        "text.jpg": (b"hello", r"is no whole PNG, JPEG or WebP image$"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "page.webp": (b"<!doctype html>", "web page"),
    }
    for name, (data, words) in files.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ImageError, match=words) as error:
            read_image(path)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
    with pytest.raises(ImageError, match="8 bits a colour"):
        read_image(save(tmp_path / "deep.png", deep))
    with pytest.raises(ImageError, match="a side at most 32 times the other"):
        read_image(save(tmp_path / "long.png", Image.new("RGB", (400, 4))))
    with pytest.raises(ImageError, match="allowed are 16777216 pixels"):
        read_image(save(tmp_path / "large.png", Image.new("1", (5000, 5000))))
