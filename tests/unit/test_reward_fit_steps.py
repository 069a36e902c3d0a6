"""Steps of a fit: groups for any number of workers, the optimiser's sums, resuming, and what is learned."""

import copy

import pytest
import torch

from rlvid.reward.fit.loss import contrastive_loss, preference_loss
from rlvid.reward.fit.models import Backbone, ImageScorer, TemporalHead, VideoScorer
from rlvid.reward.fit.optimise import Fitter, Objective, Pairs, Schedule, draw_frames, group_loss, groups, scores
from rlvid.reward.preprocess import Preprocess
from rlvid.toy.tiny import tiny_reward

BATCH, GROUP, FRAMES = 16, 4, 4
CAPTIONS = ["a red circle", "a dog", "a blue star", "a cow"]


def scorer(kind: str, dtype: torch.dtype = torch.float32) -> ImageScorer | VideoScorer:
    reward = tiny_reward()
    torch.manual_seed(1)
    backbone = Backbone(reward.clip.requires_grad_(True), Preprocess(16), grid=0 if kind == "image" else 2)
    made = (
        ImageScorer(backbone)
        if kind == "image"
        else VideoScorer(backbone, TemporalHead(backbone.width, 16, 2, width=16))
    )
    return made.to(dtype)


def pairs(step: int = 0, axes: int = 1, brighter: bool = False) -> Pairs:
    """Random videos; with ``brighter`` the brighter one of each pair is preferred."""
    generator = torch.Generator().manual_seed(step)
    shape = (BATCH, FRAMES, 3, 16, 16)
    a, b = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in "ab")
    preference_PA = torch.rand((BATCH, axes), generator=generator)
    if brighter:
        a, b = (each // 2 for each in (a, b))
        first_P = torch.arange(BATCH) % 3 == 0
        a[first_P] += 100
        b[~first_P] += 100
        preference_PA = first_P.float()[:, None].expand(-1, axes).clone()
    tokens_PL = tiny_reward().tokenise([CAPTIONS[place % 4] for place in range(BATCH)])
    return Pairs(range(step * BATCH, (step + 1) * BATCH), tokens_PL, a, b, preference_PA)


def fitter(
    kind: str = "image", objective: Objective | None = None, steps: int = 40, dtype: torch.dtype = torch.float32
) -> Fitter:
    made = scorer(kind, dtype)
    schedule = Schedule(3e-3, 5, steps)
    return Fitter(made, objective or Objective(), schedule, batch_size=BATCH, group=GROUP)


def test_groups_are_the_same_for_any_number_of_workers() -> None:
    whole = {tuple(each.serials) for each in groups(pairs(3), BATCH, GROUP)}
    assert sorted(serial for group in whole for serial in group) == [*range(3 * BATCH, 4 * BATCH)]
    assert all(len(group) == GROUP for group in whole)
    for workers in (2, 4):
        found = [
            tuple(each.serials)
            for rank in range(workers)
            for each in groups(pairs(3).take(range(rank, BATCH, workers)), BATCH, GROUP)
        ]
        assert set(found) == whole
        assert len(found) == len(whole)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_any_number_of_workers_takes_the_same_steps(kind: str) -> None:
    objective = Objective(contrastive=0.3)
    alone, shared = fitter(kind, objective), fitter(kind, objective)
    for step in range(3):
        batch = pairs(step, 1 if kind == "image" else 2)
        alone.apply(step, alone.gradient(batch))
        parts = [shared.gradient(batch.take(range(rank, BATCH, 4))) for rank in range(4)]
        shared.apply(step, sum(parts[1:], parts[0]))
    for name, parameter in alone.parameters.items():
        torch.testing.assert_close(shared.parameters[name], parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_gradient_is_that_of_the_mean_loss(kind: str) -> None:
    made, batch = fitter(kind, Objective(frames=None), dtype=torch.float64), pairs(0, 1 if kind == "image" else 2)
    total = made.gradient(batch)
    model = made.scorer
    a_PA, b_PA = (model(each.double() / 255, batch.tokens_PL) for each in (batch.a, batch.b))
    loss = preference_loss(a_PA - b_PA, batch.preference_PA.double()).mean()  # every axis has votes
    expected = torch.autograd.grad(loss, list(made.parameters.values()), allow_unused=True)
    flat = torch.cat(
        [
            torch.zeros(p.numel()) if g is None else g.flatten()
            for p, g in zip(made.parameters.values(), expected, strict=True)
        ]
    )
    torch.testing.assert_close(total[:-1] / BATCH, flat, rtol=1e-6, atol=1e-10)
    assert float(total[-1] / BATCH) == pytest.approx(float(loss.detach()))


def test_without_votes_the_loss_is_clips_within_groups() -> None:
    made, batch = scorer("image", torch.float64), pairs(0).take(range(GROUP))
    found = group_loss(made, batch, Objective(preferences=0, contrastive=1.0, frames=None))
    backbone = made.backbone
    text_PD, expected = backbone.text(batch.tokens_PL), torch.zeros((), dtype=torch.float64)
    for frames in (batch.a, batch.b):
        image_PD = torch.nn.functional.normalize(backbone(frames.double() / 255)[0].mean(1), dim=-1)
        expected = (
            expected + contrastive_loss(made.backbone.scale * image_PD @ text_PD.T, torch.arange(GROUP)).sum() / 2
        )
    torch.testing.assert_close(found, expected)


def test_both_sides_are_seen_at_the_same_frames_which_depend_on_the_draw_alone() -> None:
    batch = pairs(2)
    numbered = torch.arange(FRAMES, dtype=torch.uint8)[None, :, None, None, None].expand(BATCH, -1, 3, 16, 16)
    batch = Pairs(batch.serials, batch.tokens_PL, numbered, numbered, batch.preference_PA)
    drawn = draw_frames(batch, Objective(frames=2))
    assert torch.equal(drawn.a, drawn.b)
    chosen_PS = drawn.a[:, :, 0, 0, 0]
    assert (chosen_PS[:, 0] < chosen_PS[:, 1]).all()
    assert len({tuple(each) for each in chosen_PS.tolist()}) > 3
    part = draw_frames(batch.take([3, 5]), Objective(frames=2))
    assert torch.equal(part.a, drawn.a[[3, 5]])


def test_a_resumed_fit_is_an_uninterrupted_one() -> None:
    whole, first = fitter("video"), fitter("video")
    for step in range(4):
        whole.apply(step, whole.gradient(pairs(step, 2)))
        if step < 2:
            first.apply(step, first.gradient(pairs(step, 2)))
    second = fitter("video")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in (2, 3):
        second.apply(step, second.gradient(pairs(step, 2)))
    for name in whole.parameters:
        assert torch.equal(second.parameters[name], whole.parameters[name]), name
        assert torch.equal(second.average[name], whole.average[name]), name


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    made = fitter()
    before = {name: each.detach().clone() for name, each in made.parameters.items()}
    total = made.gradient(pairs())
    total[0] = torch.nan
    made.apply(0, total)
    assert all(torch.equal(made.parameters[name], each) for name, each in before.items())


def accuracy(model: ImageScorer | VideoScorer, batch: Pairs) -> float:
    a_PA, b_PA = (scores(model, [(each, batch.tokens_PL)]) for each in (batch.a, batch.b))
    return float(((a_PA > b_PA) == (batch.preference_PA > 0.5)).double().mean())


@pytest.mark.parametrize("kind", ["image", pytest.param("video", marks=pytest.mark.slow)])
def test_preferences_are_learned(kind: str) -> None:
    axes = 1 if kind == "image" else 2
    made = fitter(kind, steps=60)
    losses = []
    for step in range(60):
        batch = pairs(step, axes, brighter=True)
        losses.append(made.apply(step, made.gradient(batch))[0])
    made.use_average()
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert accuracy(made.scorer, pairs(1000, axes, brighter=True)) > 0.9


def test_the_schedule_rises_linearly_and_falls_by_half_a_cosine() -> None:
    schedule = Schedule(2e-3, 100, 400)
    found = [schedule.rate(step) for step in (0, 50, 99, 100, 200, 250, 300, 400)]
    falling = [0.02 + 0.98 * share for share in (1, 0.75, 0.5, 0.25, 0)]  # cosines of 0, 60, 90, 120, 180 degrees
    assert found == pytest.approx([2e-3 * share for share in (0.01, 0.51, 1.0, *falling)])
