"""What all methods do with what they generated: failing rewards, frames that are not finite, what is kept."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import Listener, TwoParameters, clips, make
from torch import Tensor

from rlvid.algorithms.scoring import all_rewards, score


def test_a_video_is_left_out_for_one_score_that_is_not_finite_and_the_observer_hears_of_it() -> None:
    method = make({"name": "ddpo"})
    batch, context = clips(method), method.context
    context.observer, scores = Listener(), torch.ones(4, 2)
    scores[1, 0] = math.inf
    context.reward = lambda frames, prompts: scores
    scored = score(context, batch, batch.latents_BCFhw)
    assert scored.valid_B.tolist() == [True, False, True, True]
    assert scored.metrics["reward/excluded"] == (1.0, 1.0)
    assert scored.samples.scores_BS[1].isnan().all()
    assert [line.partition(" gave ")[2] for line in context.observer.lines] == [
        "NaN or infinity for 1 of 4 videos, which are left out"
    ]
    context.reward = lambda frames, prompts: 1 / 0
    assert not score(context, batch, batch.latents_BCFhw).valid_B.any()
    assert "ZeroDivisionError" in context.observer.lines[1]
    assert context.observer.lines[1].endswith("; 4 videos are left out")


def test_a_sample_whose_clip_was_lost_gets_no_reward_and_moves_nothing() -> None:
    method = make({"name": "draft"})
    batch, context = clips(method), method.context
    context.observer, context.held_out = Listener(), lambda frames, prompts: frames.mean((2, 3, 4))
    context.reward = lambda frames, prompts: frames.square().mean((2, 3, 4)) + 1
    latents = batch.latents_BCFhw.clone().requires_grad_()
    whole = score(context, batch, latents)
    scored = score(context, replace(batch, lost=frozenset({batch.serials[2]})), latents)
    assert scored.valid_B.tolist() == [True, True, False, True]
    assert scored.metrics["reward/excluded"] == (1.0, 1.0)
    assert scored.reward_B[2] == 0
    assert scored.samples.reward_B.isnan().tolist() == scored.samples.held_out_B.isnan().tolist() == [0, 0, 1, 0]
    others = [0, 1, 3]
    assert torch.equal(scored.reward_B[others], whole.reward_B[others])
    (gradient,) = torch.autograd.grad(scored.reward_B.sum(), latents)
    assert gradient.flatten(1).any(1).tolist() == [True, True, False, True]
    assert not context.observer.lines, "the reward is not to blame"
    for part, valid in zip(
        replace(batch, lost=frozenset({batch.serials[2]})).split(2), ([True, True], [False, True]), strict=True
    ):
        assert score(context, part, part.latents_BCFhw).valid_B.tolist() == valid


def test_frames_that_are_not_finite_are_no_fault_of_the_reward() -> None:
    method = make({"name": "ddpo"})
    batch, context = clips(method), method.context
    context.observer = Listener()
    context.reward = lambda frames, prompts: frames.mean((2, 3, 4))
    latents = batch.latents_BCFhw.clone()
    latents[2, :, :2] = math.inf  # of the first segment alone
    scored = score(context, batch, latents)
    assert scored.valid_B.all()
    assert scored.reward_B.isfinite().tolist() == [True, True, False, True]
    assert not context.observer.lines


class Whole:
    """A reward of whole videos, in a coarse type."""

    whole_video = True

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return frames.mean((1, 2, 3, 4)).bfloat16()


def test_what_is_kept_of_a_batch_has_no_graph_and_is_float32() -> None:
    method = make({"name": "draft"})
    batch, context = clips(method), method.context
    context.held_out = Whole()
    latents = batch.latents_BCFhw.clone().requires_grad_()
    scored = score(context, batch, latents)
    assert scored.reward_B.requires_grad
    context.held_out, context.reward = None, Whole()
    coarse = score(context, batch, latents)
    for samples in (scored.samples, coarse.samples):
        kept = [samples.frames_BSCHW, samples.scores_BS, samples.reward_B]
        kept += [] if samples.held_out_B is None else [samples.held_out_B]
        assert not any(tensor.requires_grad for tensor in kept)
        assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert [coarse.metrics[f"frames/weight_{place}"] for place in range(4)] == [(1.0, 4.0)] * 4


def test_the_rounding_of_a_batch_is_that_of_its_coarsest_rewards() -> None:
    method = make({"name": "ddpo"})
    batch = clips(method)
    parts = list(batch.split(2))
    scores = [score(method.context, part, part.latents_BCFhw) for part in parts]
    scores = [replace(each, rounding=rounding) for each, rounding in zip(scores, (2.0**-19, 2.0**-8), strict=True)]
    prompts, rewards, rounding = all_rewards(method.context.workers, batch, scores)
    assert prompts == batch.prompts
    assert rewards == pytest.approx([*scores[0].reward_B.tolist(), *scores[1].reward_B.tolist()])
    assert rounding == 2.0**-8


@pytest.mark.parametrize("name", ["draft", "ddpo", "dpok", "rwr"])
def test_what_saves_memory_is_asked_of_the_denoiser_as_the_run_says(name: str) -> None:
    told = []

    class Asked(TwoParameters):
        def predict(self, *inputs: object, **how: bool) -> object:
            if torch.is_grad_enabled():
                told.append((how.get("recompute", True), how.get("unconditional_gradient", True)))
            return super().predict(*inputs, **how)

    more = {"unconditional_gradient": False} if name == "draft" else {}
    method = make({"name": name} | more, train={"batch_size": 4, "checkpoint_activations": False})
    method.context.model = Asked(method.context.model)
    for update in method.updates(clips(method)):
        assert update.loss.requires_grad
    assert set(told) == {(False, name != "draft")}
