"""Segments, attenuation and the CLIP reward, held to hand-made numbers, open_clip and torchvision."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional, v2

from rlvid.config import parse_config
from rlvid.reward import clip
from rlvid.reward.attenuation import tar_weights
from rlvid.reward.clip import ClipReward, build_clip
from rlvid.reward.fit.folder import Spec
from rlvid.reward.load import load_reward
from rlvid.reward.preprocess import Preprocess, normalise, saturated_share
from rlvid.reward.segments import choose_frames
from rlvid.reward.video import expected_shares, mean_of_frames, plan_frames
from rlvid.toy.tiny import build_tokenizer, tiny_reward
from rlvid.train import preflight

PROMPTS = ["a red circle moving left", "a dog", "a red circle moving left"]
BELOW_ONE = 1 - 2**-24


@pytest.fixture(scope="module")
def reward() -> ClipReward:
    return tiny_reward()


def even_draws(count: int, segments: int) -> Tensor:
    """Draws that cover [0, 1) evenly: what is uniform comes out exactly so."""
    return ((torch.arange(count) + 0.5) / count)[:, None].expand(count, segments)


# ---------------------------------------------------------------------------------------------------------- SegVR


@pytest.mark.parametrize(("segments", "frames"), [(4, 16), (1, 16), (16, 16), (3, 10), (4, 10), (5, 9)])
def test_each_frame_of_a_segment_is_as_likely_as_the_others(segments: int, frames: int) -> None:
    length = frames // segments
    chosen = choose_frames(even_draws(60 * length, segments), frames)
    assert chosen.dtype == torch.int64
    assert (chosen.diff(dim=1) > 0).all()
    for segment in range(segments):
        counts = torch.bincount(chosen[:, segment], minlength=frames).tolist()
        expected = [60 if index // length == segment else 0 for index in range(frames)]
        assert counts == expected, "a remainder at the end is never drawn"


def test_the_ends_of_the_unit_interval_stay_inside_their_segment() -> None:
    ends = choose_frames(torch.tensor([[0.0] * 4, [BELOW_ONE] * 4, [1.0] * 4]), 16)
    assert ends.tolist() == [[0, 4, 8, 12], [3, 7, 11, 15], [3, 7, 11, 15]]


def test_videos_and_segments_are_drawn_apart() -> None:
    draws = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    assert choose_frames(draws, 8).tolist() == [[0, 7], [3, 4]]


def test_more_segments_than_frames_are_an_error() -> None:
    with pytest.raises(ValueError, match="segments = 5 exceeds the 4 frames of a video; allowed: 1 to 4"):
        choose_frames(torch.rand(1, 5), 4)


# ------------------------------------------------------------------------------------------------------------ TAR


def test_weights_by_hand() -> None:
    weights = tar_weights(torch.tensor([[0, 5, 8, 15], [7, 9, 10, 12]]), 16, 1.0)
    exponents = [[-8, -3, 0, -7], [-1, -1, -2, -4]]
    torch.testing.assert_close(
        weights, torch.tensor([[math.exp(e) for e in row] for row in exponents]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("attenuation", "expected"),
    [(0.0, [1, 1, 1, 1]), (math.inf, [0, 0, 1, 0]), (0.5, [0.367879, 0.606531, 1, 0.606531])],
)
@pytest.mark.parametrize("frames", [4, 5])
def test_weights_at_the_limits(attenuation: float, expected: list[float], frames: int) -> None:
    weights = tar_weights(torch.arange(4)[None], frames, attenuation)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([expected]).float(), atol=1e-6, rtol=0)


def test_expected_shares_of_the_paper() -> None:
    shares = expected_shares(4, 16, 1.0)
    torch.testing.assert_close(shares, torch.tensor([0.005, 0.264, 0.718, 0.013]), atol=5e-4, rtol=0)
    drawn = tar_weights(choose_frames(torch.rand(20_000, 4), 16), 16, 1.0).mean(0)
    torch.testing.assert_close(shares, drawn / drawn.sum(), atol=5e-3, rtol=0)


# ----------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("attenuation", [0.0, 0.3, 1.0])
def test_a_plan_weighs_as_the_paper_or_sums_to_one(attenuation: float) -> None:
    draws, scores = torch.rand(5, 4), torch.rand(5, 4)
    paper, normalised = (plan_frames(draws, 16, attenuation, weights) for weights in ("paper", "normalised"))
    weights = torch.exp(-attenuation * (choose_frames(draws, 16) - 8).abs())
    assert torch.equal(paper.frames_BS, choose_frames(draws, 16))
    assert torch.equal(normalised.frames_BS, paper.frames_BS)
    torch.testing.assert_close(paper.reward(scores), (weights * scores).sum(1) / 4)
    torch.testing.assert_close(normalised.reward(scores), (weights * scores).sum(1) / weights.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [21.3, -0.1, 1e-6, 3e4])
def test_frames_that_score_alike_make_videos_of_that_very_reward(dtype: torch.dtype, value: float) -> None:
    plan, scores = plan_frames(torch.rand(64, 5), 16, 0.3, "normalised"), torch.full((64, 5), value, dtype=dtype)
    reward = plan.reward(scores)
    assert reward.dtype == torch.float32
    assert torch.equal(reward, scores[:, 0].float())
    assert torch.equal(mean_of_frames(scores), scores[:, 0].float())


@pytest.mark.parametrize("weights", ["paper", "normalised"])
@pytest.mark.parametrize("frames", [8, 9, 16])
def test_infinite_attenuation_is_the_central_frame_alone(weights: str, frames: int) -> None:
    plan = plan_frames(torch.rand(3, 4), frames, math.inf, weights)
    assert plan.frames_BS.tolist() == [[frames // 2]] * 3
    assert plan.reward(torch.tensor([[0.2], [0.5], [-1.0]])).tolist() == pytest.approx([0.2, 0.5, -1.0])


@pytest.mark.parametrize(
    ("skip_below", "kept"),
    [(0.0, [0, 1, 2, 3]), (0.01, [1, 2, 3]), (0.02, [1, 2]), (0.5, [2]), (0.9, [2]), (0.999, [2])],
)
def test_segments_that_hardly_count_are_not_decoded(skip_below: float, kept: list[int]) -> None:
    draws = torch.rand(3, 4)
    whole, thin = plan_frames(draws, 16, 1.0), plan_frames(draws, 16, 1.0, skip_below=skip_below)
    assert torch.equal(thin.frames_BS, whole.frames_BS[:, kept])
    assert torch.equal(thin.weights_BS, whole.weights_BS[:, kept])
    normalised = plan_frames(draws, 16, 1.0, "normalised", skip_below)
    expected = whole.weights_BS[:, kept] / whole.weights_BS[:, kept].sum(1, keepdim=True)
    assert torch.equal(normalised.frames_BS, thin.frames_BS)
    torch.testing.assert_close(normalised.weights_BS, expected)
    torch.testing.assert_close(normalised.weights_BS.sum(1), torch.ones(3))


@pytest.mark.parametrize("skip_below", [0.25, 0.26, 0.99])
def test_segments_that_weigh_alike_are_all_decoded(skip_below: float) -> None:
    assert plan_frames(torch.rand(3, 4), 16, 0.0, skip_below=skip_below).frames_BS.shape == (3, 4)


# --------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (16, 24), (16, 19), (8, 8), (60, 40), (24, 40), (12, 10)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_preprocessing_is_torchvisions(shape: tuple[int, int], mode: str) -> None:
    images = torch.rand(2, 3, *shape)
    resized = functional.resize(images, [16], InterpolationMode(mode), antialias=True)
    expected = functional.center_crop(resized, [16])
    torch.testing.assert_close(Preprocess(16, mode)(images), expected, atol=1e-6, rtol=0)


def test_pixels_are_clamped_normalised_and_counted() -> None:
    pixels = (
        torch.tensor([-0.5, 0.1, 0.4, 0.9, 1.5, 0.6]).reshape(1, 1, 1, 6).expand(2, 3, 6, 6).clone().requires_grad_()
    )
    images = Preprocess(6)(pixels)
    assert torch.equal(images, pixels.detach().clamp(0, 1))
    images.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad[0, 0, 0].tolist() == [0, 1, 1, 1, 0, 1]
    assert float(saturated_share(pixels)) == pytest.approx(2 / 6)
    assert float(saturated_share(torch.tensor([0.0, 1.0, -0.1, 1.1]))) == 0.5, "at the ends the gradient passes"
    reference = v2.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(normalise(images), reference(images), atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------- CLIP reward


def test_scores_are_open_clips_cosines(reward: ClipReward) -> None:
    frames = torch.rand(3, 4, 3, 16, 16)
    scores = reward(frames, PROMPTS)
    reference = v2.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    image = reward.clip.encode_image(reference(frames.flatten(0, 1))).unflatten(0, (3, 4))
    text = reward.clip.encode_text(reward.tokenise(PROMPTS))[:, None].expand_as(image)
    expected = torch.nn.functional.cosine_similarity(image, text, dim=-1)
    assert scores.dtype == torch.float32
    assert scores.std() > 1e-3
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=0)


def test_scores_are_multiplied_by_the_scale(reward: ClipReward) -> None:
    frames = torch.rand(3, 2, 3, 16, 16)
    scaled = ClipReward(reward.clip, reward.tokenise, reward.preprocess, scale=4.0)
    assert torch.equal(scaled(frames, PROMPTS), 4 * reward(frames, PROMPTS))


def test_the_built_in_reward_has_the_activation_it_was_learned_with() -> None:
    kinds = [type(module).__name__ for module in load_reward("builtin").modules()]
    assert "GELU" in kinds
    assert "QuickGELU" not in kinds


def test_a_reward_is_read_from_its_folder(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    text = {"context_length": 7, "vocab_size": len(tokenizer), "width": 16, "heads": 2, "layers": 1}
    vision = {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 4}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    clip = build_clip(config)
    assert any(type(module).__name__ == "QuickGELU" for module in clip.modules())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    spec = Spec(axes=("quality",), preprocess=Preprocess(16), base_mean=(0.0,), base_deviation=(1.0,))
    (tmp_path / "reward.json").write_text(spec.model_dump_json())
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    reward = load_reward("fitted", path=str(tmp_path))
    assert "QuickGELU" in [type(module).__name__ for module in reward.modules()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in reward.clip.state_dict().items())
    long = "a red circle moving left beside a blue star growing"
    ids = reward.tokenise([long, "a dog"])
    assert ids.shape == (2, 7)
    assert reward(torch.rand(1, 1, 3, 16, 16), [long]).isfinite().all()
    save_file(
        {name: tensor for name, tensor in state.items() if name != "text_projection"}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"1 keys missing \(text_projection\)"):
        load_reward("fitted", path=str(tmp_path))


def test_a_prompt_is_encoded_once() -> None:
    reward = tiny_reward()
    encoded: list[int] = []
    reward.clip.token_embedding.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    frames = torch.rand(3, 2, 3, 16, 16)
    first = reward(frames, PROMPTS)
    again = reward(frames, PROMPTS)
    reward(frames, ["a dog", "a cat", "a dog"])
    assert encoded == [1, 1, 1]
    assert torch.equal(first, again)
    assert first[0].tolist() != first[1].tolist()


def test_a_reward_keeps_the_embeddings_that_were_used_last_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    text_features = tiny_reward().text_features
    encoded: list[str] = []
    tokenise = text_features.tokenise
    monkeypatch.setattr(text_features, "tokenise", lambda prompts: encoded.extend(prompts) or tokenise(prompts))
    monkeypatch.setattr(clip, "EMBEDDINGS", 2)
    first = text_features(["a dog", "a cat", "a bird"])
    assert encoded == ["a dog", "a cat", "a bird"]
    assert torch.equal(text_features(["a cat", "a bird", "a cat"]), first[[1, 2, 1]])
    assert torch.equal(text_features(["a dog"]), first[:1])
    assert torch.equal(text_features(["a cat"]), first[1:2])
    assert encoded[3:] == ["a dog", "a cat"]


@pytest.mark.parametrize("make", [tiny_reward, partial(load_reward, "builtin")])
def test_the_embedding_of_a_prompt_has_the_same_bits_whatever_it_was_embedded_with(make: Callable[[], Any]) -> None:
    prompts = ["a red circle moving left", "a dog", "a blue star growing", "a green square"]
    together = make().text_features(prompts)
    for size in (1, 2, 3):
        reward = make()
        apart = [reward.text_features(prompts[first : first + size]) for first in range(0, 4, size)]
        assert torch.equal(torch.cat(apart), together)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_do_not_change_scores_nor_gradients(reward: ClipReward, chunk: int) -> None:
    frames = torch.rand(3, 4, 3, 16, 16, requires_grad=True)
    chunked = ClipReward(reward.clip, reward.tokenise, reward.preprocess, chunk)
    sizes: list[int] = []
    hook = reward.clip.visual.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    scores = chunked(frames, PROMPTS)
    hook.remove()
    assert max(sizes) == min(chunk, 12)
    whole = torch.cat([reward(frames[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, whole, atol=1e-6, rtol=0)
    (a,), (b,) = (torch.autograd.grad(s.square().sum(), frames) for s in (scores, whole))
    torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_gradient_reaches_the_pixels_of_a_frame_through_its_own_score_alone(reward: ClipReward) -> None:
    frames = torch.rand(2, 3, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(frames, PROMPTS[:2])[1, 2], frames)
    assert (gradient[1, 2] != 0).float().mean() > 0.99
    gradient[1, 2] = 0
    assert not gradient.any()
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.clip.training


def test_a_step_along_the_gradient_raises_the_score(reward: ClipReward) -> None:
    frames = torch.full((1, 1, 3, 16, 16), 0.5) + 0.1 * torch.rand(1, 1, 3, 16, 16)
    frames.requires_grad_()
    before = reward(frames, ["a dog"])
    (gradient,) = torch.autograd.grad(before.sum(), frames)
    step = 1e-4
    after = reward(frames.detach() + step * gradient / gradient.norm(), ["a dog"])
    assert float((after - before).detach()) == pytest.approx(step * float(gradient.norm()), rel=0.05)


def test_an_unknown_reward_is_named() -> None:
    with pytest.raises(ValueError, match=r"reward 'hps' does not exist; allowed: builtin, builtin-frames, "):
        load_reward("hps")


@pytest.mark.parametrize(
    "reward",
    [
        {"name": "builtin-frames", "held_out": "builtin-frames"},
        {"mixture": [{"name": "brightness"}, {"name": "builtin"}], "held_out": "builtin"},
    ],
)
def test_the_trained_reward_is_no_held_out_one(reward: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^reward\.held_out = 'builtin.*' is the reward that is trained on, .*=null$"):
        preflight.check(parse_config({"reward": reward}))
    preflight.check(parse_config({"reward": reward | {"held_out": "builtin-heldout"}}))


def test_a_reward_is_the_trained_one_from_wherever_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = parse_config({"reward": {"mixture": [{"name": "brightness"}, {"path": "my.py:f"}]}}).reward
    assert trained.trains_on("custom", "./my.py:f")
    assert trained.trains_on("custom", f"{tmp_path}/my.py:f")
    assert not trained.trains_on("custom", "my.py:g")
    assert not trained.trains_on("compression", None)
