"""The timesteps of a chain, and the start of a partial chain."""

from rlvid.config import RunConfig
from rlvid.config.methods import kept_steps

_TRAIN_STEPS = 1000


def timesteps(steps: int) -> list[int]:
    """Returns DDIM's timesteps, from noisy to clean, in leading spacing: 951, 901, ..., 51, 1 for 20 steps.

    Raises:
        ValueError: ``steps`` outside 1 .. 500: with more, the grid stays too far below full noise.
    """
    if not 1 <= steps <= _TRAIN_STEPS // 2:
        raise ValueError(f"sampling.steps = {steps}; allowed: 1 to {_TRAIN_STEPS // 2}")
    stride = _TRAIN_STEPS // steps
    return [index * stride + 1 for index in reversed(range(steps))]


def partial(grid: list[int], tau: float) -> list[int]:
    """Returns the last int(tau * D) timesteps of a grid, InstructVideo's editing chain: from 551 for D = 20, tau = 0.6.

    Raises:
        ValueError: no step is left, or tau is over 1.
    """
    count = kept_steps(len(grid), tau)
    if not 1 <= count <= len(grid):
        raise ValueError(f"tau = {tau} keeps {count} of {len(grid)} steps; allowed: 1 to {len(grid)}")
    return grid[len(grid) - count :]


def check_levels(config: RunConfig) -> None:
    """Checks that an adapter acts at a step of the chain that the method learns at (``model.lora.levels``).

    Raises:
        ValueError: it acts at none of them, and the reward would teach it nothing.
    """
    limits = config.model.lora.levels
    if limits is None:
        return
    grid = timesteps(config.sampling.steps)
    levels = [grid[step] / _TRAIN_STEPS for step in config.method.learning_steps(config.sampling.steps)]
    if not any(limits[0] <= level < limits[1] for level in levels):
        raise ValueError(
            f"model.lora.levels = {list(limits)}: method {config.method.name!r} learns at the noise levels "
            f"{levels[-1]:g} to {levels[0]:g} of the chain, and the adapter acts at none of them; choose a range that "
            f"holds one, such as [{levels[-1]:g}, 1]"
        )
