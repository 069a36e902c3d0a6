"""Chains and methods on a rectified flow: the tiny U-Net, whose output counts as v = eps - x0."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import clips, close, flat_gradient, make, one_gradient
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.denoising import base_distance, noise_error
from rlvid.algorithms.rollout import reach_of_steps, replay, roll_out
from rlvid.algorithms.scoring import score
from rlvid.config import load_config, parse_config
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.schedule import check_chain
from rlvid.models.levels import limit_levels
from rlvid.models.noise_path import RectifiedFlow
from rlvid.train import preflight

SHIFT = 3.0


def flow(method: dict[str, Any], **sections: Any) -> Any:
    """A method on a flow model with an adapter, in chains of four steps: s = 1, 0.9, 0.75, 0.5."""
    made = make(method, **sections)
    made.context.model.path = RectifiedFlow(SHIFT)
    return made


def velocity(model: Any, x: Tensor, s: float, text_BLD: Tensor, guidance: float = 1.0) -> Tensor:
    """The network's guided output, called as Wan's pipeline does: the timestep is 1000 s."""
    t = torch.full((len(x),), 1000 * s)
    empty = model.encode_prompts([""]).expand_as(text_BLD)
    uncond, cond = (model.denoiser(x, t, encoder_hidden_states=each).sample for each in (empty, text_BLD))
    return uncond + guidance * (cond - uncond)


@pytest.mark.parametrize("start", [0, 2])
def test_the_chain_is_the_one_of_diffusers(start: int) -> None:
    context = (method := flow({"name": "draft"})).context
    batch, model = clips(method), context.model
    reference = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    reference.set_timesteps(sigmas=np.linspace(1, 0, 5)[:4])
    reference.set_begin_index(start)
    x = batch.latents_BCFhw
    with torch.no_grad():
        got = denoise(model, x, batch.text_BLD, context.grid[start:], guidance=3.0)
        for s, t in zip(context.grid[start:], reference.timesteps[start:], strict=True):
            x = reference.step(velocity(model, x, s, batch.text_BLD, 3.0), t, x).prev_sample
    torch.testing.assert_close(got, x, atol=2e-5, rtol=1e-5)


def test_instructvideo_edits_along_the_flow() -> None:
    """From s = 0.75 on, the last step with gradient, by hand."""
    method = flow({"name": "instructvideo", "tau": 0.5}, sampling={"steps": 4, "guidance": 1.0})
    batch, model = clips(method), method.context.model
    x = 0.25 * batch.latents_BCFhw + 0.75 * method.noise(batch)
    with torch.no_grad():
        x = x - 0.25 * velocity(model, x, 0.75, batch.text_BLD)
    x = x - 0.5 * velocity(model, x, 0.5, batch.text_BLD)
    expected = one_gradient(method, (1 - score(method.context, batch, x).reward_B).mean())
    close(flat_gradient(method, batch)[0], expected)


def test_distances_are_taken_on_v() -> None:
    context = (method := flow({"name": "rwr"})).context
    batch, model = clips(method), context.model
    clean, noise = batch.latents_BCFhw, context.normal("kl-noise", batch)
    uniform_B = randomness.uniform((), 0, "kl-timestep", [(serial, 0) for serial in batch.serials])
    s_B = (SHIFT * uniform_B / (1 + (SHIFT - 1) * uniform_B))[:, None, None, None, None]
    noisy = (1 - s_B) * clean + s_B * noise
    with torch.no_grad():
        v = model.denoiser(noisy, 1000 * s_B.flatten(), encoder_hidden_states=batch.text_BLD).sample
        error_B = noise_error(context, batch, clean, "kl")
        torch.testing.assert_close(error_B, (v - (noise - clean)).square().flatten(1).mean(1), atol=1e-5, rtol=1e-4)
        guided = context.config.sampling.guidance
        tuned = model.path.predicted(model.predict(noisy, s_B.flatten(), batch.text_BLD, guided))
        with model.base():
            base = model.path.predicted(model.predict(noisy, s_B.flatten(), batch.text_BLD, guided))
        distance_B = base_distance(context, batch, clean, "kl", unconditional_gradient=True)
    torch.testing.assert_close(distance_B, (tuned - base).square().flatten(1).mean(1), atol=1e-5, rtol=1e-4)
    assert distance_B.min() > 1e-3


@pytest.mark.parametrize("kernel", ["ddim", "cps", "flow-sde"])
def test_the_ratio_is_one_before_the_first_step(kernel: str) -> None:
    method = flow({"name": "grpo", "kl": 0.1, "step_weight": "inverse"}, sampling={"kernel": kernel, "eta": 0.7})
    rollout = roll_out(method.context, clips(method))
    assert rollout.point_D.tolist() == pytest.approx([1, 0.9, 0.75, 0.5])
    for place in range(3):
        taken = rollout.at(torch.full((4,), place))
        with torch.no_grad():
            now = replay(method.context, taken)
        assert taken.log_probability_B.isfinite().all()
        assert ((now.log_probability_B - taken.log_probability_B).exp() - 1).abs().max() < 5e-6
    reach_T = reach_of_steps(method.context)
    assert reach_T.shape == (3,)
    assert (reach_T > 0).all()
    gradient, _ = flat_gradient(method, clips(method))
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


@pytest.mark.parametrize("name", ["instructvideo", "draft", "draft-lv", "alignprop", "ddpo", "dpok", "rwr", "raft"])
def test_every_method_learns_on_a_flow(name: str) -> None:
    kl = {"kl": 0.1} if name in ("instructvideo", "draft", "draft-lv", "alignprop", "dpok") else {}
    denoising = {"denoising": 0.1, "kl_at": "path"} if name == "instructvideo" else {}
    window = {"window": 1} if name == "ddpo" else {}
    method = flow({"name": name} | kl | denoising | window)
    gradient, updates = flat_gradient(method, clips(method))
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
    assert all(update.loss.isfinite() for update in updates)
    assert ("policy/kl" in updates[0].metrics) == bool(kl)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((0.5, 0.8), {0.9: False, 0.8: False, 0.75: True, 0.5: True, 0.49: False}),
        ((0.9, 1.0), {1.0: True, 0.9: True, 0.75: False}),
    ],
)
def test_an_adapter_may_act_at_some_levels_alone(levels: tuple[float, float], expected: dict[float, bool]) -> None:
    """A range that ends at 1 includes 1, at which each chain of a flow begins."""
    method = flow({"name": "draft"})
    batch, model = clips(method), method.context.model
    limit_levels(model.denoiser, levels, model.path.train_steps)
    with torch.no_grad():
        for s, acts in expected.items():
            tuned = model.predict(batch.latents_BCFhw, s, batch.text_BLD, 1.0).x0
            with model.base():
                base = model.predict(batch.latents_BCFhw, s, batch.text_BLD, 1.0).x0
            assert torch.equal(tuned, base) != acts


def test_an_adapter_that_learns_at_pure_noise_alone_has_a_range() -> None:
    def checked(**sections: Any) -> None:
        model = {"path": "builtin-wan", "lora": {"levels": sections.pop("levels")}}
        check_chain(parse_config({"model": model, "method": {"name": "draft"}, **sections}))

    checked(levels=[0.97, 1], sampling={"steps": 1})
    with pytest.raises(ValueError, match=r"^model\.lora\.levels = \[0\.0, 0\.5\]: .* 1 to 1 .*such as \[0\.9, 1\]$"):
        checked(levels=[0, 0.5], sampling={"steps": 1})
    checked(levels=[0.9, 1], sampling={"steps": 1})


def test_the_range_that_an_error_names_is_allowed() -> None:
    """The last levels of chains, such as 3 / 14, are no decimal numbers, and rounded up they would be left out."""
    for steps in range(2, 41):
        draft: dict[str, Any] = {"sampling": {"steps": steps}, "method": "draft"}
        model: dict[str, Any] = {"path": "builtin-wan", "lora": {"levels": [0, 0.001]}}
        with pytest.raises(ValueError, match=r"such as \[.*, 1\]$") as refused:
            check_chain(parse_config({"model": model} | draft))
        low = float(str(refused.value).rsplit("[", 1)[1].split(",")[0])
        model = {"path": "builtin-wan", "lora": {"levels": [low, low + 0.002]}}
        check_chain(parse_config({"model": model} | draft))


def test_a_kernel_of_flows_is_refused_for_another_model() -> None:
    with pytest.raises(ValueError, match=r"^sampling\.kernel = 'flow-sde': "):
        preflight.check(parse_config({"method": "ddpo", "sampling": {"kernel": "flow-sde"}}))
    preflight.check(parse_config({"method": "ddpo", "sampling": {"kernel": "cps", "final_level": "paper"}}))


WAN_GRPO = ["model.path=builtin-wan", "sampling.kernel=flow-sde"]


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        (["method.window_range=[0,1]"], 0.683),
        (["method.window_range=[0,1]", "sampling.steps=50"], 0.706),
        (["method.window_range=[0,0.5]"], 0.875),
        (["method.window_range=[0,0.5]", "model.shift=1"], 0.843),
    ],
)
def test_an_eta_beyond_the_levels_of_the_random_steps_is_refused(settings: list[str], largest: float) -> None:
    """The default of 1 is; with shift s = 3 and D = 10 the last random step runs from 3 / 7 to 1 / 4."""
    with pytest.raises(ValueError, match=r"^sampling\.eta = 1: with sampling\.kernel = 'flow-sde' ") as refused:
        check_chain(load_config("toy-wan-grpo", WAN_GRPO + settings))
    assert str(refused.value).endswith(f"allowed: 0 to {largest}, or let other steps be random: method.window_range")
    check_chain(load_config("toy-wan-grpo", [*WAN_GRPO, *settings, f"sampling.eta={largest}"]))
    with pytest.raises(ValueError, match=r"^sampling\.eta = "):
        check_chain(load_config("toy-wan-grpo", [*WAN_GRPO, *settings, f"sampling.eta={largest + 0.001:g}"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["sampling.kernel=cps"], ["sampling.kernel = 'cps'", "sampling.eta = 0", "sampling.eta=0.5"]),
        (["sampling.kernel=flow-sde"], ["sampling.kernel = 'flow-sde'", "sampling.eta = 0"]),
        (["sampling.kernel=cps", "sampling.eta=0.5", "sampling.steps=1"], ["sampling.kernel = 'cps'", "no step"]),
        (
            ["method.unconditional_gradient=false", "sampling.guidance=1"],
            ["method.unconditional_gradient = false", "sampling.guidance = 1"],
        ),
        (["sampling.guidance_interval=[0,0.1]"], ["guidance_interval = [0.0, 0.1]", "1 to 0.136", "such as [0.5, 1]"]),
        (
            ["sampling.guidance_interval=[0.2,0.6]", "method.unconditional_gradient=false"],
            ["unconditional_gradient = false", "levels 0.136 to 0.136", "[0.2, 0.6]", "such as [0.068, 1]"],
        ),
    ],
)
def test_settings_of_a_chain_that_mean_nothing_are_refused(settings: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*leave [^\n]* out$") as refused:
        check_chain(load_config("toy-wan-draft", settings))
    assert all(word in str(refused.value) for word in words)


def test_settings_of_a_chain_that_mean_something_are_allowed() -> None:
    check_chain(load_config("toy-wan-draft", ["sampling.kernel=cps", "sampling.eta=0.5"]))
    check_chain(load_config("toy-wan-draft", ["method.unconditional_gradient=false"]))
    check_chain(load_config("toy-wan-draft", ["sampling.guidance=1"]))


def test_a_kernel_by_its_default_name_changes_no_fingerprint() -> None:
    plain, named, other = (
        parse_config({"method": "ddpo", "sampling": sampling}).fingerprint
        for sampling in ({}, {"kernel": "ddim"}, {"kernel": "cps"})
    )
    assert plain == named != other
