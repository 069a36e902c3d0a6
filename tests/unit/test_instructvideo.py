"""InstructVideo's loss and gradient."""

from typing import Any

import helpers
import pytest
import torch
from helpers import check_slopes, clips, flat_gradient, scheduler

from rlvid.algorithms.base import Batch
from rlvid.algorithms.instructvideo import InstructVideo
from rlvid.algorithms.scoring import plan
from rlvid.config import parse_config
from rlvid.config.train import OptimizerConfig
from rlvid.diffusion.schedule import check_chain, editing_chain
from rlvid.models.noise_path import RectifiedFlow
from rlvid.reward.clip import ClipReward
from rlvid.toy.tiny import tiny_reward
from rlvid.train.engine import TorchEngine


def make(method: dict[str, Any] | None = None, **options: Any) -> InstructVideo:
    """Two steps of four are run, the last one with gradient."""
    return helpers.make({"tau": 0.5} | (method or {}), **options)


# --------------------------------------------------------------------------------------------------- InstructVideo


@pytest.mark.parametrize(("final", "weights"), [("exact", "paper"), ("paper", "normalised")])
def test_the_loss_is_the_papers(final: str, weights: str) -> None:
    """Noise, diffusers' chain, all frames decoded, a frame of each segment weighed by hand."""
    method = make(sampling={"steps": 4, "final_level": final}, reward={"segments": 2, "tar_normalisation": weights})
    batch, model = clips(method), method.context.model
    ddim = scheduler(4, final)
    assert ddim.timesteps[2:].tolist() == [251, 1]
    with torch.no_grad():
        x = ddim.add_noise(batch.latents_BCFhw, method.noise(batch), torch.full((4,), 251))
        for t in ddim.timesteps[2:]:
            x = ddim.step(model.predict(x, int(t), batch.text_BLD, 3.0).eps, t, x).prev_sample
        frames = model.vae.decode(x.transpose(1, 2).flatten(0, 1) / model.vae.config.scaling_factor).sample
        scores = method.context.reward((frames / 2 + 0.5).unflatten(0, (4, 4)), batch.prompts)
    chosen = plan(method.context, batch).frames_BS
    assert ((chosen // 2) == torch.tensor([0, 1])).all(), "one frame of each segment"
    weight = torch.exp(-(chosen - 2).abs().float())
    divisor = 2 if weights == "paper" else weight.sum(1)
    expected = (weight * scores.gather(1, chosen)).sum(1) / divisor
    update = method.loss(batch)
    assert update.samples is not None
    torch.testing.assert_close(update.samples.reward_B, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(update.loss.detach(), (1 - expected).mean(), atol=1e-5, rtol=0)


def test_the_gradient_of_the_whole_loss_is_that_of_finite_differences() -> None:
    """In float64, with every step in the window (a prefix without gradient is no constant) and no clamp of pixels."""
    method = make(method={"tau": 0.5, "gradient_steps": 2})
    context, reward = method.context, tiny_reward()
    for part in (context.model.denoiser, context.model.vae, context.model.text_encoder, reward):
        part.double()
    context.reward = ClipReward(reward.clip, reward.tokenise, torch.sigmoid)  # type: ignore[arg-type]
    batch = clips(method, (8, 9))
    batch = Batch(2, batch.serials, batch.prompts, batch.text_BLD, batch.latents_BCFhw.double())
    check_slopes(method, batch)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_add_up_to_the_batch(micro_batch: int) -> None:
    whole, parts = make(), make(train={"batch_size": 4, "micro_batch": micro_batch})
    expected, (one,) = flat_gradient(whole, clips(whole))
    got, updates = flat_gradient(parts, clips(parts))
    assert [u.step for u in updates] == [False] * (4 // micro_batch - 1) + [True]
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert float(sum(u.loss.detach() for u in updates)) == pytest.approx(float(one.loss.detach()), abs=1e-6)
    for name in ("reward/weighted", "reward/trained"):
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
        "reward/weighted": 4, "reward/trained": 8, "reward/held_out": 8, "frames/saturated_share": 1,
        "frames/weight_0": 4, "frames/weight_1": 4, "reward/excluded": 1,
    }  # fmt: skip
    assert metrics["reward/weighted"][0] == pytest.approx(float(samples.reward_B.sum()), abs=1e-5)
    assert metrics["reward/held_out"][0] != pytest.approx(metrics["reward/trained"][0], abs=1e-3)
    weight = torch.exp(-(samples.frames_BS - 2).abs().float()) / 2
    assert [metrics[f"frames/weight_{i}"][0] for i in (0, 1)] == pytest.approx(weight.sum(0).tolist())
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


# -------------------------------------------------------------------------------------------------- start as a level


def test_the_level_of_the_papers_start_gives_its_chain_to_the_bit() -> None:
    """Timestep 251, the start of the last two of four steps, by its level."""
    expected, (one,) = flat_gradient(by_share := make(), clips(by_share))
    path = by_share.context.model.path
    level = path.level(251, torch.empty(1, dtype=torch.float64))
    start = float(level.sigma / (level.alpha + level.sigma))
    by_level = helpers.make({"start": start})
    assert by_level.method.tau is None
    got, (other,) = flat_gradient(by_level, clips(by_level))
    assert torch.equal(got, expected)
    assert torch.equal(one.loss, other.loss)


def test_on_a_flow_editing_starts_at_the_level_and_goes_on_along_the_grid() -> None:
    method = helpers.make({"start": 0.6}, sampling={"steps": 4, "guidance": 1.0})
    model = method.context.model
    model.path = RectifiedFlow(3.0)
    assert editing_chain(method.method, model.path, method.context.grid) == [0.6, pytest.approx(0.5)]
    batch = clips(method)
    with torch.no_grad():
        got = method.sample(batch)
        x = 0.4 * batch.latents_BCFhw + 0.6 * method.noise(batch)
        for s, then in ((0.6, 0.5), (0.5, 0.0)):
            t = torch.full((4,), 1000 * s)
            x = x + (then - s) * model.denoiser(x, t, encoder_hidden_states=batch.text_BLD).sample
    torch.testing.assert_close(got, x, atol=2e-5, rtol=1e-5)


def test_draft_lv_adds_its_noise_at_the_level() -> None:
    method = helpers.make({"name": "draft-lv", "start": 0.3}, sampling={"steps": 4, "guidance": 1.0})
    model = method.context.model
    model.path = RectifiedFlow(3.0)
    batch = clips(method)
    z = method.context.normal("low-variance", batch, 1)
    with torch.no_grad():
        x = 0.7 * batch.latents_BCFhw + 0.3 * z
        x = x - 0.3 * model.denoiser(x, torch.full((4,), 300.0), encoder_hidden_states=batch.text_BLD).sample
        torch.testing.assert_close(method.once_more(batch, batch.latents_BCFhw, 1), x, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"tau": 0.5, "start": 0.66}, r"tau = 0\.5 and start = 0\.66 both say.*method\.tau=null"),
        ({"tau": None}, r"tau = null and start = null"),
        ({"start": 0}, r"method\.start = 0.*greater than 0"),
        ({"start": 1}, r"method\.start = 1.*less than 1"),
    ],
)
def test_a_start_is_said_once(method: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"method": method})


def test_a_start_that_leaves_too_few_steps_is_refused_before_a_run() -> None:
    def checked(**method: Any) -> None:
        check_chain(parse_config({"method": method}))

    checked(start=0.66, gradient_steps=12)
    with pytest.raises(ValueError, match=r"^method\.start = 0\.01 leaves no step of sampling\.steps = 20, of which .*"):
        checked(start=0.01)
    with pytest.raises(ValueError, match=r"^method\.gradient_steps = 14 exceeds the 13 steps .*method\.start = 0\.66"):
        checked(start=0.66, gradient_steps=14)


def test_an_adapter_must_act_where_the_chain_of_a_start_learns() -> None:
    levels = {"lora": {"levels": [0.0, 0.02]}}
    check_chain(parse_config({"method": {"start": 0.66}, "model": levels}))
    with pytest.raises(ValueError, match=r"^model\.lora\.levels = \[0\.0, 0\.02\]: method 'draft-lv' learns"):
        check_chain(parse_config({"method": {"name": "draft-lv", "start": 0.3}, "model": levels}))


def test_a_start_is_part_of_a_run_and_its_default_is_not() -> None:
    plain, named, other = (parse_config({"method": each}) for each in ({}, {"start": None}, {"start": 0.66}))
    assert plain.fingerprint == named.fingerprint != other.fingerprint
    assert plain.fingerprint == "cc76c8fc07d3"
    assert parse_config(other.model_dump(mode="json")) == other
    assert parse_config({"method": {"name": "draft-lv"}}).fingerprint == "e8e4d5e42770"
