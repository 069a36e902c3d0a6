"""PickScore, CLIP score and the aesthetic predictor against transformers' own model and image processor."""

import json
from pathlib import Path
from typing import Any

import pytest
import recipe
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from rlvid.reward.aesthetic import HEAD_FILE
from rlvid.reward.huggingface import open_clip_config
from rlvid.reward.load import load_reward
from rlvid.reward.preprocess import normalise, preset

PROMPTS = list(recipe.PROMPTS[:2])


def model(hidden_act: str) -> CLIPModel:
    """A random CLIP of transformers, with sizes that are not CLIP's usual ones."""
    shared = {"num_attention_heads": 3, "num_hidden_layers": 2, "hidden_act": hidden_act}
    text: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 60, "vocab_size": 49408, "eos_token_id": 49407}
    vision = {"hidden_size": 36, "intermediate_size": 90, "image_size": 28, "patch_size": 7}
    made = CLIPModel(
        CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=20)
    ).requires_grad_(False)
    shapes = {name: list(tensor.shape) for name, tensor in made.state_dict().items()}
    made.load_state_dict(recipe.weights(shapes, seed=3))
    return made.eval()


@pytest.fixture(params=["gelu", "quick_gelu"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[CLIPModel, Path]:
    made = model(request.param)
    made.save_pretrained(tmp_path)
    return made, tmp_path


def frames() -> Tensor:
    return torch.stack([recipe.pixels(28, 28, seed) for seed in range(4)]).unflatten(0, (2, 2))


def logits(reference: CLIPModel, tokens: Tensor, videos: Tensor) -> Tensor:
    """exp(logit scale) times cosine of each frame with its prompt."""
    answer = reference(input_ids=tokens, pixel_values=normalise(videos.flatten(0, 1)))
    return torch.stack([answer.logits_per_image[i, i // 2] for i in range(4)]).unflatten(0, (2, 2))


@pytest.mark.parametrize("name", ["pickscore", "clip"])
def test_scores_and_gradients_are_those_of_transformers(name: str, saved: tuple[CLIPModel, Path]) -> None:
    reference, folder = saved
    reward: Any = load_reward(name, path=str(folder))
    ours, theirs = frames().requires_grad_(), frames().requires_grad_()
    scale = 1.0 if name == "pickscore" else float(reference.logit_scale.exp())
    scores, expected = reward(ours, PROMPTS), logits(reference, reward.tokenise(PROMPTS), theirs) / scale
    assert expected.std() > 0.01
    torch.testing.assert_close(scores, expected, atol=5e-6, rtol=0)
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    (gradient,) = torch.autograd.grad((scores * weights).sum(), ours)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), theirs)
    assert expected_gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, expected_gradient, atol=5e-6, rtol=0)


def test_pickles_and_older_files_of_transformers_are_read(tmp_path: Path) -> None:
    reference = model("gelu")
    reference.config.save_pretrained(tmp_path)
    old_constants = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # as older files hold them
    torch.save(reference.state_dict() | old_constants, tmp_path / "pytorch_model.bin")
    reward: Any = load_reward("pickscore", path=str(tmp_path))
    expected = logits(reference, reward.tokenise(PROMPTS), frames())
    torch.testing.assert_close(reward(frames(), PROMPTS), expected, atol=5e-6, rtol=0)


def test_the_aesthetic_head_is_laions_layers_on_the_image_embedding(saved: tuple[CLIPModel, Path]) -> None:
    reference, folder = saved
    widths = [20, 1024, 128, 64, 16, 1]
    layers = nn.Sequential(
        nn.Linear(20, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval()  # fmt: skip
    assert [layer.in_features for layer in layers if isinstance(layer, nn.Linear)] == widths[:-1]
    shapes = {f"layers.{name}": list(tensor.shape) for name, tensor in layers.state_dict().items()}
    head = recipe.weights(shapes, seed=4)
    layers.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in head.items()})
    torch.save(head, folder / HEAD_FILE)
    reward = load_reward("aesthetic", path=str(folder))
    ours, theirs = frames().requires_grad_(), frames().requires_grad_()
    scores = reward(ours, PROMPTS)
    embedding = reference.get_image_features(pixel_values=normalise(theirs.flatten(0, 1))).pooler_output
    expected = layers(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0].unflatten(0, (2, 2))
    assert expected.std() > 0.01
    torch.testing.assert_close(scores, expected, atol=5e-6, rtol=0)
    gradients = [torch.autograd.grad(s.sum(), f)[0] for s, f in ((scores, ours), (expected, theirs))]
    torch.testing.assert_close(*gradients, atol=5e-6, rtol=0)


def test_another_head_is_told(saved: tuple[CLIPModel, Path]) -> None:
    _, folder = saved
    torch.save({"weight": torch.zeros(1, 20), "bias": torch.zeros(1)}, folder / HEAD_FILE)
    with pytest.raises(ValueError, match=r"is not LAION's head for embeddings of 20 numbers; its keys begin with bias"):
        load_reward("aesthetic", path=str(folder))


@pytest.mark.parametrize("size", recipe.SIZES, ids=lambda size: "x".join(map(str, size)))
def test_frames_are_prepared_as_transformers_does(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_rescale=False)
    image = recipe.pixels(*size)
    expected = processor(image, return_tensors="pt", input_data_format="channels_first").pixel_values
    torch.testing.assert_close(normalise(preset("clip", 28)(image[None])), expected, atol=1e-6, rtol=0)


def test_weights_of_open_clip_are_read_too(saved: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    """The same model in open_clip's own form of a folder."""
    folder = saved[1]
    reward: Any = load_reward("clip", path=str(folder))
    config = open_clip_config(CLIPConfig.from_pretrained(folder))
    other = tmp_path / "open_clip"
    other.mkdir()
    (other / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    tensors = {name: each.contiguous() for name, each in reward.clip.state_dict().items()}
    save_file(tensors, other / "open_clip_model.safetensors")
    again = load_reward("clip", path=str(other))
    assert torch.equal(again(frames(), PROMPTS), reward(frames(), PROMPTS))
