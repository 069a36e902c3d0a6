"""Limits an adapter to a range of noise levels, t / T: outside of it, the denoiser is the base model.

A batch may hold videos at several timesteps. So the adapter's share is multiplied row by row, by 1 within the range and
by 0 outside, in the one call for all of them: every worker makes the same calls, as ZeRO-3 needs.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_on: ContextVar[Tensor | None] = ContextVar("rows of the denoiser's batch in which the adapter acts", default=None)


def limit_levels(denoiser: nn.Module, levels: tuple[float, float], train_steps: int) -> None:
    """Makes the adapter of a denoiser act at some levels t / T alone, in place; see ``acts_at``.

    Args:
        denoiser: with an adapter; called as ``denoiser(latents_BCFhw, timestep, ...)``, with one timestep or one a row.
        levels: low and high, in [0, 1]; 0 is clean, 1 is noise.
        train_steps: T, timesteps of the noise schedule.
    """
    denoiser.forward = partial(_limited, denoiser.forward, levels, train_steps)
    for name, module in denoiser.named_modules():
        if name.endswith(".lora_B.default"):
            module.register_forward_hook(_share)


def acts_at(levels: tuple[float, float], level: Tensor) -> Tensor:
    """Returns at which levels t / T an adapter acts: low <= level < high, and high = 1 includes pure noise.

    Args:
        levels: low and high, in [0, 1].
        level: in [0, 1], of any shape.

    Returns:
        bool, in the shape of ``level``.
    """
    low, high = levels
    return (low <= level) & ((level < high) | (high == 1))


def _limited(
    forward: Callable[..., Any],
    levels: tuple[float, float],
    train_steps: int,
    latents_BCFhw: Tensor,
    timestep: int | Tensor,
    *inputs: Any,
    **options: Any,
) -> Any:
    timestep_B = torch.as_tensor(timestep, device=latents_BCFhw.device).expand(len(latents_BCFhw))
    before = _on.set(acts_at(levels, timestep_B.double() / train_steps))
    try:
        return forward(latents_BCFhw, timestep, *inputs, **options)
    finally:
        _on.reset(before)


def _share(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Multiplies an adapter's share; layers see frames or pixels as rows, a video's one after the other."""
    on_B = _on.get()
    if on_B is None:
        return output
    on_N = on_B.repeat_interleave(len(output) // len(on_B)).to(output.dtype)
    return output * on_N.reshape(-1, *[1] * (output.dim() - 1))
