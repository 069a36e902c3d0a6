"""ImageReward against the official package's answers in tests/golden (make_golden_imagereward.py)."""

import json
from pathlib import Path

import pytest
import recipe
import torch
from safetensors import safe_open
from torch import Tensor

from rlvid.reward import imagereward
from rlvid.reward.imagereward import BlipReward
from rlvid.reward.load import load_reward
from rlvid.reward.preprocess import normalise

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "imagereward.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> BlipReward:
    """The package's weights under its own names, through the loader that users call."""
    folder = tmp_path_factory.mktemp("imagereward")
    with safe_open(GOLDEN, "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    torch.save(recipe.weights(shapes, seed=2), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(recipe.vocabulary()) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagereward, "VISION", imagereward.VISION | recipe.BLIP["vision"])
        patch.setattr(imagereward, "TEXT", imagereward.TEXT | recipe.BLIP["text"])
        made = load_reward("imagereward", path=str(folder))
    assert isinstance(made, BlipReward)
    return made


def frame(size: tuple[int, int]) -> Tensor:
    return recipe.pixels(*size)[None, None]


def test_tokens_of_odd_text_are_the_packages(reward: BlipReward, golden: dict[str, Tensor]) -> None:
    ids, mask = reward.tokens(list(recipe.PROMPTS))
    assert torch.equal(ids, golden["tokens"])
    assert torch.equal(mask, golden["mask"])


@pytest.mark.parametrize("place", range(len(recipe.SIZES)), ids=lambda place: "x".join(map(str, recipe.SIZES[place])))
def test_frames_are_prepared_as_the_package_does(reward: BlipReward, golden: dict[str, Tensor], place: int) -> None:
    prepared = normalise(reward.preprocess(recipe.pixels(*recipe.SIZES[place])[None]))
    torch.testing.assert_close(prepared[0], golden["images"][place], atol=1e-6, rtol=0)


def test_scores_are_the_packages(reward: BlipReward, golden: dict[str, Tensor]) -> None:
    prompts = list(recipe.PROMPTS)
    scores = torch.stack(
        [reward(frame(size).expand(len(prompts), -1, -1, -1, -1), prompts)[:, 0] for size in recipe.SIZES]
    )
    assert golden["scores"].std() > 0.05
    torch.testing.assert_close(scores, golden["scores"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", recipe.GRADIENTS, ids=lambda size: "x".join(map(str, size)))
def test_gradients_of_pixels_are_the_packages(
    reward: BlipReward, golden: dict[str, Tensor], size: tuple[int, int]
) -> None:
    frames = frame(size).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(frames, [recipe.PROMPTS[0]]).sum(), frames)
    expected = golden[f"gradient_{size[0]}x{size[1]}"]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient[0, 0], expected, atol=1e-5, rtol=0)
