"""Noise paths and steps, held to diffusers' schedulers and to published formulas."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import scheduler
from torch import Tensor
from torch.distributions import Normal

from rlvid.diffusion.chain import offset_noise
from rlvid.diffusion.schedule import from_level, partial
from rlvid.diffusion.step import (
    Kernel,
    KernelOf,
    coefficient_preserving,
    ddim,
    flow_sde,
    log_probability,
    reach,
    step_mean,
)
from rlvid.models.noise_path import Level, NoisePath, Prediction, RectifiedFlow
from rlvid.models.unet3d import UNet3DModel
from rlvid.toy.tiny import tiny_model


@pytest.fixture(scope="module")
def base() -> UNet3DModel:
    return tiny_model()


def flow_scheduler(shift: float, steps: int) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' Euler steps, on Wan's levels."""
    made = FlowMatchEulerDiscreteScheduler(shift=shift)
    made.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:steps])
    return made


# ---------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("steps", [1, 5, 20, 50, 499, 500])
def test_timesteps_are_those_of_diffusers(base: UNet3DModel, steps: int) -> None:
    assert base.path.grid(steps) == scheduler(steps).timesteps.tolist()


def test_a_partial_chain_starts_where_the_paper_says(base: UNet3DModel) -> None:
    grid = partial(base.path.grid(20), 0.6)
    assert grid == [551, 501, 451, 401, 351, 301, 251, 201, 151, 101, 51, 1]
    assert float(base.path.level(551, torch.zeros(1)).alpha ** 2) == pytest.approx(0.2128, abs=5e-5)
    assert partial(base.path.grid(20), 1.0) == base.path.grid(20)


@pytest.mark.parametrize(
    ("steps", "tau", "left"), [(50, 0.58, 29), (50, 0.6, 30), (20, 0.35, 7), (20, 0.599, 11), (3, 1 / 3, 1)]
)
def test_tau_keeps_whole_steps_whatever_floats_do(base: UNet3DModel, steps: int, tau: float, left: int) -> None:
    for path in (base.path, RectifiedFlow(3)):
        assert len(partial(path.grid(steps), tau)) == left


@pytest.mark.parametrize("steps", [0, -1, 501])
def test_impossible_step_counts_are_named(base: UNet3DModel, steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps = {steps}; allowed: 1 to 500"):
        base.path.grid(steps)


@pytest.mark.parametrize("tau", [0.0, 0.04, 1.1])
def test_impossible_taus_are_named(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"tau = {tau} keeps \d+ of 20 steps; allowed: 1 to 20"):
        partial(RectifiedFlow().grid(20), tau)


@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_levels_of_a_flow_are_wans_own(shift: float, steps: int) -> None:
    """Its formula on numpy's line, and diffusers' Euler scheduler, which must be given the line to shift but once."""
    uniform = np.linspace(1, 0, steps + 1)[:steps]
    expected = shift * uniform / (1 + (shift - 1) * uniform)
    path = RectifiedFlow(shift)
    assert path.grid(steps) == pytest.approx(expected.tolist(), rel=1e-12)
    reference = flow_scheduler(shift, steps)
    timestep_D = path.timestep(torch.tensor(path.grid(steps)), torch.device("cpu"))
    torch.testing.assert_close(timestep_D, reference.timesteps, atol=1e-4, rtol=1e-6)
    end = path.final("exact", timestep_D)
    assert (float(end.alpha), float(end.sigma), float(reference.sigmas[-1])) == (1, 0, 0)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_impossible_shifts_are_named(shift: float) -> None:
    with pytest.raises(ValueError, match=rf"shift = {shift}; allowed"):
        RectifiedFlow(shift)


def test_what_a_flow_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"sampling\.steps = 0; allowed"):
        RectifiedFlow().grid(0)
    with pytest.raises(ValueError, match=r"sampling\.final_level = 'paper'"):
        RectifiedFlow().final("paper", torch.zeros(1))


def test_a_chain_may_start_at_a_level(base: UNet3DModel) -> None:
    flow = RectifiedFlow(3)
    assert from_level(flow, flow.grid(20), 0.66) == [0.66, *(s for s in flow.grid(20) if s < 0.66)]
    assert from_level(base.path, base.path.grid(20), 0.658) == partial(base.path.grid(20), 0.6)
    for point in (1, 300, 999):
        level = base.path.level(point, torch.zeros(1, dtype=torch.float64))
        share = float(level.sigma / (level.alpha + level.sigma))
        assert base.path.at_share(share - 1e-9) == point
    assert base.path.at_share(1 - 1e-12) == 999
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"start = {share}; allowed"):
            from_level(flow, flow.grid(20), share)


def test_training_draws_points_as_the_family_does(base: UNet3DModel) -> None:
    uniform_B = torch.tensor([0.0, 0.25, 0.5, 0.9999])
    assert base.path.draw(uniform_B).tolist() == [0, 250, 500, 999]
    torch.testing.assert_close(RectifiedFlow(3).draw(uniform_B), 3 * uniform_B / (1 + 2 * uniform_B))


# ---------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("timestep", [0, 551, 999, torch.tensor([1, 901])])
def test_noise_is_added_as_diffusers_does(base: UNet3DModel, timestep: int | Tensor) -> None:
    clean, noise = torch.randn(2, 2, *base.latent_shape).unbind()
    expected = scheduler().add_noise(clean, noise, torch.as_tensor(timestep).expand(2))
    torch.testing.assert_close(base.add_noise(clean, noise, timestep), expected, atol=1e-6, rtol=0)


def test_offset_noise_is_constant_over_a_frame_and_has_its_strength() -> None:
    noise, offset = torch.zeros(64, 4, 8, 2, 3), torch.randn(64, 4, 8)
    noisy = offset_noise(noise, offset, 0.1)
    torch.testing.assert_close(noisy, 0.1 * offset[..., None, None].expand_as(noise), atol=0, rtol=0)
    assert torch.equal(offset_noise(noise + 2, offset, 0.0), noise + 2)


# ------------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize(("t", "previous"), [(951, 901), (551, 501), (51, 1), (1, -1)])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("final", ["exact", "paper"])
def test_one_step_is_the_one_of_diffusers(t: int, previous: int, eta: float, final: str) -> None:
    reference = scheduler(20, final)  # in float64: its 1 - abar / abar_prev loses digits at the clean end
    reference.alphas_cumprod = reference.alphas_cumprod.double()
    reference.final_alpha_cumprod = reference.final_alpha_cumprod.double()
    abar = reference.alphas_cumprod[t]
    abar_prev = reference.alphas_cumprod[previous] if previous >= 0 else reference.final_alpha_cumprod
    now, then = (Level(each.sqrt(), (1 - each).sqrt()) for each in (abar, abar_prev))
    kernel = ddim(now, then, eta)
    torch.testing.assert_close(kernel.spread, eta * reference._get_variance(t, previous).sqrt())
    x, eps, z = torch.randn(3, 2, 4, 3, 2, 2, dtype=torch.float64).unbind()
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    expected = reference.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
    torch.testing.assert_close(step_mean(Prediction(x0, eps), then, kernel) + kernel.spread * z, expected)


@pytest.mark.parametrize("shift", [3.0, 8.0])
def test_steps_of_a_flow_are_eulers(shift: float) -> None:
    path, reference = RectifiedFlow(shift), flow_scheduler(shift, 10)
    x, v_D = torch.randn(2, 4, 3, 2, 2), torch.randn(10, 2, 4, 3, 2, 2)
    expected, grid = x, path.grid(10)
    for point, v, t in zip(grid, v_D, reference.timesteps, strict=True):
        expected = reference.step(v, t, expected).prev_sample
        now = path.level(point, x)
        then = path.final("exact", x) if point == grid[-1] else path.level(grid[grid.index(point) + 1], x)
        prediction = path.prediction(v, x, now)
        torch.testing.assert_close(path.predicted(prediction), v, atol=2e-6, rtol=0)
        x = step_mean(prediction, then, ddim(now, then, 0.0))
        torch.testing.assert_close(x, expected, atol=3e-6, rtol=0)


def pair(path: NoisePath, first: float, second: float) -> tuple[Level, Level]:
    like = torch.zeros(1, 1, dtype=torch.float64)
    return path.level(first, like), path.level(second, like)


@pytest.mark.parametrize(("s", "then_s"), [(1.0, 0.98), (0.75, 0.6), (0.14, 0.02)])
@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_the_random_kernels_of_a_flow_are_the_published_ones(s: float, then_s: float, eta: float) -> None:
    """Flow-GRPO's SDE in terms of x and v, and coefficient-preserving sampling, as their code has them."""
    path = RectifiedFlow()
    x, v, z = torch.randn(3, 2, 8, dtype=torch.float64).unbind()
    now, then = pair(path, s, then_s)
    s, then_s = float(now.sigma), float(then.sigma)
    prediction = path.prediction(v, x, now)
    dt, noise = then_s - s, eta * math.sqrt(s / (1 - (then_s if s == 1 else s)))
    sde_mean = x * (1 + noise**2 / (2 * s) * dt) + v * (1 + noise**2 * (1 - s) / (2 * s)) * dt
    sde, cps = flow_sde(now, then, eta), coefficient_preserving(now, then, eta)
    torch.testing.assert_close(step_mean(prediction, then, sde), sde_mean)
    assert float(sde.spread) == pytest.approx(noise * math.sqrt(-dt))
    std = then_s * math.sin(eta * math.pi / 2)
    cps_mean = (x - s * v) * (1 - then_s) + (x + v * (1 - s)) * math.sqrt(then_s**2 - std**2)
    torch.testing.assert_close(step_mean(prediction, then, cps), cps_mean)
    assert float(cps.spread) == pytest.approx(std)
    for kernel, mean in ((sde, sde_mean), (cps, cps_mean)):
        after = mean + kernel.spread * z
        normal = Normal(mean, kernel.spread.expand_as(mean)).log_prob(after).mean(1)
        expected = normal if kernel is sde else -((after - mean) ** 2).mean(1)
        torch.testing.assert_close(log_probability(after, mean, kernel), expected.float(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel_of", [ddim, coefficient_preserving, flow_sde])
def test_without_eta_every_kernel_is_the_deterministic_step(kernel_of: KernelOf) -> None:
    now, then = pair(RectifiedFlow(), 0.75, 0.6)
    kernel = kernel_of(now, then, 0.0)
    assert torch.equal(kernel.spread, torch.zeros_like(then.sigma))
    assert torch.equal(kernel.direction, then.sigma)


@pytest.mark.parametrize("kernel_of", [ddim, coefficient_preserving])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_a_step_keeps_the_noise_of_its_level(base: UNet3DModel, kernel_of: KernelOf, eta: float) -> None:
    for path, points in ((base.path, (951, 901)), (RectifiedFlow(), (1.0, 0.9)), (RectifiedFlow(), (0.5, 0.3))):
        now, then = pair(path, *points)
        kernel = kernel_of(now, then, eta)
        torch.testing.assert_close(kernel.spread**2 + kernel.direction**2, then.sigma**2)


def test_noise_beyond_the_next_level_is_refused(base: UNet3DModel) -> None:
    with pytest.raises(ValueError, match=r"sampling\.eta: .* 1\.8, .* 0\.9; allowed: 0 to 1"):
        ddim(*pair(RectifiedFlow(), 1.0, 0.9), 2.0)
    with pytest.raises(ValueError, match=r"sampling\.kernel = 'flow-sde'"):
        flow_sde(*pair(base.path, 951, 901), 0.5)


@pytest.mark.parametrize("points", [(951, 901), (51, 1), (0.9, 0.75), (0.2, 0.1)])
def test_reach_is_the_move_of_the_mean_with_the_output(base: UNet3DModel, points: tuple[float, float]) -> None:
    path = base.path if points[0] > 1 else RectifiedFlow()
    now, then = pair(path, *points)
    kernel = ddim(now, then, 0.8)
    output, x = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True), torch.ones(1, 1, dtype=torch.float64)
    (moved,) = torch.autograd.grad(step_mean(path.prediction(output, x, now), then, kernel), output)
    torch.testing.assert_close(reach(path, now, then, kernel), moved.abs() / kernel.spread)


def test_log_probability_is_the_mean_normal_density_with_gradient_through_the_mean_alone() -> None:
    sample, mean = torch.randn(2, 3, 4, 2, 5, 5).requires_grad_().unbind()
    mean = mean.detach().requires_grad_()
    spread = torch.tensor(0.17)
    logp = log_probability(sample, mean, Kernel(spread, spread))
    reference = Normal(mean, spread).log_prob(sample.detach()).mean((1, 2, 3, 4))
    assert logp.shape == (3,)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, reference, atol=1e-5, rtol=1e-6)
    (expected,) = torch.autograd.grad(reference.sum(), mean)
    got, none = torch.autograd.grad(logp.sum(), [mean, sample], allow_unused=True)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-5)
    assert none is None
