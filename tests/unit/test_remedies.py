"""Remedies against over-optimisation, each held to an independent calculation; off, they change no bit."""

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import clips, close, flat_gradient, make, one_gradient, save_run
from torch import Tensor, nn

from rlvid import randomness
from rlvid.algorithms.base import Batch
from rlvid.algorithms.scoring import below, score
from rlvid.config import parse_config
from rlvid.config.methods import METHODS
from rlvid.diffusion.schedule import check_chain
from rlvid.evaluate.load import load_run
from rlvid.evaluate.scorers import Scorers
from rlvid.export.export import export_run
from rlvid.models.levels import limit_levels
from rlvid.models.unet3d import load_model
from rlvid.plan.counts import count
from rlvid.plan.plan import make_plan
from rlvid.reward.load import load_reward, trained_reward
from rlvid.reward.mixture import MixtureReward
from rlvid.train import preflight

BEFORE = {
    "instructvideo": "1fca35bb5e0d", "draft": "a1662a5450e5", "draft-lv": "ede11a372f9e", "alignprop": "3538e7f795c0",
    "ddpo": "cedd46205ec1", "dpok": "a61b0870dc53", "grpo": "a01fe8d6697e", "rwr": "1216989991da",
    "raft": "24425e2a1bf7",
}  # fmt: skip
"""The fingerprints of runs before there were remedies, with train.group_size = 2."""


def fingerprint(method: Any, **sections: Any) -> str:
    return parse_config({"method": method, "train": {"group_size": 2}, **sections}).fingerprint


def test_runs_without_remedies_keep_their_fingerprint() -> None:
    assert {name: fingerprint(name) for name in METHODS} == BEFORE
    assert fingerprint({"kl": 0.1, "kl_at": "steps"}) == fingerprint({"kl": 0.1}) != BEFORE["instructvideo"]
    assert fingerprint({"kl": 0.1, "kl_at": "path"}) != fingerprint({"kl": 0.1})


# ------------------------------------------------------------------------------- noise prediction at a random level


def noised(method: Any, batch: Batch, clean: Tensor, purpose: str, index: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents at a level of each video, the level, the noise: by diffusers' formula, from draws of the same name."""
    context = method.context
    draws = randomness.uniform((), context.config.seed, f"{purpose}-timestep", [(s, index) for s in batch.serials])
    t, noise = (draws * 1000).long(), context.normal(f"{purpose}-noise", batch, index)
    abar = context.model.path.abar[t][:, None, None, None, None]
    return abar.sqrt() * clean + (1 - abar).sqrt() * noise, t, noise


def guided(model: Any, x: Tensor, t: Tensor, text: Tensor, guidance: float) -> Tensor:
    """The guided noise prediction, a branch at a time."""
    empty = model.encode_prompts([""]).expand(len(x), -1, -1)
    unconditional, conditional = (model.denoiser(x, t, encoder_hidden_states=e).sample for e in (empty, text))
    return unconditional + guidance * (conditional - unconditional)


@pytest.mark.parametrize(
    "name", ["instructvideo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("draft", "alignprop"))]
)
def test_the_penalty_of_the_whole_path_is_taken_at_a_random_level_of_each_sample(name: str) -> None:
    method, free = make({"name": name, "kl": 0.5, "kl_at": "path"}), make({"name": name})
    batch, context = clips(method), method.context
    base = copy.deepcopy(context.model)
    for key, parameter in base.denoiser.named_parameters():
        if "lora_B" in key:
            parameter.data.zero_()
    x, t, _ = noised(method, batch, method.sample(batch).detach(), "kl")
    assert len(set(t.tolist())) == 4
    with torch.no_grad():
        expected = guided(base, x, t, batch.text_BLD, 3.0)
    distance_B = (guided(context.model, x, t, batch.text_BLD, 3.0) - expected).square().mean((1, 2, 3, 4))
    got, (update,) = flat_gradient(method, batch)
    alone, (plain,) = flat_gradient(free, batch)
    total, number = update.metrics["policy/kl"]
    assert number == 4
    assert total == pytest.approx(float(distance_B.detach().sum()), rel=1e-4)
    assert float((update.loss - plain.loss).detach()) == pytest.approx(float(distance_B.detach().mean()) / 2, rel=1e-3)
    close(got - alone, one_gradient(method, distance_B.mean() / 2), 1e-3)


def test_each_noise_of_low_variance_draft_has_a_level_of_its_own() -> None:
    method = make({"name": "draft-lv", "repeats": 2, "kl": 0.5, "kl_at": "path"})
    batch = clips(method)
    clean = method.sample(batch)
    first, second = method.updates(batch)
    base, tuned = copy.deepcopy(method.context.model), method.context.model
    for key, parameter in base.denoiser.named_parameters():
        if "lora_B" in key:
            parameter.data.zero_()
    for repeat, update in enumerate((first, second)):
        x, t, _ = noised(method, batch, method.once_more(batch, clean, repeat).detach(), "kl", repeat)
        with torch.no_grad():
            distance = guided(tuned, x, t, batch.text_BLD, 3.0) - guided(base, x, t, batch.text_BLD, 3.0)
        assert update.metrics["policy/kl"][0] == pytest.approx(float(distance.square().mean()) * 4, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"name": "draft", "kl": 0.5, "kl_at": "path"}, marks=pytest.mark.slow),
        {"kl": 0.5, "kl_at": "path", "denoising": 0.5},
    ],
)
def test_the_added_losses_depend_neither_on_micro_batches_nor_on_recomputation(settings: dict[str, Any]) -> None:
    whole = make(settings)
    expected, (one,) = flat_gradient(whole, clips(whole))
    for train in ({"batch_size": 4, "micro_batch": 1}, {"batch_size": 4, "checkpoint_activations": True}):
        other = make(settings, train=train)
        got, updates = flat_gradient(other, clips(other))
        close(got, expected, 1e-5)
        total = sum(update.metrics["policy/kl"][0] for update in updates)
        assert total == pytest.approx(one.metrics["policy/kl"][0], rel=1e-5)


# ------------------------------------------------------------------------------------- denoising of source clips


def test_the_denoising_loss_is_the_noise_prediction_on_the_source_clips() -> None:
    method, free = make({"tau": 0.5, "denoising": 0.3}), make({"tau": 0.5})
    batch = clips(method)
    x, t, noise = noised(method, batch, batch.latents_BCFhw, "denoising")
    eps = method.context.model.denoiser(x, t, encoder_hidden_states=batch.text_BLD).sample
    error_B = (eps - noise).square().mean((1, 2, 3, 4))
    got, (update,) = flat_gradient(method, batch)
    alone, (plain,) = flat_gradient(free, batch)
    assert update.metrics["policy/noise_error"] == pytest.approx((float(error_B.detach().sum()), 4), rel=1e-4)
    assert float((update.loss - plain.loss).detach()) == pytest.approx(0.3 * float(error_B.detach().mean()), rel=1e-4)
    close(got - alone, one_gradient(method, 0.3 * error_B.mean()), 1e-3)


def test_a_clip_that_is_lost_teaches_no_denoising() -> None:
    method = make({"tau": 0.5, "denoising": 0.3})
    batch = clips(method)
    x, t, noise = noised(method, batch, batch.latents_BCFhw, "denoising")
    with torch.no_grad():
        eps = method.context.model.denoiser(x, t, encoder_hidden_states=batch.text_BLD).sample
    error_B = (eps - noise).square().mean((1, 2, 3, 4))
    lost = Batch(2, batch.serials, batch.prompts, batch.text_BLD, batch.latents_BCFhw, frozenset({9}))
    rewards = torch.where(
        torch.tensor([True, False, True, True]), 1 - score(method.context, batch, method.sample(batch)).reward_B, 0.0
    )
    update = method.loss(lost)
    expected = rewards.mean() + 0.3 * (error_B.sum() - error_B[1]) / 4
    assert float(update.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert update.metrics["policy/noise_error"] == pytest.approx((float(error_B.sum() - error_B[1]), 3), rel=1e-4)


# ------------------------------------------------------------------------------ an adapter at some noise levels


def limited(settings: dict[str, Any], levels: tuple[float, float] | None, **sections: Any) -> Any:
    """A method whose adapter acts at some levels, as ``load_trainable`` makes it."""
    made = make(settings, **sections)
    if levels is not None:
        limit_levels(made.context.model.denoiser, levels, 1000)
    return made


def test_outside_of_its_levels_a_video_is_denoised_by_the_base_model() -> None:
    """Row by row, under guidance: against the denoiser with and without its adapter."""
    whole, some = make({"name": "draft"}).context.model, limited({"name": "draft"}, (0.3, 0.55)).context.model
    text, x = whole.encode_prompts(["a", "b", "c", "d", "e"]), torch.randn(5, *whole.latent_shape)
    t = torch.tensor([299, 300, 549, 550, 999])
    with torch.no_grad():
        tuned, got = whole.predict(x, t, text, 3.0), some.predict(x, t, text, 3.0)
        with whole.base():
            base = whole.predict(x, t, text, 3.0)
        with some.base():
            torch.testing.assert_close(some.predict(x, t, text, 3.0).eps, base.eps)
        one = [model.predict(x[:2], 300, text[:2], 1.0).eps for model in (whole, some)]
    torch.testing.assert_close(*one)
    assert ((tuned.eps - base.eps).flatten(1).norm(dim=1) > 1e-2).all()
    torch.testing.assert_close(got.eps[1:3], tuned.eps[1:3])
    torch.testing.assert_close(got.eps[[0, 3, 4]], base.eps[[0, 3, 4]])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_flows_through_steps_at_which_the_adapter_is_off(recompute: bool) -> None:
    """751, 501, 251, 1: the adapter acts at the second one alone, and the last two pass its gradient on."""
    train = {"batch_size": 4, "checkpoint_activations": recompute}
    method = limited({"name": "draft", "gradient_steps": None}, (0.4, 0.7), train=train)
    plain = make({"name": "draft", "gradient_steps": None})
    batch, model = clips(plain), plain.context.model
    x = plain.context.normal("start", batch)
    grid = model.path.grid(4)
    for place, t in enumerate(grid):
        with nullcontext() if t == 501 else model.base():
            prediction = model.predict(x, t, batch.text_BLD, 3.0)
        after = model.path.abar[grid[place + 1]] if place < 3 else torch.ones(())
        x = after.sqrt() * prediction.x0 + (1 - after).sqrt() * prediction.eps
    expected = one_gradient(plain, (1 - score(plain.context, batch, x).reward_B).mean())
    got, _ = flat_gradient(method, batch)
    close(got, expected)
    assert (got - flat_gradient(plain, batch)[0]).norm() > 1e-2 * got.norm()


def test_a_policy_is_replayed_as_it_was_rolled_out() -> None:
    method = limited({"name": "ddpo"}, (0.4, 1.0))
    _, (first, *_) = flat_gradient(method, clips(method))
    total, number = first.metrics["policy/first_ratio_error"]
    assert total / number < 1e-5


def test_a_run_and_who_loads_it_have_the_levels(tmp_path: Path) -> None:
    folder, config = save_run(tmp_path, lora={"levels": [0.5, 1]})
    assert config.fingerprint != parse_config({**config.model_dump(), "model": {"path": config.model.path}}).fingerprint
    tuned = load_run(folder)
    model, before = tuned.use(1.0), load_model(config.model.path, frames=4, size=16)
    x, text = torch.randn(2, *model.latent_shape), model.encode_prompts(["a", "b"])
    with torch.no_grad():
        got, base = (each.predict(x, torch.tensor([499, 500]), text, 2.0).eps for each in (model, before))
    torch.testing.assert_close(got[0], base[0])
    assert (got[1] - base[1]).norm() > 1e-3 * base[1].norm()
    with pytest.raises(ValueError, match=r"model\.lora\.levels = \[0\.5, 1\.0\] alone, .*rlvid generate$"):
        export_run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_would_learn_nothing_is_refused() -> None:
    config = parse_config({"model": {"lora": {"levels": [0.5, 1]}}})
    for start in (preflight.check, make_plan):
        with pytest.raises(
            ValueError, match=r"^model\.lora\.levels = \[0\.5, 1\.0\]: method 'instructvideo' .* \[0\.001, 1\]$"
        ):
            start(config)
    for method in ("ddpo", "rwr", {"name": "draft", "gradient_steps": None}):
        check_chain(parse_config({"model": {"lora": {"levels": [0.5, 1]}}, "method": method}))


# ------------------------------------------------------------------------------------------- a ceiling of the reward


def rewards_of(method: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return score(method.context, batch, method.sample(batch)).samples.reward_B


def test_videos_at_the_ceiling_give_no_gradient() -> None:
    free = make({"name": "draft"})
    batch = clips(free)
    reward_B = rewards_of(free, batch)
    lowest = reward_B.argsort()[:2].tolist()
    ceiling = float(reward_B.sort().values[2]) * (1 - 1e-6)  # rewards computed twice may differ in the last bit
    method = make({"name": "draft"}, reward={"ceiling": ceiling})
    got, (update,) = flat_gradient(method, batch)
    low = [one_gradient(free, -score(free.context, part := batch.take([row]), free.sample(part)).reward_B.sum() / 4)
           for row in lowest]  # fmt: skip
    close(got, torch.stack(low).sum(0))
    expected = (1 - reward_B.clamp(max=ceiling)).mean()
    assert float(update.loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert update.metrics["reward/at_ceiling"] == (2.0, 4.0)
    torch.testing.assert_close(update.samples.reward_B, reward_B)  # the archive has the reward itself
    assert update.metrics["reward/weighted"][0] == pytest.approx(float(reward_B.sum()), rel=1e-5)


def test_a_reward_at_the_ceiling_counts_as_above_it() -> None:
    reward_B = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    capped_B = below(reward_B, 0.5)
    capped_B.sum().backward()
    assert capped_B.tolist() == [pytest.approx(0.2), 0.5, 0.5]
    assert reward_B.grad.tolist() == [1.0, 0.0, 0.0]


def test_videos_at_the_ceiling_are_equals_for_methods_that_compare() -> None:
    settings = {"name": "grpo"}
    rewards = torch.tensor([0.2, 0.7, 0.9, 0.5])
    for ceiling, expected in ((0.6, [-1.0, 1.0, 1.0, -1.0]), (0.1, [0.0] * 4), (-2, [0.0] * 4)):
        method = make(settings, reward={"ceiling": ceiling, "segments": 1})
        batch = clips(method)
        method.context.reward = lambda frames, prompts: rewards[:, None]
        scored = score(method.context, batch, batch.latents_BCFhw)
        torch.testing.assert_close(scored.reward_B, rewards.clamp(max=ceiling))
        torch.testing.assert_close(method.advantages(batch, [scored]), torch.tensor(expected), atol=1e-4, rtol=0)


def test_a_reward_that_is_not_a_number_does_not_become_the_ceiling() -> None:
    assert below(torch.tensor([math.nan, math.inf, 0.25]), 0.5).tolist() == pytest.approx(
        [math.nan, 0.5, 0.25], nan_ok=True
    )
    same = torch.rand(3)
    assert below(same, None) is same


# ------------------------------------------------------------------------------------------ a pessimistic ensemble


class Fixed(nn.Module):
    """Gives the scores that it was made with, plus 0 x the frames."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return self.scores


def mixed(scores: Tensor, **options: Any) -> Tensor:
    """The reward of a mixture whose parts give these scores (parts, B, S)."""
    names, weights = [str(n) for n in range(len(scores))], options.pop("weights", [1.0] * len(scores))
    return MixtureReward(names, [*map(Fixed, scores)], weights, **options)(torch.zeros(*scores.shape[1:], 3, 4, 4), [])


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_pessimism_takes_deviations_of_the_weighed_parts_off_their_mean(parts: int) -> None:
    generator = torch.Generator().manual_seed(parts)
    scores = torch.randn(parts, 4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    weights, centres = [0.5 + n for n in range(parts)], [0.3 * n for n in range(parts)]
    values = np.stack([w * (s - c) for w, s, c in zip(weights, scores.detach().numpy(), centres, strict=True)])
    got = mixed(scores, weights=weights, centres=centres, pessimism=0.7)
    expected = parts * (values.mean(0) - 0.7 * values.std(0))
    np.testing.assert_allclose(got.detach().numpy(), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: mixed(s, weights=weights, centres=centres, pessimism=0.7), (scores,))


def test_pessimism_of_one_takes_the_smaller_of_two_parts() -> None:
    scores = torch.tensor([[[0.2, 0.9]], [[0.5, 0.1]]], requires_grad=True)
    reward = mixed(scores, weights=[0.5, 0.5], pessimism=1.0)
    torch.testing.assert_close(reward, torch.tensor([[0.2, 0.1]]))
    (gradient,) = torch.autograd.grad(reward.sum(), scores)
    torch.testing.assert_close(gradient, torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_finite_where_all_parts_agree(dtype: torch.dtype) -> None:
    scores = torch.full((3, 2, 2), 0.3, dtype=dtype).requires_grad_()
    reward = mixed(scores, pessimism=2.0)
    (gradient,) = torch.autograd.grad(reward.float().sum(), scores)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient, torch.ones_like(gradient), atol=1e-2, rtol=0)
    torch.testing.assert_close(reward.float(), torch.full((2, 2), 0.9), atol=1e-2, rtol=0)


def test_a_mixture_without_pessimism_is_the_sum_to_the_bit() -> None:
    scores = torch.randn(3, 4, 2)
    expected = torch.zeros(()) + 0.3 * scores[0] + 1.7 * scores[1] + -2.0 * scores[2]
    assert torch.equal(mixed(scores, weights=[0.3, 1.7, -2.0]), expected)


def test_a_run_trains_on_the_pessimistic_mixture() -> None:
    parts = [{"name": "brightness", "weight": 2.0, "centre": 0.4}, {"name": "compression", "weight": 0.1}]
    config = parse_config({"reward": {"mixture": parts, "pessimism": 0.5}})
    frames = torch.rand(2, 3, 3, 16, 16, requires_grad=True)
    first, second = (load_reward(part["name"])(frames, ["", ""]) for part in parts)
    first, second = 2 * (first - 0.4), 0.1 * second
    expected = first + second - 0.5 * (first - second).abs()
    got = trained_reward(config.reward)(frames, ["", ""])
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(each.sum(), frames, retain_graph=True)[0] for each in (got, expected)]
    torch.testing.assert_close(*gradients)
    again = parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config
    assert Scorers(config.reward).names["reward"] == "2 x (brightness - 0.4) + 0.1 x compression - 1 deviations"


def test_what_was_hashed_over_mixtures_stays() -> None:
    parts = [{"name": "brightness"}, {"name": "clip", "path": "random"}]
    plain = parse_config({"reward": {"mixture": parts}})
    assert plain.fingerprint == "370dee100cdc", "as it was before there was pessimism"
    found = {plain.fingerprint}
    for reward in ({"pessimism": 0.5}, {"mixture": [{"name": "brightness", "centre": 0.1}, parts[1]]}, {"ceiling": 0}):
        other = parse_config({"reward": {"mixture": parts} | reward})
        found.add(other.fingerprint)
        assert (Scorers(other.reward).identity == Scorers(plain.reward).identity) == ("ceiling" in reward)
    assert len(found) == 4


# ------------------------------------------------------------------------------------------------- cost and errors

COSTS = [  # plain, graph, again and backward rows of the U-Net beside those without a remedy
    ({"name": "instructvideo"}, {"kl": 0.1, "kl_at": "path"}, (2, 2, 2, 2)),
    ({"name": "draft-lv", "repeats": 3}, {"kl": 0.1, "kl_at": "path"}, (6, 6, 6, 6)),
    ({"name": "draft"}, {"kl": 0.1, "kl_at": "path", "unconditional_gradient": False}, (4, 0, 0, 0)),
    ({"name": "instructvideo"}, {"denoising": 0.1}, (0, 1, 1, 1)),
]


@pytest.mark.parametrize(("method", "remedy", "more"), COSTS, ids=str)
def test_a_plan_counts_what_a_remedy_costs(method: dict[str, Any], remedy: dict[str, Any], more: Any) -> None:
    without, with_it = (count(parse_config({"method": each}), frames=16) for each in (method, method | remedy))
    for name, rows in zip(("plain", "graph", "again", "backward"), more, strict=True):
        assert getattr(with_it.denoiser, name) - getattr(without.denoiser, name) == rows, name
    assert (with_it.decoder, with_it.reward) == (without.decoder, without.reward)


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"method": {"kl_at": "path"}}, ["method.kl_at = 'path'", "method.kl above 0", "method.kl=0.1"]),
    ({"method": {"kl": 1, "kl_at": "start"}}, ["method.kl_at = 'start'", "'steps' or 'path'"]),
    ({"method": {"name": "draft", "denoising": 1}}, ["unknown key method.denoising", "allowed here: kl, kl_at"]),
    ({"model": {"lora": {"levels": [0.5, 0.5]}}}, ["model.lora.levels = [0.5, 0.5]", "smaller than the second"]),
    ({"model": {"lora": {"levels": [0.5, 1.5]}}}, ["model.lora.levels.1 = 1.5", "less than or equal to 1"]),
    ({"model": {"finetune": "full", "lora": {"levels": [0, 0.5]}}}, ["lora.levels = [0.0, 0.5]", "finetune=lora"]),
    ({"reward": {"ceiling": "high"}}, ["reward.ceiling = 'high'", "finite number, or q and a number between 0 and 1"]),
    ({"reward": {"ceiling": "q1.5"}}, ["reward.ceiling = 'q1.5'", "between 0 and 1, such as q0.9"]),
    ({"reward": {"ceiling": "q"}}, ["reward.ceiling = 'q'", "such as q0.9"]),
    ({"reward": {"ceiling": "qnan"}}, ["reward.ceiling = 'qnan'", "such as q0.9"]),
    ({"reward": {"ceiling": "0.9q"}}, ["reward.ceiling = '0.9q'", "such as q0.9"]),
    ({"reward": {"ceiling": [0.9]}}, ["reward.ceiling = [0.9]", "such as q0.9"]),
    ({"reward": {"ceiling": True}}, ["reward.ceiling = True", "true and false are not allowed"]),
    ({"reward": {"ceiling": math.inf}}, ["reward.ceiling = inf", "finite number"]),
    ({"reward": {"pessimism": 1}}, ["pessimism = 1", "2 parts or more, and there are 0", "reward.mixture"]),
    ({"reward": {"pessimism": 1, "mixture": [{"name": "brightness"}]}}, ["pessimism = 1", "there are 1"]),
    ({"reward": {"pessimism": 1, "mixture": [{"name": "brightness"}, {"name": "compression", "weight": -1}]}},
     ["mixture.1.weight = -1", "pessimism = 1", "allowed: above 0"]),
    ({"reward": {"pessimism": -1}}, ["reward.pessimism = -1", "greater than or equal to 0"]),
    ({"method": {"denoising": -1}}, ["method.denoising = -1", "greater than or equal to 0"]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), WRONG, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_does_not_fit_is_refused_in_one_line(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        parse_config(data)
    for word in words:
        assert word in str(error.value)
