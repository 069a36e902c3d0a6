"""Losses and models of fitted rewards: formulas, gradients, and what the models see."""

import math

import pytest
import torch
from torch import Tensor, nn

from rlvid.reward.clip import ClipReward
from rlvid.reward.fit.loss import contrastive_loss, preference_loss
from rlvid.reward.fit.models import (
    Backbone,
    ImageScorer,
    MotionEnergy,
    TemporalHead,
    VideoScorer,
    choose_layers,
    patch_width,
    positions,
)
from rlvid.toy.tiny import tiny_reward

PROMPTS = ["a red circle moving left", "a dog"]


def backbone(grid: int = 0, **settings: int | bool) -> tuple[Backbone, Tensor]:
    """A tiny CLIP in float64, and the tokens of two prompts."""
    reward = tiny_reward()
    clip = reward.clip.requires_grad_(True).double()
    return Backbone(clip, reward.preprocess, grid=grid, **settings), reward.tokenise(PROMPTS)


def videos(frames: int, seed: int = 0) -> Tensor:
    """Two videos in (0.1, 0.9), where no clamp takes the gradient."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.8 * torch.rand((2, frames, 3, 16, 16), generator=generator, dtype=torch.float64)


def scorer(kind: str, **settings: int | bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(5)
    made, tokens_BL = backbone(0 if kind == "image" else 2, **settings)
    if kind == "image":
        return ImageScorer(made), tokens_BL
    head = TemporalHead(made.width, 16, 2, patch=patch_width(made.clip), motion=4, width=16)
    return VideoScorer(made, speaking(head)).double(), tokens_BL


def speaking(head: TemporalHead) -> TemporalHead:
    """A head that is not 0, as it is at first."""
    nn.init.normal_(head.out)
    return head


def test_the_loss_is_the_cross_entropy_of_bradley_and_terry() -> None:
    generator = torch.Generator().manual_seed(0)
    difference_PA, preference_PA = torch.randn(6, 2, generator=generator), torch.rand(6, 2, generator=generator)
    expected = (
        -preference_PA * torch.sigmoid(difference_PA).log() - (1 - preference_PA) * torch.sigmoid(-difference_PA).log()
    )
    torch.testing.assert_close(preference_loss(difference_PA, preference_PA), expected)
    scores_P2 = torch.randn(6, 2, generator=generator)
    hard = preference_loss((scores_P2[:, 0] - scores_P2[:, 1])[:, None], torch.ones(6, 1))[:, 0]
    softmax = nn.functional.cross_entropy(scores_P2, torch.zeros(6, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(hard, softmax, msg="HPSv2's objective")


def test_the_loss_is_least_at_the_odds_and_ignores_what_was_not_asked() -> None:
    p = 0.7
    difference_PA = torch.tensor([[math.log(p / (1 - p)), 3.0]], dtype=torch.float64, requires_grad=True)
    loss_PA = preference_loss(difference_PA, torch.tensor([[p, math.nan]], dtype=torch.float64))
    (gradient_PA,) = torch.autograd.grad(loss_PA.sum(), difference_PA)
    assert gradient_PA.abs().max() < 1e-12
    assert loss_PA[0, 1] == 0


def test_the_contrastive_loss_is_clips_without_equal_prompts_as_negatives() -> None:
    logits_NN = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = contrastive_loss(logits_NN, torch.tensor([0, 1, 2]))
    rows, columns = (each.diagonal() - each.logsumexp(1) for each in (logits_NN, logits_NN.T))
    torch.testing.assert_close(found, -(rows + columns) / 2)
    twice = contrastive_loss(logits_NN, torch.tensor([0, 1, 0]))
    kept = logits_NN[0, :2]
    column = logits_NN[:2, 0]
    expected = -(2 * logits_NN[0, 0] - kept.logsumexp(0) - column.logsumexp(0)) / 2
    torch.testing.assert_close(twice[0], expected)


def test_an_image_scorer_is_the_scaled_cosine_of_the_reward() -> None:
    model, tokens_BL = scorer("image")
    reward: ClipReward = tiny_reward().double()
    frames = videos(3)
    expected_B = reward(frames, PROMPTS).mean(1) * reward.clip.logit_scale.exp()
    torch.testing.assert_close(model(frames, tokens_BL)[:, 0], expected_B)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("settings", [{}, {"chunk": 3, "recompute": True}])
def test_scores_have_gradients_in_pixels_and_weights(kind: str, settings: dict[str, int | bool]) -> None:
    model, tokens_BL = scorer(kind, **settings)
    frames = videos(4).requires_grad_()
    direction = torch.randn(frames.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    score = model(frames, tokens_BL).sum()
    gradient = torch.autograd.grad(score, [frames, *model.parameters()], allow_unused=True)
    pixels = gradient[0]
    with torch.no_grad():
        moved = [float(model(frames + step * direction, tokens_BL).sum()) for step in (1e-5, -1e-5)]
    assert float((pixels * direction).sum()) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5)
    assert all(each is not None for each in gradient)


def test_a_video_scorer_takes_any_number_of_frames_and_sees_order_place_and_prompt() -> None:
    model, tokens_BL = scorer("video")
    for frames in (1, 4, 8, 16):
        assert model(videos(frames), tokens_BL).shape == (2, 2)
    some = videos(8)
    score_BA = model(some, tokens_BL)
    assert (model(some.flip(1), tokens_BL) - score_BA).abs().min() > 1e-4, "the order of frames"
    assert (model(some, tokens_BL.flip(0)) - score_BA).abs().min() > 1e-4, "the prompt"
    assert (model(some.flip(4), tokens_BL) - score_BA).abs().min() > 1e-4, "left and right"
    torch.testing.assert_close(model(some[:1], tokens_BL[:1]), score_BA[:1])


def test_a_video_scorer_begins_as_the_scorer_of_its_frames() -> None:
    model, tokens_BL = scorer("video")
    model.head.out.data.zero_()
    score_BA = model(videos(4), tokens_BL)
    image, _ = scorer("image")
    torch.testing.assert_close(score_BA, image(videos(4), tokens_BL).expand(-1, 2))


def test_the_energy_of_motion_is_the_mean_square_of_differences_in_time() -> None:
    torch.manual_seed(0)
    energy = MotionEnergy(12, 3, 2, 8).double()
    energy.norm, energy.say = nn.Identity(), nn.Identity()
    frame_BFN = torch.randn(2, 5, 20, dtype=torch.float64)
    found = energy(frame_BFN)
    x = energy.channel(frame_BFN[..., 8:].reshape(2, 5, 4, 3)).detach()
    for t in range(5):
        before, after = x[:, max(t - 1, 0)], x[:, min(t + 1, 4)]
        first, second = (after - before) / 2, after - 2 * x[:, t] + before
        expected = torch.cat([(each**2).mean(1) + 1e-4 for each in (first, second)], 1).log()
        torch.testing.assert_close(found[:, t], expected)
    still = energy(frame_BFN[:, :1])
    torch.testing.assert_close(still, torch.full_like(still, math.log(1e-4)), msg="one frame does not move")


def test_positions_are_those_of_the_paper() -> None:
    found = positions(5, 8)
    for place in range(5):
        for index in range(4):
            angle = place / 10_000 ** (2 * index / 8)
            assert found[place, index] == pytest.approx(math.sin(angle), abs=1e-6)
            assert found[place, 4 + index] == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_last_layers_alone_are_fitted() -> None:
    clip = tiny_reward().clip  # one block in each tower: two groups
    for layers, some in ((0, set()), (1, {"logit_scale", "text_projection", "visual.proj"})):
        choose_layers(clip, layers)
        assert {name for name, each in clip.named_parameters() if each.requires_grad} == some
    choose_layers(clip, 2)
    fitted = {name for name, each in clip.named_parameters() if each.requires_grad}
    assert {name.split(".")[0] for name in fitted} == {
        "logit_scale", "text_projection", "visual", "transformer", "ln_final",
    }  # fmt: skip
    assert not {"visual.conv1.weight", "token_embedding.weight", "visual.positional_embedding"} & fitted
    choose_layers(clip, 2, image=False)
    assert fitted - {name for name, each in clip.named_parameters() if each.requires_grad} == {
        name for name in fitted if name.startswith("visual.")
    }
    choose_layers(clip, None)
    assert all(each.requires_grad for each in clip.parameters())
    choose_layers(clip, None, image=False)
    assert {name for name, each in clip.named_parameters() if not each.requires_grad} == {
        name for name, _ in clip.named_parameters() if name.startswith("visual.")
    }
    with pytest.raises(ValueError, match=r"layers = 3: .* allowed: 0 to 2"):
        choose_layers(clip, 3)
