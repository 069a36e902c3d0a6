"""HPSv2 against the official package's answers in tests/golden/hpsv2.safetensors (make_golden_hpsv2.py)."""

import json
from pathlib import Path

import pytest
import recipe
import torch
from safetensors import safe_open
from torch import Tensor

from rlvid.reward.clip import ClipReward
from rlvid.reward.load import load_reward
from rlvid.reward.preprocess import normalise

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "hpsv2.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> ClipReward:
    """The package's weights, as its checkpoint has them, through the loader that users call."""
    folder = tmp_path_factory.mktemp("hpsv2")
    with safe_open(GOLDEN, "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    torch.save({"state_dict": recipe.weights(shapes, seed=1)}, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": recipe.HPS}))
    made = load_reward("hpsv2", path=str(folder))
    assert isinstance(made, ClipReward)
    return made


def frame(size: tuple[int, int]) -> Tensor:
    return recipe.pixels(*size)[None, None]


def test_tokens_of_odd_text_are_the_packages(reward: ClipReward, golden: dict[str, Tensor]) -> None:
    assert torch.equal(reward.tokenise(list(recipe.PROMPTS)), golden["tokens"])


@pytest.mark.parametrize("place", range(len(recipe.SIZES)), ids=lambda place: "x".join(map(str, recipe.SIZES[place])))
def test_frames_are_prepared_as_the_package_does(reward: ClipReward, golden: dict[str, Tensor], place: int) -> None:
    prepared = normalise(reward.preprocess(recipe.pixels(*recipe.SIZES[place])[None]))
    torch.testing.assert_close(prepared[0], golden["images"][place], atol=1e-6, rtol=0)


def test_features_and_scores_are_the_packages(reward: ClipReward, golden: dict[str, Tensor]) -> None:
    prompts = list(recipe.PROMPTS)
    features = torch.stack([reward.image_features(frame(size))[0, 0] for size in recipe.SIZES])
    scores = torch.stack(
        [reward(frame(size).expand(len(prompts), -1, -1, -1, -1), prompts)[:, 0] for size in recipe.SIZES]
    )
    torch.testing.assert_close(features, golden["image_features"], atol=1e-6, rtol=0)
    torch.testing.assert_close(reward.text_features(prompts), golden["text_features"], atol=1e-6, rtol=0)
    torch.testing.assert_close(scores, golden["scores"], atol=1e-6, rtol=0)
    assert golden["scores"].std() > 0.05


@pytest.mark.parametrize("size", recipe.GRADIENTS, ids=lambda size: "x".join(map(str, size)))
def test_gradients_of_pixels_are_the_packages(
    reward: ClipReward, golden: dict[str, Tensor], size: tuple[int, int]
) -> None:
    frames = frame(size).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(frames, [recipe.PROMPTS[0]]).sum(), frames)
    expected = golden[f"gradient_{size[0]}x{size[1]}"]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient[0, 0], expected, atol=1e-6, rtol=0)


def test_a_wrong_activation_would_show(reward: ClipReward, golden: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": reward.clip.state_dict()}, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": recipe.HPS | {"quick_gelu": True}}))
    other = load_reward("hpsv2", path=str(tmp_path))
    scores = other(frame(recipe.SIZES[1]), [recipe.PROMPTS[0]])
    assert (scores[0, 0] - golden["scores"][1, 0]).abs() > 1e-4
