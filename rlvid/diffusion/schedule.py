"""The start of a partial chain, and the check of a run's chain against the model's noise path."""

from collections.abc import Sequence

import torch

from rlvid.config import RunConfig
from rlvid.config.methods import kept_steps
from rlvid.diffusion.step import KERNELS
from rlvid.models.noise_path import NoisePath


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
        ValueError: the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"start = {share}; allowed: noise levels above 0 and below 1")
    start = path.at_share(share)
    return [start, *(point for point in grid if point < start)]


def check_chain(config: RunConfig) -> None:
    """Checks that the model's noise path has the chain of the settings, and that an adapter acts where it learns.

    Raises:
        ValueError: the path lacks ``sampling.final_level`` or ``sampling.kernel``, or the method learns at no level of
            ``model.lora.levels``, so that the reward would teach the adapter nothing.
    """
    sampling, limits = config.sampling, config.model.lora.levels
    if (sampling.final_level, sampling.kernel, limits) == ("exact", "ddim", None):
        return
    from rlvid.models.load import path_outline  # seconds of imports, for such runs alone

    path = path_outline(config.model)
    point_D = torch.tensor(path.grid(sampling.steps))
    path.final(sampling.final_level, point_D)
    now, then = (path.level(point_T, torch.empty(len(point_T))) for point_T in (point_D[:-1], point_D[1:]))
    KERNELS[sampling.kernel](now, then, config.eta)
    if limits is None:
        return
    level_D = (path.timestep(point_D, point_D.device).double() / path.train_steps).tolist()
    levels = [level_D[step] for step in config.method.learning_steps(sampling.steps)]
    if not any(limits[0] <= level < limits[1] for level in levels):
        raise ValueError(
            f"model.lora.levels = {list(limits)}: method {config.method.name!r} learns at the noise levels "
            f"{levels[-1]:g} to {levels[0]:g} of the chain, and the adapter acts at none of them; choose a range that "
            f"holds one, such as [{levels[-1]:g}, 1]"
        )
