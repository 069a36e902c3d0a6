"""Schedule, noise and the DDIM step, held to diffusers' scheduler."""

import pytest
import torch
from helpers import scheduler
from torch import Tensor
from torch.distributions import Normal

from rlvid.diffusion.chain import offset_noise
from rlvid.diffusion.ddim import log_probability, sigma, step_mean
from rlvid.diffusion.schedule import partial, timesteps
from rlvid.models.base import Prediction
from rlvid.models.unet3d import UNet3DModel
from rlvid.toy.tiny import tiny_model


@pytest.fixture(scope="module")
def base() -> UNet3DModel:
    return tiny_model()


# ------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize("steps", [1, 5, 20, 50, 499, 500])
def test_timesteps_are_those_of_diffusers(steps: int) -> None:
    assert timesteps(steps) == scheduler(steps).timesteps.tolist()


def test_a_partial_chain_starts_where_the_paper_says(base: UNet3DModel) -> None:
    grid = partial(timesteps(20), 0.6)
    assert grid == [551, 501, 451, 401, 351, 301, 251, 201, 151, 101, 51, 1]
    assert float(base.abar[551]) == pytest.approx(0.2128, abs=5e-5)
    assert partial(timesteps(20), 1.0) == timesteps(20)


@pytest.mark.parametrize(
    ("steps", "tau", "left"), [(50, 0.58, 29), (50, 0.6, 30), (20, 0.35, 7), (20, 0.599, 11), (3, 1 / 3, 1)]
)
def test_tau_keeps_whole_steps_whatever_floats_do(steps: int, tau: float, left: int) -> None:
    assert len(partial(timesteps(steps), tau)) == left


@pytest.mark.parametrize("steps", [0, -1, 501])
def test_impossible_step_counts_are_named(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps = {steps}; allowed: 1 to 500"):
        timesteps(steps)


@pytest.mark.parametrize("tau", [0.0, 0.04, 1.1])
def test_impossible_taus_are_named(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"tau = {tau} keeps \d+ of 20 steps; allowed: 1 to 20"):
        partial(timesteps(20), tau)


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
    reference = scheduler(20, final)
    abar = reference.alphas_cumprod[t]
    abar_prev = reference.alphas_cumprod[previous] if previous >= 0 else reference.final_alpha_cumprod
    spread = sigma(abar, abar_prev, eta)
    torch.testing.assert_close(spread, eta * reference._get_variance(t, previous).sqrt(), atol=1e-7, rtol=1e-6)
    x, eps, z = torch.randn(3, 2, 4, 3, 2, 2).unbind()
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    expected = reference.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
    torch.testing.assert_close(
        step_mean(Prediction(x0, eps), abar_prev, spread) + spread * z, expected, atol=1e-5, rtol=0
    )


def test_log_probability_is_the_mean_normal_density_with_gradient_through_the_mean_alone() -> None:
    sample, mean = torch.randn(2, 3, 4, 2, 5, 5).requires_grad_().unbind()
    mean = mean.detach().requires_grad_()
    spread = torch.tensor(0.17)
    logp = log_probability(sample, mean, spread)
    reference = Normal(mean, spread).log_prob(sample.detach()).mean((1, 2, 3, 4))
    assert logp.shape == (3,)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, reference, atol=1e-5, rtol=1e-6)
    (expected,) = torch.autograd.grad(reference.sum(), mean)
    got, none = torch.autograd.grad(logp.sum(), [mean, sample], allow_unused=True)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-5)
    assert none is None
