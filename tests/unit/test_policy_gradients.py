"""DDPO and DPOK, each held to an independent calculation."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TwoParameters, clips, flat_gradient, make, parameters
from torch import Tensor

from rlvid.algorithms import advantages
from rlvid.algorithms.advantages import PromptStatistics, rounding_of, standardised
from rlvid.algorithms.base import Batch
from rlvid.algorithms.rollout import clip_range, replay, roll_out, roll_out_and_score
from rlvid.algorithms.scoring import score
from rlvid.diffusion.chain import denoise
from rlvid.models.noise_path import Prediction


def test_a_rollout_is_the_chain_and_its_probability_that_of_a_normal() -> None:
    method = make({"name": "ddpo"}, sampling={"steps": 4, "final_level": "paper"})
    batch, context = clips(method), method.context
    rollout = roll_out(context, batch)
    assert len(rollout) == 3, "the last step of four adds no noise"
    with torch.no_grad():
        latents = denoise(
            context.model, context.normal("start", batch), batch.text_BLD, context.grid, guidance=3.0, eta=1.0,
            noise=lambda index: context.normal("ddim", batch, index), final="paper",
        )  # fmt: skip
    assert torch.equal(rollout.latents_BCFhw, latents)
    grid, abar = context.model.path.grid(4), context.model.path.abar.double()
    for place in range(3):
        now, then = abar[grid[place]], abar[grid[place + 1]]
        spread = ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        taken = rollout.at(torch.full((4,), place))
        with torch.no_grad():
            prediction = context.model.predict(taken.before_BCFhw, grid[place], batch.text_BLD, 3.0)
        mean = then.sqrt() * prediction.x0.double() + (1 - then - spread**2).sqrt() * prediction.eps.double()
        after = taken.after_BCFhw.double()
        expected = torch.distributions.Normal(mean, spread).log_prob(after).flatten(1).mean(1)
        torch.testing.assert_close(rollout.log_probability_TB[place].double(), expected, atol=2e-5, rtol=0)


def test_the_ratio_is_one_before_the_first_step() -> None:
    method = make({"name": "ddpo"})
    rollout = roll_out(method.context, clips(method))
    for index_B in method.order(rollout.batch, 0):
        taken = rollout.at(index_B)
        now_B = replay(method.context, taken).log_probability_B
        assert torch.equal(taken.log_probability_B, rollout.log_probability_TB[index_B, torch.arange(4)])
        assert ((now_B - taken.log_probability_B).exp() - 1).abs().max() < 2e-6
    _, updates = flat_gradient(method, clips(method))
    assert updates[0].metrics["policy/first_ratio_error"][0] < 1e-5


def test_the_policy_gradient_of_two_parameters_is_the_analytic_one() -> None:
    method = make({"name": "ddpo", "timestep_fraction": 1.0}, train={"batch_size": 4, "checkpoint_activations": False})
    policy = method.context.model = TwoParameters(method.context.model)
    batch = clips(method)
    rollout, advantage_B = roll_out(method.context, batch), torch.tensor([1.0, -2.0, 0.5, 3.0])
    grid, abar = policy.path.grid(4), policy.path.abar.double()
    for place in range(3):
        loss, _ = method.loss(rollout, advantage_B, torch.full((4,), place))
        got = torch.autograd.grad(loss, [policy.a, policy.b])
        now, then = abar[grid[place]], abar[grid[place + 1]]
        variance = (1 - then) / (1 - now) * (1 - now / then)
        along_a, along_b = then.sqrt(), (1 - then - variance).sqrt()
        after = rollout.at(torch.full((4,), place)).after_BCFhw.double()
        away_B = (after - 0.3 * along_a + 0.2 * along_b).flatten(1).mean(1) / variance
        for value, along in zip(got, (along_a, along_b), strict=True):
            assert float(value) == pytest.approx(float(-(advantage_B * away_B * along).mean()), rel=1e-3)


def test_the_clipped_objective_has_no_gradient_beyond_the_range() -> None:
    method = make({"name": "ddpo", "clip_range": 0.1})
    rollout = roll_out(method.context, clips(method))
    index_B, advantage_B = torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 1.0, -1.0, -1.0])
    # Pretend that the old policy was this much less, or more, likely to go where it went.
    moved = rollout.log_probability_TB.clone()
    moved[0] -= torch.tensor([0.2, -0.2, 0.2, -0.2])
    loss, metrics = method.loss(replace(rollout, log_probability_TB=moved), advantage_B, index_B)
    up, down = math.exp(0.2), math.exp(-0.2)
    assert float(loss.detach()) == pytest.approx((-1.1 - down + up + 0.9) / 4, abs=1e-4)
    assert metrics["policy/clip_fraction"] == (4.0, 4.0)
    assert metrics["policy/approx_kl"][0] == pytest.approx(4 * 0.02, rel=1e-3)
    assert metrics["policy/ratio_error"][0] == pytest.approx(2 * (up - 1) + 2 * (1 - down), rel=1e-3)
    _, still = method.loss(rollout, advantage_B, index_B)
    assert still["policy/clip_fraction"] == (0.0, 4.0)
    assert still["policy/advantage"] == (4.0, 4.0)


def test_a_relative_clip_range_is_in_units_of_the_spread() -> None:
    absolute, relative = (
        make({"name": "ddpo", "clip_range": 0.5}),
        make({"name": "dpok", "clip_range": 0.5, "clip_relative": True}),
    )
    assert clip_range(absolute.context, absolute.method) == 0.5
    elements = math.prod(relative.context.model.latent_shape)
    assert clip_range(relative.context, relative.method) == pytest.approx(0.5 / math.sqrt(elements))


def test_advantages_use_a_prompts_own_statistics_once_there_are_enough() -> None:
    statistics = PromptStatistics(buffer=3, min_count=2)
    first = statistics.advantages(["a", "b", "b"], [1.0, 2.0, 6.0], 5.0)
    mean, deviation = 3.0, math.sqrt(14 / 3)
    assert first.tolist() == pytest.approx([(1 - mean) / deviation, -1, 1], rel=1e-4)
    again = PromptStatistics(buffer=3, min_count=2)
    again.load_state_dict(statistics.state_dict())
    for each in (statistics, again):
        result = each.advantages(["b", "b", "a", "a"], [10.0, math.nan, 1.0, 1.0], 0.7)
        assert result.tolist() == pytest.approx([0.7, 0.0, 0.0, 0.0])  # b: mean of 2, 6, 10; clipped to the limit
        assert each.state_dict() == {"a": [1.0, 1.0, 1.0], "b": [2.0, 6.0, 10.0]}
        each.advantages(["b"], [4.0], 5.0)
        assert each.state_dict()["b"] == [6.0, 10.0, 4.0], "the oldest of three went"


def test_the_prompts_that_were_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advantages, "PROMPTS", 2)
    statistics = PromptStatistics(buffer=3, min_count=2)
    statistics.advantages(["a", "b"], [1.0, 2.0], 5.0)
    statistics.advantages(["a"], [3.0], 5.0)
    assert [*statistics.state_dict()] == ["b", "a"]
    again = PromptStatistics(buffer=3, min_count=2)
    again.load_state_dict(statistics.state_dict())
    for each in (statistics, again):
        wanted = [(4 - 8 / 3) / math.sqrt(14 / 9), 0.0]  # a: among 1, 3, 4; c: among the batch, 4 and 4
        assert each.advantages(["a", "c"], [4.0, 4.0], 5.0).tolist() == pytest.approx(wanted, rel=1e-4)
        assert each.state_dict() == {"a": [1.0, 3.0, 4.0], "c": [4.0]}, "b was used longest ago"
        many = each.advantages(["d", "e", "f"], [1.0, 2.0, 3.0], 5.0)
        assert many.tolist() == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)], rel=1e-4)
        assert [*each.state_dict()] == ["e", "f"], "more prompts than are kept, in one batch"


ULP = 2.0**-19  # of a float32 between 16 and 32
SAME = [21.3, 21.3 + ULP, 21.3 - ULP, 21.3 + 2 * ULP]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, -1.0, 1e6, 1e30])
def test_rewards_that_differ_by_rounding_have_no_advantage(scale: float) -> None:
    statistics = PromptStatistics(buffer=8, min_count=4)
    rewards = [scale * reward for reward in SAME]
    assert statistics.advantages(["a", "b", "a", "b"], rewards, 5.0).tolist() == [0.0] * 4, "over the batch"
    assert statistics.advantages(["a", "b", "a", "b"], rewards, 5.0).tolist() == [0.0] * 4, "over a prompt's own"
    assert standardised(torch.tensor(rewards), torch.tensor([0.1] * 7, dtype=torch.float64)).tolist() == [0.0] * 4


def test_rewards_that_differ_by_more_than_rounding_are_told_apart() -> None:
    apart = torch.tensor([21.3, 21.301, 21.299, 21.3], dtype=torch.float64)
    one = 0.001 / (0.001 / math.sqrt(2) + 1e-6)
    assert standardised(apart, apart).tolist() == pytest.approx([0, one, -one, 0], rel=1e-6, abs=1e-9)
    # Neighbours in bfloat16 are far apart in float32.
    neighbours = torch.tensor([21.25, 21.375], dtype=torch.float64)
    assert standardised(neighbours, neighbours).abs().min() > 0.9
    assert not standardised(neighbours, neighbours, rounding_of(torch.bfloat16)).any()
    assert rounding_of(torch.float64) == rounding_of(torch.float32) == 2.0**-19
    assert rounding_of(torch.float32, torch.float16) == 2.0**-11
    around_zero = PromptStatistics(4, 4).advantages(["a"] * 3, [0.0, 1.0, math.nan], 5.0)
    assert around_zero.tolist() == pytest.approx([-1, 1, 0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_reward_moves_no_weight(dtype: torch.dtype) -> None:
    method = make({"name": "ddpo"})
    method.context.reward = lambda frames, prompts: torch.full(frames.shape[:2], 123.4, dtype=dtype)
    gradient, updates = flat_gradient(method, clips(method))
    assert not gradient.any()
    assert updates[0].metrics["policy/advantage"][0] == 0
    assert updates[0].samples.reward_B.unique().tolist() == [float(torch.tensor(123.4, dtype=dtype))]


def test_scores_of_a_coarse_type_are_compared_as_such() -> None:
    method = make({"name": "ddpo"})
    apart = torch.tensor([21.25, 21.375, 21.25, 21.375])
    for dtype, learns in ((torch.float32, True), (torch.bfloat16, False)):
        method.context.reward = lambda frames, prompts, dtype=dtype: apart.to(dtype)
        gradient, _ = flat_gradient(method, clips(method))
        assert bool(gradient.any()) == learns
        for parameter in parameters(method):
            parameter.grad = None
    method = make({"name": "ddpo"}, reward={"precision": "bfloat16"})
    method.context.reward = lambda frames, prompts: apart
    assert not flat_gradient(method, clips(method))[0].any()


def test_a_reward_without_end_takes_no_part_in_the_statistics() -> None:
    method = make({"name": "ddpo", "min_count": 2})
    batch = clips(method)
    scored = score(method.context, batch, batch.latents_BCFhw)
    scored = replace(scored, reward_B=torch.tensor([1.0, math.inf, math.nan, 3.0]))
    assert method.advantages(batch, [scored]).tolist() == pytest.approx([-1, 0, 0, 1], rel=1e-5)
    assert method.state_dict() == {"rewards": {batch.prompts[0]: [1.0, 3.0]}}


def test_dpoks_distance_is_nothing_at_the_start_and_has_the_gradient_of_finite_differences() -> None:
    start = make({"name": "dpok"}, random=False)
    _, updates = flat_gradient(start, clips(start))
    assert updates[0].metrics["policy/kl"][0] == 0

    method = make({"name": "dpok", "kl": 1.0, "reward_weight": 1e-12})
    model = method.context.model
    for part in (model.denoiser, model.vae, model.text_encoder):
        part.double()
    batch = clips(method)
    batch = Batch(2, batch.serials, batch.prompts, batch.text_BLD.double(), batch.latents_BCFhw.double())
    rollout = roll_out(method.context, batch)
    scored = score(method.context, batch, rollout.latents_BCFhw.float().double())
    method.build(batch)
    taken = rollout.at(torch.tensor([0, 1, 2, 0]))
    gradient = torch.autograd.grad(method.loss(scored, taken)[0], parameters(method))
    generator, h = torch.Generator().manual_seed(0), 1e-4
    ways = [torch.randn(p.shape, generator=generator) for p in parameters(method)]
    values = {}
    for sign in (1, -1):
        with torch.no_grad():
            for p, way in zip(parameters(method), ways, strict=True):
                p += sign * h * way
            values[sign] = float(method.loss(scored, taken)[0])
            for p, way in zip(parameters(method), ways, strict=True):
                p -= sign * h * way
    slope = (values[1] - values[-1]) / (2 * h)
    assert slope == pytest.approx(float(sum((g * w).sum() for g, w in zip(gradient, ways, strict=True))), rel=1e-3)


def test_dpoks_value_network_learns_the_reward_and_survives_a_checkpoint() -> None:
    method = make({"name": "dpok", "value_steps": 60, "value_lr": 1e-2})
    batch = clips(method)
    list(method.updates(batch))
    rollout = roll_out(method.context, batch)
    scored = score(method.context, batch, rollout.latents_BCFhw)
    taken = rollout.at(torch.tensor([0, 1, 2, 0]))
    value_B = method.values(taken)
    assert (value_B - scored.reward_B).abs().max() < 0.5 * scored.reward_B.abs().max()
    other = make({"name": "dpok", "value_steps": 60, "value_lr": 1e-2})
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    other.build(batch)
    assert torch.equal(other.values(taken), value_B)
    errors = [each.fit_value(batch, [rollout], [scored], 7) for each in (method, other)]
    assert errors[0] == errors[1]
    assert torch.equal(other.values(taken), method.values(taken)), "the optimiser's state differs"


class Apart(TwoParameters):
    """Two numbers, and a base model that says otherwise."""

    away = False

    @contextmanager
    def base(self) -> Iterator[None]:
        self.away = True
        yield
        self.away = False

    def predict(self, x: Tensor, t: Any, text: Tensor, guidance: float, **_: Any) -> Prediction:
        return Prediction(x, torch.full_like(x, 0.1)) if self.away else super().predict(x, t, text, guidance)


def test_dpoks_loss_is_the_advantage_over_v_and_a_penalty_by_hand() -> None:
    method = make({"name": "dpok", "reward_weight": 2.0, "kl": 5.0}, train={"checkpoint_activations": False})
    policy = method.context.model = Apart(method.context.model)
    batch = clips(method)
    rollout = roll_out(method.context, batch)
    method.build(batch)
    for parameter in method.value.parameters():
        parameter.data.zero_()
    method.value.judge[-1].bias.data.fill_(0.7)  # V of every video
    reward_B, valid_B = torch.tensor([1.7, 0.2, 9.0, 3.7]), torch.tensor([True, True, False, True])
    scored = replace(score(method.context, batch, rollout.latents_BCFhw), reward_B=reward_B * valid_B, valid_B=valid_B)
    advantage_B = torch.tensor([1.0, -0.5, 0.0, 3.0])
    loss, metrics = method.loss(scored, rollout.at(torch.full((4,), 1)))
    distance = (-0.2 - 0.1) ** 2
    assert float(loss.detach()) == pytest.approx(-2 * 3.5 / 4 + 5 * distance, rel=1e-4)
    assert metrics["policy/kl"] == pytest.approx((distance, 1.0), rel=1e-5)
    assert metrics["policy/advantage"] == pytest.approx((4.5, 4.0), rel=1e-5)
    got = torch.autograd.grad(loss, [policy.a, policy.b])
    taken = rollout.at(torch.full((4,), 1))
    moved = replace(taken, log_probability_B=taken.log_probability_B + torch.tensor([0.2, -0.2, 0.0, 0.2]))
    assert [method.loss(scored, each)[1]["policy/clip_fraction"][0] for each in (taken, moved)] == [0.0, 3.0]
    reach = clip_range(method.context, method.method)
    gain = 1 * (1 - reach) - 0.5 * (1 + reach) + 3 * (1 - reach)
    clamped = float(method.loss(scored, moved)[0].detach())
    assert clamped == pytest.approx(-2 * gain / 4 + 5 * distance, rel=1e-4)
    grid, abar = policy.path.grid(4), policy.path.abar.double()
    now, then = abar[grid[1]], abar[grid[2]]
    variance = (1 - then) / (1 - now) * (1 - now / then)
    along_a, along_b = then.sqrt(), (1 - then - variance).sqrt()
    away_B = (taken.after_BCFhw.double() - 0.3 * along_a + 0.2 * along_b).flatten(1).mean(1) / variance
    assert float(got[0]) == pytest.approx(float(-2 * (advantage_B * away_B * along_a).mean()), rel=1e-3)
    pull = 5 * 2 * (-0.2 - 0.1)  # towards the base
    assert float(got[1]) == pytest.approx(float(-2 * (advantage_B * away_B * along_b).mean()) + pull, rel=1e-3)


@pytest.mark.parametrize("ruined", ["reward", "latents"])
def test_an_overflow_does_not_ruin_the_value_network(ruined: str) -> None:
    method = make({"name": "dpok"})
    batch = clips(method)
    rollout = roll_out(method.context, batch)
    scored = score(method.context, batch, rollout.latents_BCFhw)
    method.build(batch)
    if ruined == "reward":  # the frames were not finite, so the score counts as sound
        scored = replace(scored, reward_B=torch.tensor([1.0, math.nan, 1.0, 1.0]))
    else:
        for state in rollout.states[1].values():
            state.fill_(math.inf)
    method.fit_value(batch, [rollout], [scored], 0)
    assert all(parameter.isfinite().all() for parameter in method.value.parameters())


@pytest.mark.parametrize("name", ["ddpo", "dpok"])
def test_the_losses_of_a_step_add_up_to_the_mean_over_the_workers_videos(name: str) -> None:
    """At a ratio of one, minus the mean advantage; for DPOK times its weight."""
    more = {"reward_weight": 2.0, "kl": 0.0, "policy_steps": 2} if name == "dpok" else {}
    method = make({"name": name} | more, train={"batch_size": 4, "micro_batch": 2, "checkpoint_activations": False})
    method.context.model = TwoParameters(method.context.model)
    batch = clips(method)
    rollouts, scores = roll_out_and_score(method.context, batch)
    if name == "ddpo":
        updates = list(method.train(rollouts, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])], 4))
        expected = [-11 / 4]
        method.method = method.method.model_copy(update={"timestep_fraction": 0.01})
        assert len(list(method.train(rollouts, [torch.ones(2)] * 2, 4))) == 2, "at least one step of each video"
        method.method = method.method.model_copy(update={"timestep_fraction": 0.67})
        assert len(list(method.train(rollouts, [torch.ones(2)] * 2, 4))) == 4, "two steps of three"
    else:
        method.build(batch)
        for parameter in method.value.parameters():
            parameter.data.zero_()
        rewards = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
        scores = [replace(each, reward_B=reward_B) for each, reward_B in zip(scores, rewards, strict=True)]
        updates, expected = list(method.train(rollouts, scores, 4, error=0.25)), [-2 * 11 / 4] * 2
        assert {update.metrics["policy/value_error"] for update in updates} == {(0.25, 1.0)}
    totals, total = [], 0.0
    for update in updates:
        total += float(update.loss.detach())
        if update.step:
            totals, total = [*totals, total], 0.0
    assert totals == pytest.approx(expected, rel=1e-4)
