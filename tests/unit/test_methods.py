"""The other methods, each held to an independent calculation."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clips, flat_gradient, make, parameters
from torch import Tensor, nn

from rlvid import randomness
from rlvid.algorithms.advantages import PromptStatistics
from rlvid.algorithms.alignprop import draw_cut
from rlvid.algorithms.base import Batch
from rlvid.algorithms.raft import best_of_each, best_share, kept_weights
from rlvid.algorithms.rollout import clip_range, replay, roll_out
from rlvid.algorithms.rwr import exponential_weights
from rlvid.algorithms.scoring import score
from rlvid.algorithms.supervised import trained_rows
from rlvid.config import OptimizerConfig, parse_config
from rlvid.config.methods import AlignPropConfig
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.schedule import timesteps
from rlvid.models.base import Prediction
from rlvid.models.lora import lora_state
from rlvid.reward.clip import load_reward
from rlvid.toy.captions import labels_of, write_caption
from rlvid.toy.render import render, sample_clips
from rlvid.train.engine import TorchEngine

ALL = ["instructvideo", "draft", "draft-lv", "alignprop", "ddpo", "dpok", "rwr", "raft"]


def one_gradient(method: Any, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters(method))])


def close(got: Tensor, expected: Tensor, bound: float = 1e-4) -> None:
    assert expected.norm() > 0
    assert (got - expected).norm() < bound * expected.norm()


# ------------------------------------------------------------------------------------------------------- all methods


@pytest.mark.parametrize("name", ALL)
def test_every_method_trains_the_adapter_and_nothing_else(name: str) -> None:
    method = make({"name": name}, random=name != "rwr", held_out=True)
    gradient, updates = flat_gradient(method, clips(method))
    assert gradient.isfinite().all()
    assert gradient.any()
    assert updates[-1].step
    assert {"reward/weighted", "reward/trained", "reward/held_out"} <= updates[0].metrics.keys()
    assert updates[0].samples is not None
    assert updates[0].samples.serials == [8, 9, 10, 11]
    frozen = [p for n, p in method.context.model.denoiser.named_parameters() if "lora_" not in n]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    whole = make({"name": name})
    parts = make({"name": name}, train={"batch_size": 4, "micro_batch": 1})
    expected, (first, *_) = flat_gradient(whole, clips(whole))
    got, updates = flat_gradient(parts, clips(parts))
    close(got, expected)
    total = [sum(u.metrics.get("reward/weighted", (0.0, 0.0))[i] for u in updates) for i in (0, 1)]
    repeats = 2 if name == "draft-lv" else 1
    assert total == pytest.approx([repeats * v for v in first.metrics["reward/weighted"]], rel=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_a_video_that_the_reward_fails_on_is_left_out_and_counted(name: str) -> None:
    method, clean = make({"name": name}), make({"name": name})
    reward = method.context.reward

    class Failing(nn.Module):
        def forward(self, frames: Tensor, prompts: list[str]) -> Tensor:
            factor = torch.tensor([math.nan if p == "a dog" else 1.0 for p in prompts])
            return reward(frames, prompts) * factor[:, None]  # NaN, and NaN in its derivative

    method.context.reward = Failing()
    gradient, updates = flat_gradient(method, clips(method))
    assert gradient.isfinite().all()
    assert updates[0].metrics["reward/excluded"][0] == 1
    assert updates[0].metrics["reward/weighted"][1] == 3
    assert updates[0].samples.reward_B.isnan().tolist() == [False, True, False, False]
    if name in ("instructvideo", "draft"):  # what is left is the sum of the other three
        losses = [clean.loss(clips(clean, (serial,))).loss for serial in (8, 10, 11)]
        close(gradient, sum(one_gradient(clean, loss / 4) for loss in losses))


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_method_ends_where_an_uninterrupted_one_does(name: str, tmp_path: Path) -> None:
    settings = {"name": name} | ({"min_count": 2} if name == "ddpo" else {})

    def started() -> tuple[Any, TorchEngine]:
        method = make(settings)
        return method, TorchEngine(method.context.model.denoiser, OptimizerConfig(lr=1e-3))

    def run(method: Any, engine: TorchEngine, steps: range) -> None:
        for step in steps:
            batch = replace(clips(method, tuple(range(4 * step, 4 * step + 4))), step=step)
            for update in method.updates(batch):
                engine.backward(update.loss, update.step)
                if update.step:
                    engine.step(step)

    straight, first, second = started(), started(), started()
    run(*straight, range(3))
    run(*first, range(2))
    first[1].save(tmp_path)
    torch.save(first[0].state_dict(), tmp_path / "algorithm.pt")
    second[1].load(tmp_path)
    second[0].load_state_dict(torch.load(tmp_path / "algorithm.pt", weights_only=True))
    run(*second, range(2, 3))
    ends = [lora_state(each[0].context.model.denoiser) for each in (straight, second)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert any(
        not torch.equal(ends[0][key], tensor)
        for key, tensor in lora_state(make(settings).context.model.denoiser).items()
    )


@pytest.mark.parametrize("name", ["draft", "rwr"])
def test_a_reward_that_raises_costs_its_videos_and_a_wrong_shape_ends_the_run(name: str) -> None:
    method = make({"name": name})

    def raising(frames: Tensor, prompts: list[str]) -> Tensor:
        raise ZeroDivisionError

    method.context.reward = raising
    gradient, updates = flat_gradient(method, clips(method))
    assert not gradient.any()
    assert updates[0].metrics["reward/excluded"][0] == 4
    method.context.reward = lambda frames, prompts: torch.zeros(3, 7)
    with pytest.raises(ValueError, match=r"scores of shape \(3, 7\) for 4 videos of 2 frames"):
        flat_gradient(method, clips(method))


class Brightness:
    """A reward of whole videos without a gradient."""

    whole_video = True

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return frames.detach().mean((1, 2, 3, 4))


@pytest.mark.parametrize("name", ["ddpo", "dpok", "rwr", "raft"])
def test_rewards_without_gradient_are_learned_from(name: str) -> None:
    method = make({"name": name})
    method.context.reward = Brightness()
    gradient, (first, *_) = flat_gradient(method, clips(method))
    assert gradient.any()
    assert first.samples.frames_BSCHW.shape[1] == 4, "it looks at every frame"
    expected = first.samples.frames_BSCHW.mean((1, 2, 3, 4))
    torch.testing.assert_close(first.samples.reward_B, expected, atol=0.05, rtol=0)  # frames are clamped in the archive
    with pytest.raises(ValueError, match="gives no gradient, which method 'draft' needs"):
        parse_config({"method": "draft", "reward": {"name": "oracle"}})


def test_the_oracle_is_a_reward() -> None:
    shown = sample_clips(3, torch.Generator().manual_seed(0))
    prompts = [write_caption(labels) for labels in labels_of(shown)]
    reward_B = load_reward("oracle")(render(shown), [*prompts[:2], "a dog"])
    assert (reward_B[:2] > 0.9).all()
    assert reward_B[2].isnan()


def test_the_penalty_is_the_distance_to_a_second_copy_of_the_base_model() -> None:
    free, bound = make({"name": "draft", "gradient_steps": 2}), make({"name": "draft", "gradient_steps": 2, "kl": 3.0})
    batch, base = clips(bound), copy.deepcopy(bound.context.model)
    for name, parameter in base.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    seen: list[tuple[Tensor, int]] = []
    kept = bound.penalise
    bound.penalise = lambda step, text: (seen.append((step.before.detach(), step.timestep)), kept(step, text))
    update = bound.loss(batch)
    with torch.no_grad():
        distances = [
            (bound.context.model.predict(x, t, batch.text_BLD, 3.0).eps - base.predict(x, t, batch.text_BLD, 3.0).eps)
            .square()
            .mean()
            for x, t in seen[-2:]
        ]
    expected = torch.stack(distances).mean()
    assert expected > 0
    assert float(update.metrics["policy/kl"][0]) == pytest.approx(float(expected), rel=1e-5)
    assert float((update.loss - free.loss(batch).loss).detach()) == pytest.approx(3 * float(expected), rel=1e-3)


# ------------------------------------------------------------------------------------------------- reward gradients


def test_draft_through_the_whole_chain_is_full_backpropagation() -> None:
    method = make({"name": "draft", "gradient_steps": None})
    batch, context = clips(method), method.context
    x = context.normal("start", batch)
    model, grid = context.model, timesteps(4)
    for place, t in enumerate(grid):
        prediction = model.predict(x, t, batch.text_BLD, 3.0)
        after = model.abar_at(grid[place + 1], x) if place < 3 else torch.ones(())
        x = after.sqrt() * prediction.x0 + (1 - after).sqrt() * prediction.eps
    expected = one_gradient(method, (1 - score(context, batch, x).reward_B).mean())
    close(flat_gradient(method, batch)[0], expected)


def test_low_variance_draft_averages_its_repeats() -> None:
    method = make({"name": "draft-lv", "repeats": 3})
    batch, context = clips(method), method.context
    clean = method.sample(batch)
    assert not clean.requires_grad
    gradients = []
    for repeat in range(3):
        noise, abar = context.normal("low-variance", batch, repeat), context.model.abar[1]
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        eps = context.model.predict(noisy, 1, batch.text_BLD, 3.0).eps
        x0 = (noisy - (1 - abar).sqrt() * eps) / abar.sqrt()
        gradients.append(one_gradient(method, (1 - score(context, batch, x0).reward_B).mean()))
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()
    got, updates = flat_gradient(method, batch)
    close(got, torch.stack(gradients).mean(0))
    assert [u.step for u in updates] == [False, False, True]


@contextmanager
def saved_elements() -> Iterator[list[int]]:
    """How many elements autograd keeps for the backward pass."""
    kept = [0]

    def pack(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def test_no_graph_is_built_before_the_cut() -> None:
    kept = {}
    for cut in (0, 1, 3):
        method = make(
            {"name": "alignprop", "truncation": "fixed", "cut": cut},
            train={"batch_size": 4, "checkpoint_activations": False},
        )
        batch = clips(method)
        with saved_elements() as count:
            method.sample(batch)
        kept[cut] = count[0]
    assert kept[3] > 0
    assert kept[0] / kept[3] == pytest.approx(4, rel=0.02)
    assert kept[1] / kept[3] == pytest.approx(3, rel=0.02)


def test_the_cut_has_its_distribution_and_is_drawn_once_a_batch() -> None:
    gaussian = AlignPropConfig()
    cuts = torch.tensor([float(draw_cut(gaussian, 50, 0, step)) for step in range(4000)])
    draws = (42 + 5 * torch.randn(400_000, generator=torch.Generator().manual_seed(1))).to(torch.int64)
    allowed = draws[(draws >= 1) & (draws < 50)].double()
    assert 1 <= cuts.min() <= cuts.max() <= 49
    assert float(cuts.mean()) == pytest.approx(float(allowed.mean()), abs=0.25)
    assert float(cuts.std()) == pytest.approx(float(allowed.std()), abs=0.2)
    uniform = AlignPropConfig(truncation="uniform")
    counts = torch.bincount(torch.tensor([draw_cut(uniform, 10, 0, step) for step in range(5000)]), minlength=10)
    assert (counts - 500).abs().max() < 5 * math.sqrt(450)
    method = make({"name": "alignprop", "truncation": "uniform"}, train={"batch_size": 4, "micro_batch": 1})
    chosen = []
    chain = method.chain
    method.chain = lambda batch, x, grid, carried: (chosen.append(carried), chain(batch, x, grid, carried))[1]
    list(method.updates(clips(method)))
    assert len(chosen) == 4
    assert len(set(chosen)) == 1


# -------------------------------------------------------------------------------------------------- policy gradients


def test_a_rollout_is_the_chain_and_its_probability_that_of_a_normal() -> None:
    method = make({"name": "ddpo"})
    batch, context = clips(method), method.context
    rollout = roll_out(context, batch)
    assert len(rollout) == 3, "the last step of four adds no noise"
    with torch.no_grad():
        latents = denoise(
            context.model, context.normal("start", batch), batch.text_BLD, timesteps(4), guidance=3.0, eta=1.0,
            noise=lambda index: context.normal("ddim", batch, index),
        )  # fmt: skip
    assert torch.equal(rollout.latents_BCFhw, latents)
    grid, abar = timesteps(4), context.model.abar.double()
    for place in range(3):
        now, then = abar[grid[place]], abar[grid[place + 1]]
        spread = ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        with torch.no_grad():
            prediction = context.model.predict(rollout.before_TBCFhw[place], grid[place], batch.text_BLD, 3.0)
        mean = then.sqrt() * prediction.x0.double() + (1 - then - spread**2).sqrt() * prediction.eps.double()
        after = rollout.after_TBCFhw[place].double()
        expected = torch.distributions.Normal(mean, spread).log_prob(after).flatten(1).mean(1)
        torch.testing.assert_close(rollout.log_probability_TB[place].double(), expected, atol=2e-5, rtol=0)


def test_the_ratio_is_one_before_the_first_step() -> None:
    method = make({"name": "ddpo"})
    rollout = roll_out(method.context, clips(method))
    for index_B in method.order(rollout.batch, 3, 0):
        now_B, _ = replay(method.context, rollout, index_B)
        old_B = rollout.log_probability_TB[index_B, torch.arange(4)]
        assert ((now_B - old_B).exp() - 1).abs().max() < 2e-6
    _, updates = flat_gradient(method, clips(method))
    assert updates[0].metrics["policy/first_ratio_error"][0] < 1e-5


class TwoParameters:
    """A model whose clean latents and noise are two numbers everywhere."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.a, self.b = (torch.tensor(value, requires_grad=True) for value in (0.3, -0.2))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def predict(self, x: Tensor, t: Any, text: Tensor, guidance: float, **_: Any) -> Prediction:
        return Prediction(self.a.expand_as(x), self.b.expand_as(x))


def test_the_policy_gradient_of_two_parameters_is_the_analytic_one() -> None:
    method = make({"name": "ddpo", "timestep_fraction": 1.0}, train={"batch_size": 4, "checkpoint_activations": False})
    policy = method.context.model = TwoParameters(method.context.model)
    batch = clips(method)
    rollout, advantage_B = roll_out(method.context, batch), torch.tensor([1.0, -2.0, 0.5, 3.0])
    grid, abar = timesteps(4), policy.inner.abar.double()
    for place in range(3):
        loss, _ = method.loss(rollout, advantage_B, torch.full((4,), place))
        got = torch.autograd.grad(loss, [policy.a, policy.b])
        now, then = abar[grid[place]], abar[grid[place + 1]]
        variance = (1 - then) / (1 - now) * (1 - now / then)
        along_a, along_b = then.sqrt(), (1 - then - variance).sqrt()
        away_B = (rollout.after_TBCFhw[place].double() - 0.3 * along_a + 0.2 * along_b).flatten(1).mean(1) / variance
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


def test_dpoks_distance_is_nothing_at_the_start_and_has_the_gradient_of_finite_differences() -> None:
    start = make({"name": "dpok"}, random=False)
    _, updates = flat_gradient(start, clips(start))
    assert updates[0].metrics["policy/kl"][0] == 0

    method = make({"name": "dpok", "kl": 1.0, "reward_weight": 1e-12})
    model = method.context.model
    for part in (model.denoiser, model.vae, model.text_encoder):
        part.double()
    batch = clips(method)
    batch = Batch(2, batch.serials, batch.prompts, batch.text_BLD.double(), batch.latents_BCFhw.double(), 4)
    rollout = roll_out(method.context, batch)
    scored = score(method.context, batch, rollout.latents_BCFhw.float().double())
    method.build(batch)
    index_B = torch.tensor([0, 1, 2, 0])
    gradient = torch.autograd.grad(method.loss(rollout, scored, index_B)[0], parameters(method))
    generator, h = torch.Generator().manual_seed(0), 1e-4
    ways = [torch.randn(p.shape, generator=generator) for p in parameters(method)]
    values = {}
    for sign in (1, -1):
        with torch.no_grad():
            for p, way in zip(parameters(method), ways, strict=True):
                p += sign * h * way
            values[sign] = float(method.loss(rollout, scored, index_B)[0])
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
    index_B = torch.tensor([0, 1, 2, 0])
    value_B = method.values(rollout, index_B)
    assert (value_B - scored.reward_B).abs().max() < 0.5 * scored.reward_B.abs().max()
    other = make({"name": "dpok", "value_steps": 60, "value_lr": 1e-2})
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    other.build(batch)
    assert torch.equal(other.values(rollout, index_B), value_B)
    errors = [each.fit_value(batch, [rollout], [scored], 7) for each in (method, other)]
    assert errors[0] == errors[1]
    assert torch.equal(other.values(rollout, index_B), method.values(rollout, index_B)), "the optimiser's state differs"


# --------------------------------------------------------------------------------------------------------- supervised


def test_exponential_weights_by_hand() -> None:
    reward = torch.tensor([1.0, 3.0, math.nan, 2.0])
    total = math.exp(0.5) + math.exp(1.5) + math.exp(1.0)
    expected = [3 * math.exp(0.5) / total, 3 * math.exp(1.5) / total, 0.0, 3 * math.exp(1.0) / total]
    assert exponential_weights([""] * 4, reward, 0.5).tolist() == pytest.approx(expected)
    pair = 2 / (1 + math.exp(0.5 * 2))
    grouped = exponential_weights(["a", "a", "b", "b"], reward, 0.5).tolist()
    assert grouped == pytest.approx([pair, 2 - pair, 0.0, 1.0])


def test_ranking_by_hand() -> None:
    prompts = ["a", "b", "a", "b", "c", "c"]
    reward = torch.tensor([0.1, 0.9, 0.3, 0.9, math.nan, math.nan])
    assert best_of_each(prompts, reward).tolist() == [False, True, True, False, False, False]
    assert best_share(reward, 0.5).tolist() == [False, True, True, True, False, False]
    assert best_share(reward, 1.0).tolist() == [True, True, True, True, False, False]
    assert kept_weights(torch.tensor([True, False, True, False])).tolist() == [2.0, 0.0, 2.0, 0.0]
    assert kept_weights(torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_workers_train_on_the_same_number_of_videos() -> None:
    weight = torch.tensor([0.0, 2.0, 0.0, 1.0, 3.0, 0.0])
    assert trained_rows(weight, 0, 1) == [1, 3, 4]
    assert [trained_rows(weight, rank, 2) for rank in range(2)] == [[0, 2], [0, 1]]
    assert [trained_rows(torch.zeros(4), rank, 2) for rank in range(2)] == [[0], [0]]


@pytest.mark.parametrize("guided", [False, True])
def test_the_supervised_loss_is_weighed_noise_prediction_on_the_best(guided: bool) -> None:
    method = make({"name": "raft", "share": 0.5, "inner_steps": 2, "guided": guided})
    batch, context = clips(method), method.context
    latents, (scored,) = method.collect(batch)
    best = scored.reward_B.argsort(descending=True)[:2].sort().values.tolist()
    losses = []
    for turn in range(2):
        serials = [batch.serials[row] for row in best]
        draw = randomness.uniform((), context.config.seed, "supervised-timestep", [(s, turn) for s in serials])
        t, noise = (draw * 1000).long(), context.normal("supervised-noise", batch.take(best), turn)
        abar = context.model.abar[t][:, None, None, None, None]
        noisy = abar.sqrt() * latents[best] + (1 - abar).sqrt() * noise
        text = batch.text_BLD[best]
        eps = context.model.denoiser(noisy, t, encoder_hidden_states=text).sample
        if guided:
            empty = context.model.denoiser(
                noisy, t, encoder_hidden_states=context.model.encode_prompts(["", ""])
            ).sample
            eps = empty + 3 * (eps - empty)
        losses.append((eps - noise).square().mean())
    _, updates = flat_gradient(method, batch)
    assert [u.step for u in updates] == [True, True]
    for update, loss in zip(updates, losses, strict=True):
        assert float(update.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
