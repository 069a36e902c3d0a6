"""The start of a partial chain, and the check of a run's chain against the model's noise path."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlvid.config import RunConfig
from rlvid.config.methods.base import Method
from rlvid.config.methods.policy_gradient import PolicyGradient
from rlvid.config.methods.reward_gradient import DraftLVConfig, InstructVideoConfig, RewardGradient, kept_steps
from rlvid.config.methods.supervised import Supervised
from rlvid.config.prefix import check_length
from rlvid.diffusion.step import KERNELS
from rlvid.models.decoded import check_decoding
from rlvid.models.guidance import LimitedGuidance
from rlvid.models.levels import acts_at
from rlvid.models.noise_path import NoisePath

_ROUNDING = 1e-6
"""Share of a level that rounding may add to a step's noise."""


def partial(grid: Sequence[float], tau: float) -> Sequence[float]:
    """Returns the last int(tau * D) points of a grid, InstructVideo's editing chain: from 551 for D = 20, tau = 0.6.

    Raises:
        ValueError: no step is left, or tau is over 1.
    """
    count = kept_steps(len(grid), tau)
    if not 1 <= count <= len(grid):
        raise ValueError(f"tau = {tau} keeps {count} of {len(grid)} steps; allowed: 1 to {len(grid)}")
    return grid[len(grid) - count :]


def from_level(path: NoisePath, grid: Sequence[float], share: float) -> list[float]:
    """Returns the chain that starts where noise has a share, sigma / (alpha + sigma): there, then on the grid below.

    On a flow the share is s. On ModelScopeT2V's path 0.658 is timestep 551.

    Raises:
        ValueError: the share is not between 0 and 1, or below the last point of the grid.
    """
    if not 0 < share < 1:
        raise ValueError(f"method.start = {share}; allowed: noise levels above 0 and below 1")
    start = path.at_share(share)
    if start < grid[-1]:
        last = path.level(grid[-1], torch.empty(1, dtype=torch.float64))
        raise ValueError(
            f"method.start = {share} leaves no step of sampling.steps = {len(grid)}, of which the last begins at the "
            f"noise level {float(last.sigma / (last.alpha + last.sigma)):.3g}; start there or above, or set more steps"
        )
    return [start, *(point for point in grid if point < start)]


def editing_chain(method: InstructVideoConfig, path: NoisePath, grid: Sequence[float]) -> Sequence[float]:
    """Returns the points that InstructVideo's chain visits, of a whole chain's.

    Raises:
        ValueError: as ``partial`` and ``from_level``, or fewer points than steps with gradient.
    """
    if method.start is None:
        assert method.tau is not None, "the config has one of the two"
        return partial(grid, method.tau)
    chain = from_level(path, grid, method.start)
    if method.gradient_steps > len(chain):
        raise ValueError(
            f"method.gradient_steps = {method.gradient_steps} exceeds the {len(chain)} steps that run from "
            f"method.start = {method.start:g}; allowed: 1 to {len(chain)}"
        )
    return chain


def with_prefix(grid: Sequence[float], gradient_steps: int, prefix_steps: int | None) -> Sequence[float]:
    """Returns a chain whose part without gradient visits fewer points, evenly chosen in their order, the first one too.

    Args:
        grid: the points of the chain.
        gradient_steps: K, last points, which stay.
        prefix_steps: of the points before them; None for all, as is a number that is not below theirs.
    """
    points = len(grid) - gradient_steps
    if prefix_steps is None or prefix_steps >= points:
        return grid
    return [*(grid[step * points // prefix_steps] for step in range(prefix_steps)), *grid[points:]]


def learning_points(method: Method, path: NoisePath, grid: Sequence[float]) -> Sequence[float]:
    """Returns the points at which a method's denoiser may get gradient, of a whole chain's.

    Raises:
        ValueError: as ``editing_chain``.
    """
    if isinstance(method, InstructVideoConfig):
        return editing_chain(method, path, grid)[-method.gradient_steps :]
    if isinstance(method, DraftLVConfig) and method.start is not None:
        return [path.at_share(method.start)]
    return [grid[step] for step in method.learning_steps(len(grid))]


def random_steps(method: Method, chain: Sequence[float]) -> range:
    """Returns the steps of a method's chain that may add noise; the last one never does."""
    return method.window_steps(len(chain)) if isinstance(method, PolicyGradient) else range(len(chain) - 1)


def check_chain(config: RunConfig) -> None:
    """Checks that the model's noise path has the chain of the settings, and that an adapter acts where it learns.

    Raises:
        ValueError: the path lacks ``sampling.final_level``, ``sampling.kernel`` or ``method.start``, or the kernel
            ``sampling.eta``, the method learns at no level of ``model.lora.levels``, so that the reward would teach the
            adapter nothing, the chain from ``method.start`` has too few steps for ``sampling.prefix_steps`` or
            ``sampling.reuse``, or a setting means nothing: a kernel without noise, a guidance interval without a step
            of the chain, a setting of the unconditional branch where guidance leaves it out, or as ``check_decoding``.
    """
    check_decoding(config)
    _check_guidance(config)
    sampling, method, limits = config.sampling, config.method, config.model.lora.levels
    needs_path = limits, sampling.guidance_interval, getattr(method, "start", None)
    if (sampling.final_level, sampling.kernel, *needs_path) == ("exact", "ddim", None, None, None):
        return
    from rlvid.models.load import path_outline  # seconds of imports, for such runs alone

    path = path_outline(config.model)
    grid = path.grid(sampling.steps)
    chain = editing_chain(method, path, grid) if isinstance(method, InstructVideoConfig) else grid
    if isinstance(method, InstructVideoConfig):
        check_length(sampling, len(chain) - method.gradient_steps)
    point_D, random = torch.tensor(chain), random_steps(method, chain)
    path.final(sampling.final_level, point_D)
    now, then = (
        path.level(point_T, torch.empty(len(point_T)))
        for point_T in (point_D[random.start : random.stop], point_D[random.start + 1 : random.stop + 1])
    )
    kernel = KERNELS[sampling.kernel](now, then, config.eta)
    if (kernel.spread > then.sigma * (1 + _ROUNDING)).any():
        largest = float(config.eta * (then.sigma / kernel.spread).min()) * (1 + _ROUNDING)
        window = ", or let other steps be random: method.window_range" if isinstance(method, PolicyGradient) else ""
        raise ValueError(
            f"sampling.eta = {config.eta:g}: with sampling.kernel = {sampling.kernel!r} a step of this chain would add "
            f"more noise than the level after it holds; allowed: 0 to {math.floor(1000 * largest) / 1000:g}{window}"
        )
    if sampling.kernel != "ddim" and (config.eta == 0 or not random):
        raise ValueError(
            f"sampling.kernel = {sampling.kernel!r} is the noise that sampling.eta = {config.eta:g} adds, and no step "
            "of this chain adds any; set sampling.eta, such as sampling.eta=0.5, and two steps or more, or leave the "
            "kernel out"
        )
    learning_K = torch.tensor(learning_points(method, path, grid))
    _check_guided(config, path, chain, learning_K)
    if limits is None:
        return
    level_K = path.timestep(learning_K, learning_K.device).double() / path.train_steps
    if not acts_at(limits, level_K).any():
        last, first = float(level_K[-1]), float(level_K[0])
        low = math.floor(last * 1000) / 1000 if last < 1 else 0.9  # rounded up, it might lie above the last level
        raise ValueError(
            f"model.lora.levels = {list(limits)}: method {method.name!r} learns at the noise levels {last:g} to "
            f"{first:g} of the chain, and the adapter acts at none of them; choose a range that holds one, such as "
            f"[{low:g}, 1]"
        )


def _check_guidance(config: RunConfig) -> None:
    """Checks that a run without guidance has no setting of guidance."""
    sampling, method = config.sampling, config.method
    if sampling.guidance != 1:
        return
    if isinstance(method, RewardGradient) and not method.unconditional_gradient:
        setting, way_out = "method.unconditional_gradient = false", "leave unconditional_gradient out"
    elif isinstance(method, Supervised) and method.guided:
        setting, way_out = "method.guided = true", "leave guided out"
    else:
        return
    raise ValueError(
        f"{setting}: sampling.guidance = 1 is without guidance, and there is no unconditional branch; set another "
        f"guidance, such as 3, or {way_out}"
    )


def _check_guided(config: RunConfig, path: NoisePath, chain: Sequence[float], learning_K: Tensor) -> None:
    """Checks that guidance in an interval acts at a step of the chain, and at one that is learned at if it must."""
    sampling, method = config.sampling, config.method
    everywhere = getattr(method, "kl_at", None) == "path" or (isinstance(method, Supervised) and method.guided)
    if sampling.guidance_interval is None or everywhere:  # guided predictions at random levels of the whole path
        return
    limited = LimitedGuidance(sampling.guidance, *sampling.guidance_interval)

    def guided(point_K: Tensor) -> bool:
        return bool((torch.as_tensor(limited.at(path, point_K)) != 1).any())

    carried = 0 if isinstance(method, DraftLVConfig) else len(learning_K)  # its chain ends before the step that learns
    visited_D = torch.tensor([*with_prefix(chain, carried, sampling.prefix_steps), *learning_K.tolist()])
    shown = f"sampling.guidance_interval = {list(sampling.guidance_interval)}"
    if not guided(visited_D):
        share_D = path.share(visited_D)
        raise ValueError(
            f"{shown}: the chain's steps are at noise levels {float(share_D.max()):.3g} to {float(share_D.min()):.3g}, "
            f"and none of them is in the interval; choose one that holds some, such as {_from_half(share_D)}, or leave "
            "guidance_interval out"
        )
    if not isinstance(method, RewardGradient) or method.unconditional_gradient:
        return
    if not guided(learning_K):
        share_K = path.share(learning_K)
        raise ValueError(
            f"method.unconditional_gradient = false: method {method.name!r} learns at the noise levels "
            f"{float(share_K.max()):.3g} to {float(share_K.min()):.3g}, none of them is in {shown}, and there is no "
            f"unconditional branch; choose an interval that holds one, such as {_from_half(share_K)}, or leave "
            "unconditional_gradient out"
        )


def _from_half(share_K: Tensor) -> str:
    """Returns an interval of guidance that holds the noisiest of some levels."""
    return f"[{math.floor(500 * float(share_K.max())) / 1000:g}, 1]"
