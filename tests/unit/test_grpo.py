"""GRPO, held to the published formula, and what rollouts with a window compute and keep."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import TwoParameters, flat_gradient, make, parameters
from helpers import clips as unlike
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms import rollout as rollout_module
from rlvid.algorithms.advantages import group_advantages
from rlvid.algorithms.base import Batch
from rlvid.algorithms.rollout import reach_of_steps, replay, roll_out, roll_out_and_score, sample, windows
from rlvid.config import parse_config
from rlvid.diffusion.chain import denoise


def clips(method: Any, serials: tuple[int, ...] = (8, 9, 10, 11)) -> Batch:
    """A batch whose neighbours of a group have one prompt."""
    group, batch = method.context.config.train.group_size, unlike(method, serials)
    rows = [serials.index(s - s % group) if s - s % group in serials else row for row, s in enumerate(serials)]
    return Batch(batch.step, batch.serials, [batch.prompts[r] for r in rows], batch.text_BLD[rows], batch.latents_BCFhw)


def grpo(train: dict[str, Any] | None = None, **method: Any) -> Any:
    """GRPO on the tiny model, in chains of four steps: two prompts of two videos."""
    return make({"name": "grpo"} | method, train=train or {})


def published(
    reward_PG: Tensor, now_B: Tensor, old_B: Tensor, mean: Tensor, base: Tensor, std: float, reach: float, beta: float
) -> Tensor:
    """Flow-GRPO's loss of one step, written after its paper's equations 4, 5 and 8, in float64."""
    deviation_P1 = ((reward_PG - reward_PG.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True).sqrt()
    advantage_B = ((reward_PG - reward_PG.mean(1, keepdim=True)) / (deviation_P1 + 1e-6)).flatten()
    ratio_B = torch.exp(now_B - old_B)
    gain_B = torch.min(ratio_B * advantage_B, torch.clip(ratio_B, 1 - reach, 1 + reach) * advantage_B)
    divergence_B = ((mean - base) ** 2).flatten(1).mean(1) / (2 * std**2)
    return -(gain_B - beta * divergence_B).mean()


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_the_published_one(beta: float) -> None:
    method = grpo(kl=beta, clip_range=2e-3)
    context, model = method.context, method.context.model
    batch, generator = clips(method), torch.Generator().manual_seed(5)
    rollout = roll_out(context, batch)
    reward_PG = torch.randn((2, 2), generator=generator, dtype=torch.float64)
    advantage_B = method.standardise([], reward_PG.flatten().tolist(), 1e-9)
    for parameter in parameters(method):
        parameter.data += torch.randn(parameter.shape, generator=generator) / 60
    grid, abar, clipped = model.path.grid(4), model.path.abar.double(), 0.0
    for place in range(3):
        taken, now, then = rollout.at(torch.full((4,), place)), abar[grid[place]], abar[grid[place + 1]]
        std = float(((1 - then) / (1 - now) * (1 - now / then)).sqrt())

        def mean(base: bool, taken: Any = taken, place: int = place, then: Tensor = then, std: float = std) -> Tensor:
            with torch.no_grad():
                found = model.predict(taken.before_BCFhw, grid[place], taken.text_BLD, 3.0)
                if base:
                    with model.base():
                        found = model.predict(taken.before_BCFhw, grid[place], taken.text_BLD, 3.0)
            return then.sqrt() * found.x0.double() + (1 - then - std**2).sqrt() * found.eps.double()

        here, after = mean(False), taken.after_BCFhw.double()
        now_B = torch.distributions.Normal(here, std).log_prob(after).flatten(1).mean(1)
        expected = published(
            reward_PG, now_B, taken.log_probability_B.double(), here, mean(True), std, method.method.clip_range, beta
        )
        loss, metrics = method.loss(rollout, advantage_B, torch.full((4,), place))
        assert float(loss.detach()) == pytest.approx(float(expected), rel=2e-3, abs=2e-5)
        clipped += metrics["policy/clip_fraction"][0]
        assert ("policy/kl" in metrics) == (beta > 0)
    assert 0 < clipped < 12, "all or nothing was clipped, so the test shows little"


def test_only_the_window_is_random_and_kept() -> None:
    method = grpo(window=1)
    context, batch = method.context, clips(method)
    own_windows = windows(method.context, batch)
    rollout = method.collect(batch)[0][0]
    assert [sorted(states) for states in rollout.states] == [[own[0], own[0] + 1] for own in own_windows]
    with pytest.raises(KeyError):
        rollout.at(torch.tensor([(own[0] + 2) % 3 for own in own_windows]))
    grid, model = context.model.path.grid(4), context.model
    x = context.normal("start", batch)
    for place in range(4):  # each video by itself, by the formula
        now = model.path.abar.double()[grid[place]]
        then = model.path.abar.double()[grid[place + 1]] if place < 3 else torch.ones(())
        with torch.no_grad():
            found = model.predict(x, grid[place], batch.text_BLD, 3.0)
        rows = []
        for row, own in enumerate(own_windows):
            std = ((1 - then) / (1 - now) * (1 - now / then)).sqrt() if place in own else torch.zeros(())
            mean = then.sqrt() * found.x0[row].double() + (1 - then - std**2).sqrt() * found.eps[row].double()
            noise = randomness.normal(model.latent_shape, 0, "ddim", [(batch.serials[row], place)])[0]
            rows.append((mean + std * noise).float())
            assert rollout.log_probability_TB[place, row].isfinite() == (place in own) if place < 3 else True
        x = torch.stack(rows)
    torch.testing.assert_close(rollout.latents_BCFhw, x, atol=1e-4, rtol=1e-4)


def test_a_window_is_drawn_for_each_prompt_of_each_batch() -> None:
    method = make(
        {"name": "grpo", "window": 2, "window_range": [0, 0.5]}, sampling={"steps": 21}, train={"group_size": 4}
    )
    firsts = [own[0] for own in windows(method.context, clips(method, tuple(range(4000))))]
    assert all(firsts[i] == firsts[i - i % 4] for i in range(4000)), "the videos of a prompt differ"
    counts = [firsts[::4].count(first) for first in range(9)]
    assert sum(counts) == 1000, "a window lies beyond the first half"
    assert max(abs(count - 1000 / 9) for count in counts) < 5 * math.sqrt(1000 / 9)
    assert {len(own) for own in windows(method.context, clips(method))} == {2}
    assert {*windows(grpo().context, clips(grpo()))} == {range(3)}
    late = make(
        {"name": "grpo", "window": 1, "window_range": [0.7, 1]}, sampling={"steps": 21}, train={"group_size": 4}
    )
    assert {own[0] for own in windows(late.context, clips(late, tuple(range(400))))} == set(range(14, 20))
    again = windows(method.context, clips(method, (9, 8)))
    assert again == windows(method.context, clips(method, (8, 9)))[::-1], "it depends on who is beside a video"


def test_videos_of_a_prompt_may_start_from_the_same_noise() -> None:
    for same in (True, False):
        method = grpo(window=1, window_range=[0, 0.4], same_start=same)
        seen: list[Tensor] = []
        predict = method.context.model.predict

        def noting(x: Tensor, *rest: Any, predict: Any = predict, seen: list[Tensor] = seen, **more: Any) -> Any:
            seen.append(x)
            return predict(x, *rest, **more)

        method.context.model.predict = noting
        method.collect(clips(method))
        assert len(seen[0]) == (2 if same else 4), "two prompts"
        rollout = method.collect(clips(method))[0][0]
        starts = [states[0] for states in rollout.states if 0 in states]
        assert len(starts) == 4
        assert torch.equal(starts[0], starts[1]) == torch.equal(starts[2], starts[3]) == same
        assert not torch.equal(starts[0], starts[2])


def test_videos_that_are_alike_are_seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chains of a prompt are one until the window: rows of the denoiser, the videos and the gradient."""
    gradients, latents, counts = [], [], []
    for shared in (True, False):
        method = make(
            {"name": "grpo", "window": 1, "same_start": True, "kl": 0.1},
            sampling={"steps": 6}, train={"batch_size": 8, "group_size": 4, "micro_batch": 4},
        )  # fmt: skip
        if not shared:
            monkeypatch.setattr(
                rollout_module, "alike_before", lambda serials, *_: torch.arange(len(serials)).expand(6, -1)
            )
        predict, rows = method.context.model.predict, list[int]()

        def counting(x: Tensor, *rest: Any, predict: Any = predict, rows: list[int] = rows, **more: Any) -> Any:
            rows.append(len(x))
            return predict(x, *rest, **more)

        method.context.model.predict = counting
        batch = clips(method, tuple(range(8)))
        firsts = [windows(method.context, batch)[row][0] for row in (0, 4)]
        gradient, updates = flat_gradient(method, batch)
        gradients.append(gradient)
        latents.append(torch.cat([u.samples.frames_BSCHW for u in updates if u.samples]))
        counts.append(sum(rows))
    chains = [first + 1 + 4 * (5 - first) for first in firsts]
    assert counts == [sum(chains) + 2 * 2, 2 * (4 * 6 + 2 * 4)], "the window's own step and its replay are shared"
    torch.testing.assert_close(latents[0], latents[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-3)


def test_inverse_weights_make_all_steps_move_the_policy_alike() -> None:
    method = grpo(step_weight="inverse")
    rollout, reach_T = roll_out(method.context, clips(method)), reach_of_steps(method.context)
    weights = [method.weights(rollout.at(torch.full((4,), place))) for place in range(3)]
    products = torch.stack([weight[0] * reach for weight, reach in zip(weights, reach_T, strict=True)])
    torch.testing.assert_close(products, products[:1].expand(3))
    assert float(torch.stack(weights).mean()) == pytest.approx(1, rel=1e-5)
    assert reach_T[0] < reach_T[-1] / 2, "the steps differ too little for the test"
    # By finite differences of the mean in the predicted noise, x held fixed.
    path = method.context.model.path
    abar, grid = path.abar.double(), path.grid(4)
    for place, (now, then) in enumerate(pairwise(grid)):
        a, b = abar[now], abar[then]
        std = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()

        def mean(eps: float, a: Tensor = a, b: Tensor = b, std: Tensor = std) -> Tensor:
            return b.sqrt() * (0.7 - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b - std**2).sqrt() * eps

        assert float(reach_T[place]) == pytest.approx(float(abs(mean(1.0) - mean(0.0)) / std), rel=1e-4)


def test_groups_are_standardised_by_themselves() -> None:
    rewards = [1.0, 3.0, math.nan, 10.0, 20.0, 30.0]
    deviation = math.sqrt(200 / 3)
    own = [-1.0, 1.0, 0.0, -10 / deviation, 0.0, 10 / deviation]
    assert group_advantages(rewards, 3, 5.0).tolist() == pytest.approx(own, rel=1e-5)
    assert group_advantages(rewards, 3, 0.5).tolist() == pytest.approx([-0.5, 0.5, 0, -0.5, 0, 0.5])
    mean = 64 / 5
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards if r == r) / 5)
    wide = [-1 / spread, 1 / spread, 0.0, -10 / spread, 0.0, 10 / spread]
    assert group_advantages(rewards, 3, 5.0, "batch").tolist() == pytest.approx(wide, rel=1e-5)
    for deviation_of in ("group", "batch"):
        alike = group_advantages([0.3, 0.3 + 1e-8, 5.0, 7.0], 2, 5.0, deviation_of).tolist()
        assert alike[:2] == [0.0, 0.0]
        assert alike[3] == -alike[2] > 0
    assert group_advantages([math.nan] * 4, 2, 5.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1])
def test_the_first_ratio_is_one(dtype: torch.dtype, window: int | None) -> None:
    method = make({"name": "grpo", "window": window}, dtype=dtype)
    _, updates = flat_gradient(method, clips(method))
    errors = [update.metrics["policy/first_ratio_error"][0] / 4 for update in updates]
    assert len(errors) == (window or 3)
    assert max(errors) < (2e-6 if dtype == torch.float32 else 2e-5)
    assert all(states.dtype == torch.float32 for states in method.collect(clips(method))[0][0].states[0].values())


@pytest.mark.slow
def test_larger_rollouts_give_the_same_losses_in_fewer_calls() -> None:
    gradients, calls = [], []
    for size in (1, 2, 4):
        method = grpo({"micro_batch": 1, "rollout_batch": size}, window=1)
        predict, rows = method.context.model.predict, list[int]()

        def counting(x: Tensor, *rest: Any, predict: Any = predict, rows: list[int] = rows, **more: Any) -> Any:
            rows.append(len(x))
            return predict(x, *rest, **more)

        method.context.model.predict = counting
        gradient, updates = flat_gradient(method, clips(method))
        gradients.append(gradient)
        calls.append(len(rows))
        assert sum(rows) == 4 * 4 + 4
        assert [update.step for update in updates] == [False] * 3 + [True]
        assert updates[0].samples.serials == [8, 9, 10, 11]
    assert calls == [20, 12, 8]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-3)


def test_a_rollout_keeps_the_steps_that_are_trained_alone() -> None:
    method = make({"name": "ddpo", "timestep_fraction": 0.25, "inner_epochs": 2}, sampling={"steps": 21})
    batch = clips(method)
    rollout = method.collect(batch)[0][0]
    trained = [{int(s) for epoch in (0, 1) for s in method.order(batch, epoch)[:, row]} for row in range(4)]
    assert max(map(len, trained)) <= 10
    assert [set(states) for states in rollout.states] == [own | {step + 1 for step in own} for own in trained]
    everything = roll_out(method.context, batch)
    assert torch.equal(everything.latents_BCFhw, rollout.latents_BCFhw)
    index_B = method.order(batch, 1)[3]
    for a, b in zip(vars(everything.at(index_B)).values(), vars(rollout.at(index_B)).values(), strict=True):
        assert torch.equal(a, b)


def test_the_base_is_pulled_to_and_the_adapter_comes_back() -> None:
    method = grpo(kl=1.0)

    def prediction() -> Tensor:
        batch, model = clips(method), method.context.model
        with torch.no_grad():
            return model.predict(batch.latents_BCFhw, 500, batch.text_BLD, 3.0).eps

    before = prediction()
    gradient, updates = flat_gradient(method, clips(method))
    assert updates[0].metrics["policy/kl"][0] > 0
    assert torch.equal(prediction(), before)
    with method.context.model.base():
        assert not torch.equal(prediction(), before)
    still = make({"name": "grpo", "kl": 1.0}, random=False)
    assert flat_gradient(still, clips(still))[1][0].metrics["policy/kl"][0] == 0
    away = grpo()
    assert (flat_gradient(away, clips(away))[0] - gradient).norm() > 1e-3 * gradient.norm()


def test_the_loss_of_a_batch_is_the_mean_over_its_videos_and_steps() -> None:
    method = grpo({"micro_batch": 2}, window=2)
    method.context.model = TwoParameters(method.context.model)
    rollouts, _ = method.collect(clips(method))
    updates = list(method.train(rollouts, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])], 4))
    assert sum(float(update.loss.detach()) for update in updates) == pytest.approx(-11 / 4, rel=1e-4)
    assert [update.step for update in updates] == [False, False, False, True]


def test_a_lost_reward_has_no_advantage() -> None:
    method = grpo()
    method.context.reward = lambda frames, prompts: torch.tensor([1.0, math.nan, 2.0, 4.0])[:, None].expand(4, 2)
    batch = clips(method)
    _, scores = roll_out_and_score(method.context, batch)
    assert method.advantages(batch, scores).tolist() == pytest.approx([0, 0, -1, 1], rel=1e-5)
    assert method.state_dict() == {}


def test_eta_of_each_step_and_video() -> None:
    method = grpo()
    model, batch = method.context.model, clips(method)

    def chain(eta: Any, rows: list[int]) -> Tensor:
        part = batch.take(rows)
        with torch.no_grad():
            return denoise(
                model, method.context.normal("start", part), part.text_BLD, model.path.grid(4), guidance=3.0, eta=eta,
                noise=lambda index: method.context.normal("ddim", part, index),
            )  # fmt: skip

    mixed = chain(torch.tensor([[1.0, 0.0, 0.3, 1.0]]).expand(4, -1), [0, 1, 2, 3])
    for row, eta in enumerate((1.0, 0.0, 0.3, 1.0)):
        torch.testing.assert_close(mixed[row], chain(eta, [row])[0], atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="needs a source of noise"):
        denoise(model, batch.latents_BCFhw, batch.text_BLD, model.path.grid(4), guidance=1.0, eta=torch.ones(4, 4))
    assert torch.equal(sample(method.context, batch), sample(method.context, batch, random=[range(3)] * 4))
    assert replay(method.context, roll_out(method.context, batch).at(torch.zeros(4).long())).kernel.spread.shape == (
        4,
        1,
        1,
        1,
        1,
    )


WRONG = [
    ({"method": "grpo"}, ["train.group_size = 1", "'grpo'", "2 or more"]),
    ({"method": {"name": "grpo", "window": 11, "window_range": [0, 0.5]}}, ["method.window = 11", "allowed: 1 to 10"]),
    (
        {"method": {"name": "grpo", "window_range": [0.5, 0.5]}},
        ["window_range = [0.5, 0.5]", "smaller than the second"],
    ),
    ({"method": "grpo", "sampling": {"eta": 0}}, ["sampling.eta = 0", "'grpo'", "sampling.eta=1"]),
    (
        {"method": {"name": "grpo", "kl": 1}, "model": {"finetune": "full"}},
        ["no copy of the base", "which method.kl compares", "or method.kl=0"],
    ),
    ({"method": "draft", "train": {"rollout_batch": 4}}, ["train.rollout_batch = 4", "'draft'", "train.micro_batch"]),
    (
        {"method": "ddpo", "train": {"batch_size": 16, "micro_batch": 2, "rollout_batch": 3}},
        ["train.rollout_batch = 3", "train.micro_batch = 2", "share of 16", "allowed: 2, 4, 8, 16"],
    ),
]


@pytest.mark.parametrize(("data", "words"), WRONG)
def test_what_does_not_fit_is_said_in_one_line(data: dict[str, Any], words: list[str]) -> None:
    train = {} if data == {"method": "grpo"} else {"group_size": 4}
    with pytest.raises(ValueError, match=r".") as error:
        parse_config(data | {"train": train | data.get("train", {})})
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_runs_of_versions_without_the_settings_go_on() -> None:
    dpok = parse_config({"method": "dpok", "train": {"batch_size": 16, "workers": 2}})
    assert dpok.fingerprint == "0934fc90c64c", "as it was before these settings"
    config = parse_config({"method": "ddpo", "train": {"batch_size": 16, "workers": 2}})
    assert config.fingerprint == "76a1545803dd", "as it was before these settings"
    other = config.model_copy(update={"train": config.train.model_copy(update={"rollout_batch": 8})})
    assert other.fingerprint != config.fingerprint
    assert other.rollout_batch == 8
    assert config.rollout_batch == config.micro_batch == 8
    for method in ({"name": "dpok", "window": 1}, {"name": "ddpo", "same_start": True}):
        train = {"batch_size": 16, "workers": 2, "group_size": 2}
        same = parse_config({"method": method["name"], "train": train})
        assert parse_config({"method": method, "train": same.train.model_dump()}).fingerprint != same.fingerprint
