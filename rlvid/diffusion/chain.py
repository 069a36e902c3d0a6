"""The denoising chain with a window of gradient: a prefix without a graph, then the last K steps with one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvid.diffusion.forecast import Forecast
from rlvid.diffusion.step import Kernel, KernelOf, ddim, step_mean
from rlvid.models.base import VideoModel
from rlvid.models.guidance import Guidance, guidance_at
from rlvid.models.noise_path import Prediction


@dataclass(frozen=True)
class Step:
    """A step of the chain: ``before`` at a point of the noise path, then ``after`` ~ N(mean, spread^2).

    The kernel's spread is a number, or one for each video where their steps differ in eta; 0 is a deterministic step.
    """

    index: int
    point: float
    before: Tensor
    prediction: Prediction
    mean: Tensor
    kernel: Kernel
    after: Tensor


def offset_noise(noise_BCFhw: Tensor, offset_BCF: Tensor, strength: float) -> Tensor:
    """Adds noise that is constant over a frame's pixels: InstructVideo's N(0, 1) + 0.1 N(0, 1) of (b, c, f, 1, 1)."""
    return noise_BCFhw + strength * offset_BCF[..., None, None]


def denoise(
    model: VideoModel,
    latents_BCFhw: Tensor,
    text_BLD: Tensor,
    grid: Sequence[float],
    *,
    guidance: Guidance,
    eta: float | Tensor = 0.0,
    kernel: KernelOf = ddim,
    gradient_steps: int = 0,
    reuse: int = 1,
    noise: Callable[[int], Tensor] | None = None,
    final: str = "exact",
    recompute: bool = True,
    unconditional_gradient: bool = True,
    alike: Tensor | None = None,
    observe: Callable[[Step], None] | None = None,
) -> Tensor:
    """Runs a chain from noisy to clean latents: DDIM, or Euler's steps on a flow.

    Args:
        model: predicts (x0, eps), and has the noise path.
        latents_BCFhw: latents at the noise level of ``grid[0]``.
        text_BLD: prompt embeddings.
        grid: points of the noise path to visit, from noisy to clean.
        guidance: classifier-free guidance g, at all steps or at the noise levels of an interval, with or without
            gradient.
        eta: 0 is deterministic; above 0, ``noise(step)`` gives each step's standard normal (B, C, F, h, w). A number,
            or one for each step and video (D, B).
        kernel: of the random steps.
        gradient_steps: K, last steps that carry gradient; 0 runs all under ``no_grad``.
        reuse: n, of the steps without gradient the denoiser is called at the first two and at every n-th; see
            ``rlvid.diffusion.forecast``.
        noise: needed when eta > 0.
        final: ``exact`` ends at (1, 0), the prediction x0 itself; ``paper`` at the level of timestep 0.
        recompute: recompute the activations of the denoiser's layers in the backward pass.
        unconditional_gradient: whether the unconditional branch of guidance carries gradient.
        alike: int64 (D, B), on the CPU: for each step a video that has the same latents and prompt before it; the
            denoiser sees such videos once.
        observe: called with each step as it was taken.

    Returns:
        Clean latents_BCFhw, float32.

    Raises:
        ValueError: K outside the chain, eta > 0 without noise, or a final level that the path lacks.
    """
    if not 0 <= gradient_steps <= len(grid):
        raise ValueError(
            f"gradient_steps = {gradient_steps}; the chain has {len(grid)} steps, allowed: 0 to {len(grid)}"
        )
    random_D = (eta > 0).any(1).tolist() if isinstance(eta, Tensor) else [eta > 0] * len(grid)
    random_D[-1] = False  # the result carries no fresh noise
    if any(random_D) and noise is None:
        raise ValueError(f"eta = {eta} needs a source of noise")

    x = latents_BCFhw.to(torch.promote_types(torch.float32, latents_BCFhw.dtype))
    forecast = Forecast(model.path, reuse) if reuse > 1 else None
    levels = [*(model.path.level(point, x) for point in grid), model.path.final(final, x)]
    for index, point in enumerate(grid):
        with_gradient = index >= len(grid) - gradient_steps
        with torch.set_grad_enabled(with_gradient and torch.is_grad_enabled()):
            g, prediction = guidance_at(guidance, model.path, point), None
            if forecast is not None and not with_gradient:
                prediction = forecast.prediction(index, point, g, x)
            if prediction is None:
                rows, place_B = distinct(None if alike is None else alike[index])
                prediction = model.predict(
                    x[rows],
                    point,
                    text_BLD[rows],
                    g,
                    unconditional_gradient=unconditional_gradient,
                    recompute=recompute,
                ).take(place_B)
                if forecast is not None and not with_gradient:
                    forecast.keep(point, g, prediction)
            taken = kernel(levels[index], levels[index + 1], _at(eta, index, x) if random_D[index] else 0.0)
            before, x = x, step_mean(prediction, levels[index + 1], taken)
            mean = x
            if random_D[index]:
                assert noise is not None
                x = x + taken.spread * noise(index).to(x)
        if observe is not None:
            observe(Step(index, point, before, prediction, mean, taken, x))
    return x


def distinct(alike_B: Tensor | None) -> tuple[Any, Any]:
    """Returns the videos that differ, and for each video its place among them; all of them for None."""
    if alike_B is None:
        return slice(None), slice(None)
    rows, place_B = alike_B.unique(return_inverse=True)
    return (slice(None), slice(None)) if len(rows) == len(alike_B) else (rows, place_B)


def _at(eta: float | Tensor, index: int, like: Tensor) -> float | Tensor:
    return eta[index].to(like).reshape(-1, *[1] * (like.dim() - 1)) if isinstance(eta, Tensor) else eta
