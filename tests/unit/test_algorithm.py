"""InstructVideo's loss and gradient, the plain engine, and randomness that belongs to the sample."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context, Stopwatch, Update
from rlvid.algorithms.instructvideo import InstructVideo
from rlvid.config import OptimizerConfig, parse_config
from rlvid.models.lora import inject_lora, lora_parameters
from rlvid.reward.clip import ClipReward
from rlvid.toy.tiny import tiny_model, tiny_reward
from rlvid.train.engine import TorchEngine

PROMPTS = ["a red circle moving left", "a dog", "a blue star growing", "a red circle moving left"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def make(
    *, random: bool = True, dtype: torch.dtype = torch.float32, held_out: bool = False, **sections: dict[str, Any]
) -> InstructVideo:
    """The method on the tiny model with an adapter: two steps of four are run, the last one with gradient."""
    settings = {"sampling": {"steps": 4}, "method": {"tau": 0.5}, "train": {"batch_size": 4}, "reward": {"segments": 2}}
    config = parse_config({k: settings.get(k, {}) | sections.get(k, {}) for k in settings.keys() | sections.keys()})
    model = tiny_model()
    for part in (model.denoiser, model.vae, model.text_encoder):
        part.to(dtype)
    generator = torch.Generator().manual_seed(2)
    for parameter in inject_lora(model.denoiser, 2, TARGETS, seed=0):
        if random:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    other = tiny_reward(7) if held_out else None
    return InstructVideo(Context(config, model, tiny_reward(), other, Stopwatch(torch.device("cpu"))))


def clips(method: InstructVideo, serials: tuple[int, ...] = (8, 9, 10, 11)) -> Batch:
    """A clip and a prompt for each serial, whatever the others are."""
    model = method.context.model
    latents = randomness.normal(model.latent_shape, 0, "clip", [(s,) for s in serials])
    prompts = [PROMPTS[s % 4] for s in serials]
    return Batch(2, list(serials), prompts, model.encode_prompts(prompts), latents, 4)


def parameters(method: InstructVideo) -> list[nn.Parameter]:
    return lora_parameters(method.context.model.denoiser)


def flat_gradient(method: InstructVideo, batch: Batch) -> tuple[Tensor, list[Update]]:
    """The accumulated gradient of one optimiser step."""
    updates = []
    for update in method.updates(batch):
        update.loss.backward()
        updates.append(update)
    return torch.cat([p.grad.flatten() for p in parameters(method) if p.grad is not None]), updates


# --------------------------------------------------------------------------------------------------- InstructVideo


@pytest.mark.parametrize(("final", "weights"), [("exact", "paper"), ("paper", "normalised")])
def test_the_loss_is_the_papers(final: str, weights: str) -> None:
    """Noise, diffusers' chain, all frames decoded, a frame of each segment weighed by hand."""
    method = make(sampling={"steps": 4, "final": final}, reward={"segments": 2, "weights": weights})
    batch, model = clips(method), method.context.model
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=final == "exact",
        steps_offset=1,
    )
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[2:].tolist() == [251, 1]
    with torch.no_grad():
        x = scheduler.add_noise(batch.latents_BCFhw, method.noise(batch), torch.full((4,), 251))
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(model.predict(x, int(t), batch.text_BLD, 3.0).eps, t, x).prev_sample
        frames = model.vae.decode(x.transpose(1, 2).flatten(0, 1) / model.vae.config.scaling_factor).sample
        scores = method.context.reward((frames / 2 + 0.5).unflatten(0, (4, 4)), batch.prompts)
    chosen = method.plan(batch).frames_BS
    assert ((chosen // 2) == torch.tensor([0, 1])).all(), "one frame of each segment"
    weight = torch.exp(-(chosen - 2).abs().float())
    divisor = 2 if weights == "paper" else weight.sum(1)
    expected = (weight * scores.gather(1, chosen)).sum(1) / divisor
    update = method.loss(batch)
    assert update.samples is not None
    torch.testing.assert_close(update.samples.reward_B, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(update.loss.detach(), (1 - expected).mean(), atol=1e-5, rtol=0)


def test_the_gradient_of_the_whole_loss_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with every step in the window (a prefix without gradient is no constant) and no clamp of pixels."""
    single = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda t: t if t.dtype == torch.float64 else single(t))
    method = make(method={"tau": 0.5, "gradient_steps": 2})
    context, reward = method.context, tiny_reward()
    for part in (context.model.denoiser, context.model.vae, context.model.text_encoder, reward):
        part.double()
    context.reward = ClipReward(reward.clip, reward.tokenise, torch.sigmoid)  # type: ignore[arg-type]
    batch = clips(method, (8, 9))
    batch = Batch(2, batch.serials, batch.prompts, batch.text_BLD, batch.latents_BCFhw.double(), 2)
    loss = method.loss(batch).loss
    assert loss.dtype == torch.float64
    gradient = torch.autograd.grad(loss, parameters(method))
    start = [p.detach().clone() for p in parameters(method)]

    @torch.no_grad()
    def loss_at(direction: list[Tensor], distance: float) -> float:
        for p, origin, way in zip(parameters(method), start, direction, strict=True):
            p.copy_(origin + distance * way)
        return float(method.loss(batch).loss)

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        way = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start]
        h = 1e-4
        slope = (8 * (loss_at(way, h) - loss_at(way, -h)) - (loss_at(way, 2 * h) - loss_at(way, -2 * h))) / (12 * h)
        assert slope == pytest.approx(float(sum((g * w).sum() for g, w in zip(gradient, way, strict=True))), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_add_up_to_the_batch(micro_batch: int) -> None:
    whole, parts = make(), make(train={"batch_size": 4, "micro_batch": micro_batch})
    expected, (one,) = flat_gradient(whole, clips(whole))
    got, updates = flat_gradient(parts, clips(parts))
    assert [u.step for u in updates] == [False] * (4 // micro_batch - 1) + [True]
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert float(sum(u.loss.detach() for u in updates)) == pytest.approx(float(one.loss.detach()), abs=1e-6)
    for name in ("reward", "score"):
        sums = [sum(u.metrics[name][i] for u in updates) for i in (0, 1)]
        assert sums == pytest.approx(list(one.metrics[name]), abs=1e-5)


def test_a_sample_depends_on_its_serial_alone() -> None:
    method = make()

    def rewards(*serials: int) -> dict[int, float]:
        with torch.no_grad():
            samples = method.loss(clips(method, serials)).samples
        assert samples is not None
        assert samples.serials == list(serials)
        return dict(zip(serials, samples.reward_B.tolist(), strict=True))

    together = rewards(8, 9, 10, 11)
    assert rewards(11, 9, 8, 10) == pytest.approx(together, abs=1e-6)
    assert rewards(10) | rewards(8, 11) | rewards(9) == pytest.approx(together, abs=1e-6)
    assert rewards(8)[8] != pytest.approx(rewards(12)[12], abs=1e-5)  # the same prompt, another draw


def test_eta_draws_new_noise_for_each_step_of_a_sample() -> None:
    still, noisy = make(), make(sampling={"steps": 4, "eta": 1.0})
    rewards = [method.loss(clips(method)).samples for method in (still, noisy, noisy)]
    assert torch.equal(rewards[1].reward_B, rewards[2].reward_B)
    assert (rewards[0].reward_B - rewards[1].reward_B).abs().min() > 1e-5


def test_noise_has_an_offset_that_is_constant_over_a_frame() -> None:
    method, plain = make(), make(method={"tau": 0.5, "offset_noise": 0.0})
    serials = tuple(range(64))
    batch = clips(method, serials)
    offset = method.noise(batch) - plain.noise(batch)
    assert (offset - offset[..., :1, :1]).abs().max() < 1e-6
    assert float(offset[..., 0, 0].std()) == pytest.approx(0.1, rel=0.1)
    assert float(plain.noise(batch).std()) == pytest.approx(1.0, rel=0.01)
    correlation = torch.corrcoef(torch.stack([offset[..., 0, 0].flatten(), plain.noise(batch)[..., 0, 0].flatten()]))
    assert correlation[0, 1].abs() < 0.15


def test_only_the_adapter_gets_gradient_and_all_of_it() -> None:
    method = make(random=False)
    model, reward = method.context.model, method.context.reward
    engine = TorchEngine(model.denoiser, OptimizerConfig(lr=1e-2, warmup=0))
    names = [n for n, p in model.denoiser.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in names)

    def alive() -> set[str]:
        for update in method.updates(clips(method)):
            engine.backward(update.loss, update.step)
        return {n for n, p in model.denoiser.named_parameters() if p.grad is not None and p.grad.any()}

    assert alive() == {n for n in names if "lora_B" in n}
    engine.step(0)
    assert alive() == set(names)
    for module in (model.vae, model.text_encoder, reward.clip):
        assert all(p.grad is None for p in module.parameters())
    assert not any(module.training for module in (model.denoiser, model.vae, model.text_encoder, reward.clip))


def test_frozen_weights_may_be_bfloat16() -> None:
    method = make(dtype=torch.bfloat16)
    gradient, (update,) = flat_gradient(method, clips(method))
    assert update.samples is not None
    assert update.loss.dtype == update.samples.reward_B.dtype == gradient.dtype == torch.float32
    assert torch.isfinite(gradient).all()
    exact, (reference,) = flat_gradient(full := make(), clips(full))
    assert torch.nn.functional.cosine_similarity(gradient, exact, dim=0) > 0.9
    assert float((update.loss - reference.loss).detach()) == pytest.approx(0, abs=0.02)


def test_metrics_and_samples_of_an_update() -> None:
    method = make(held_out=True)
    (update,) = method.updates(clips(method))
    samples, metrics = update.samples, update.metrics
    assert samples is not None
    assert {name: count for name, (_, count) in metrics.items()} == {
        "reward": 4, "score": 8, "held_out": 8, "saturated": 1, "frame_weight/0": 4, "frame_weight/1": 4
    }  # fmt: skip
    assert metrics["reward"][0] == pytest.approx(float(samples.reward_B.sum()), abs=1e-5)
    assert metrics["held_out"][0] != pytest.approx(metrics["score"][0], abs=1e-3)
    weight = torch.exp(-(samples.frames_BS - 2).abs().float()) / 2
    assert [metrics[f"frame_weight/{i}"][0] for i in (0, 1)] == pytest.approx(weight.sum(0).tolist())
    torch.testing.assert_close((weight * samples.scores_BS).sum(1), samples.reward_B, atol=1e-6, rtol=0)
    assert samples.frames_BSCHW.shape == (4, 2, 3, 16, 16)
    assert 0 <= samples.frames_BSCHW.min() < samples.frames_BSCHW.max() <= 1
    assert not samples.frames_BSCHW.requires_grad
    assert {"chain", "decode", "reward", "held-out"} == set(method.context.stopwatch.read())
    assert method.context.stopwatch.read() == {}


def test_state_that_a_method_does_not_keep_is_refused() -> None:
    method = make()
    method.load_state_dict(method.state_dict())
    with pytest.raises(ValueError, match=r"InstructVideo keeps no state, but the checkpoint holds \['buffer'\]"):
        method.load_state_dict({"buffer": 1})


# ----------------------------------------------------------------------------------------------------------- engine


def layer() -> nn.Linear:
    torch.manual_seed(3)
    module = nn.Linear(4, 3)
    module.bias.requires_grad_(False)
    return module


def loss_of(module: nn.Module, index: int) -> Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(index))
    return module(x).square().sum()


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_the_engine_is_adamw_with_warm_up_and_clipping(clip_norm: float) -> None:
    module, reference = layer(), layer()
    engine = TorchEngine(
        module, OptimizerConfig(lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, warmup=4, clip_norm=clip_norm)
    )
    optimizer = torch.optim.AdamW([reference.weight], betas=(0.8, 0.9), weight_decay=0.3)
    for index in range(6):
        engine.backward(loss_of(module, index), last=False)
        engine.backward(loss_of(module, index + 10), last=True)
        outcome = engine.step(index)
        (loss_of(reference, index) + loss_of(reference, index + 10)).backward()
        assert reference.weight.grad is not None
        norm = float(reference.weight.grad.norm())
        if clip_norm:
            reference.weight.grad *= clip_norm / norm
        optimizer.param_groups[0]["lr"] = 0.1 * [0.25, 0.5, 0.75, 1, 1, 1][index]
        optimizer.step()
        optimizer.zero_grad()
        assert outcome.gradient_norm == pytest.approx(norm, rel=1e-4)
        assert outcome.lr == pytest.approx(optimizer.param_groups[0]["lr"])
        assert not outcome.skipped
        torch.testing.assert_close(module.weight, reference.weight, atol=1e-5, rtol=0)
    assert torch.equal(module.bias, reference.bias)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(bad: float) -> None:
    module, reference = layer(), layer()
    engines = [TorchEngine(each, OptimizerConfig(lr=0.1, warmup=0)) for each in (module, reference)]
    for each, engine in zip((module, reference), engines, strict=True):
        engine.backward(loss_of(each, 0), last=True)
        engine.step(0)
    before = module.weight.detach().clone()
    engines[0].backward(loss_of(module, 1) * bad, last=True)
    outcome = engines[0].step(1)
    assert outcome.skipped
    assert not math.isfinite(outcome.gradient_norm)
    assert torch.equal(module.weight, before)
    for each, engine in zip((module, reference), engines, strict=True):
        engine.backward(loss_of(each, 2), last=True)
        assert not engine.step(2).skipped
    assert torch.equal(module.weight, reference.weight), "the skipped step left something behind"


def test_an_interrupted_engine_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    config = OptimizerConfig(lr=0.1, warmup=3, weight_decay=0.1)

    def run(module: nn.Module, engine: TorchEngine, steps: range) -> None:
        for index in steps:
            engine.backward(loss_of(module, index), last=True)
            engine.step(index)

    straight, first, second = layer(), layer(), layer()
    run(straight, TorchEngine(straight, config), range(6))
    engine = TorchEngine(first, config)
    run(first, engine, range(3))
    engine.save(tmp_path)
    second.weight.data.zero_()
    engine = TorchEngine(second, config)
    engine.load(tmp_path)
    assert torch.equal(second.weight, first.weight)
    run(second, engine, range(3, 6))
    assert torch.equal(second.weight, straight.weight)


# ------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("draw", [randomness.normal, randomness.uniform])
def test_a_row_depends_on_its_position_alone(draw: Any) -> None:
    positions = [(3, 0), (7, 1), (11, 0)]
    rows = draw((2, 5), 1, "noise", positions)
    torch.rand(10)
    assert rows.shape == (3, 2, 5)
    assert torch.equal(draw((2, 5), 1, "noise", positions[::-1]), rows.flip(0))
    assert torch.equal(draw((2, 5), 1, "noise", positions[1:2]), rows[1:2])
    others = [
        (1, "noise", (3, 1)),
        (1, "noise", (30,)),
        (1, "offset", (3, 0)),
        (2, "noise", (3, 0)),
        (13, "noise", (0,)),
    ]
    for seed, purpose, position in others:
        assert not torch.equal(draw((2, 5), seed, purpose, [position])[0], rows[0])


def test_draws_have_their_distribution() -> None:
    positions = [(i,) for i in range(2000)]
    normal, uniform = (draw((4,), 0, "x", positions) for draw in (randomness.normal, randomness.uniform))
    assert float(normal.mean()) == pytest.approx(0, abs=0.04)
    assert float(normal.std()) == pytest.approx(1, abs=0.04)
    assert 0 <= uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1].abs() < 0.1


def test_a_permutation_is_one() -> None:
    order = randomness.permutation(100, 0, "order", 1)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, randomness.permutation(100, 0, "order", 1))
    assert not torch.equal(order, randomness.permutation(100, 0, "order", 2))
    assert not torch.equal(order, torch.arange(100))
