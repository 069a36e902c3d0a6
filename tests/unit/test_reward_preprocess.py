"""How frames become a model's input: fits, presets, rounding, clamping."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, functional

from rlvid.reward.preprocess import Preprocess, preset

SHAPES = [(32, 32), (16, 16), (48, 20), (20, 48), (33, 61), (7, 9), (31, 17), (64, 15)]
PRESETS = ["hpsv2", "instructvideo", "videox_fun", "imagereward", "clip", "pickscore"]


def images(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width)


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_keeps_the_whole_image_in_the_middle(shape: tuple[int, int]) -> None:
    picture = images(*shape)
    padded = Preprocess(16, "bicubic", fit="pad")(picture)
    assert padded.shape == (2, 3, 16, 16)
    scale = 16 / max(shape)
    height, width = (round(side * scale) for side in shape)
    expected = picture
    if (height, width) != shape:
        expected = functional.resize(picture, [height, width], InterpolationMode.BICUBIC, antialias=True)
    top, left = (16 - height) // 2, (16 - width) // 2
    torch.testing.assert_close(padded[..., top : top + height, left : left + width], expected, atol=1e-6, rtol=0)
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    assert not padded[..., outside].any()


def test_an_image_whose_longer_side_fits_already_is_padded_all_the_same() -> None:
    assert Preprocess(16, fit="pad")(images(16, 5)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("antialias", [True, False])
def test_squashing_changes_the_shape(shape: tuple[int, int], antialias: bool) -> None:
    picture = images(*shape)
    squashed = Preprocess(16, "bicubic", antialias, "squash")(picture)
    expected = functional.resize(picture, [16, 16], InterpolationMode.BICUBIC, antialias=antialias)
    torch.testing.assert_close(squashed, expected, atol=1e-6, rtol=0)


def test_the_shorter_side_alone_fits_square_images_only() -> None:
    assert preset("instructvideo", 16)(images(40, 40)).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="frames of 30 x 40 are not square"):
        preset("instructvideo", 16)(images(40, 30))


@pytest.mark.parametrize(("margin", "torchvision", "hf"), [(1, 0, 0), (3, 2, 1), (5, 2, 2), (4, 2, 2)])
def test_an_odd_margin_is_rounded_as_each_library_does(margin: int, torchvision: int, hf: int) -> None:
    picture = torch.arange(16.0 + margin).div(32).expand(1, 3, 16, 16 + margin)
    for rounding, offset in (("torchvision", torchvision), ("hf", hf)):
        cropped = Preprocess(16, rounding=rounding)(picture)  # type: ignore[arg-type]
        assert torch.equal(cropped, picture[..., offset : offset + 16])
    assert torch.equal(Preprocess(16)(picture), functional.center_crop(picture, [16]))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_its_size_and_a_gradient(name: str) -> None:
    frames = (images(24, 24) * 0.8 + 0.1).requires_grad_()
    prepared = preset(name, 16)(frames)
    assert prepared.shape == (2, 3, 16, 16)
    (gradient,) = torch.autograd.grad(prepared.square().sum(), frames)
    assert (gradient != 0).all()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_clamp_before_they_resize_and_not_after(name: str) -> None:
    frames = images(24, 24) * 2 - 0.5
    assert torch.equal(preset(name, 16)(frames), preset(name, 16)(frames.clamp(0, 1)))
    steps = torch.zeros(1, 3, 24, 24)
    steps[..., 12:] = 1
    bicubic = name != "instructvideo"
    assert (preset(name, 17)(steps).max() > 1.01) == bicubic, "bicubic overshoot passes"


def test_without_clamp_saturated_pixels_pass() -> None:
    frames = torch.tensor([-0.5, 0.5, 1.5]).expand(1, 3, 3, 3).clone().requires_grad_()
    prepared = Preprocess(3, clamp=False)(frames)
    assert torch.equal(prepared, frames)
    (gradient,) = torch.autograd.grad(prepared.sum(), frames)
    assert (gradient == 1).all()


def test_antialiasing_matters_when_images_shrink() -> None:
    frames = images(64, 64)
    smooth, rough = Preprocess(16)(frames), Preprocess(16, antialias=False)(frames)
    torch.testing.assert_close(rough, F.interpolate(frames, 16, mode="bilinear"), atol=1e-6, rtol=0)
    assert math.sqrt(float((smooth - rough).square().mean())) > 0.05


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"reward.preprocess = 'hps' does not exist; allowed: hpsv2, instructvideo"):
        preset("hps")
