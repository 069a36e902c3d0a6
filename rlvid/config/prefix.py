"""Checks the settings that make a chain's part without gradient cheaper against the method and its chain."""

from collections.abc import Iterator

from rlvid.config.methods import GRADIENT_METHODS
from rlvid.config.methods.base import Method
from rlvid.config.methods.reward_gradient import InstructVideoConfig, RewardGradient
from rlvid.config.model import SamplingConfig


def check_prefix(sampling: SamplingConfig, method: Method, eta: float) -> None:
    """Checks ``sampling.prefix_steps`` and ``sampling.reuse``.

    Raises:
        ValueError: the method trains on the chain's own steps or samples, the chain is random, or the part without
            gradient is too short. Only the noise path knows the chain from ``method.start``, and ``check_length`` is
            called there.
    """
    for setting in _set(sampling):
        if not isinstance(method, RewardGradient):
            raise ValueError(
                f"{setting} is for methods that back-propagate the reward ({GRADIENT_METHODS}); method "
                f"{method.name!r} trains on what its whole chain makes: leave it out"  # type: ignore[attr-defined]
            )
        if eta > 0:
            raise ValueError(
                f"{setting} needs a deterministic chain, and sampling.eta = {eta:g} adds noise; set sampling.eta=0, or "
                "leave it out"
            )
    from_level = isinstance(method, InstructVideoConfig) and method.tau is None
    if isinstance(method, RewardGradient) and not from_level:
        check_length(sampling, method.prefix_length(sampling.steps))


def check_length(sampling: SamplingConfig, length: int) -> None:
    """Checks the two settings against the number of a chain's steps without gradient.

    Raises:
        ValueError: ``sampling.prefix_steps`` leaves none of them out, or ``sampling.reuse`` exceeds them or saves
            none.
    """
    for setting in _set(sampling):
        if length < 2:
            raise ValueError(
                f"{setting}: the chain has {length} step{'s' * (length != 1)} without gradient, and nothing to save; "
                "leave it out, or set more steps"
            )
    if sampling.prefix_steps is not None and sampling.prefix_steps >= length:
        raise ValueError(
            f"sampling.prefix_steps = {sampling.prefix_steps} leaves out none of the chain's {length} steps without "
            f"gradient; allowed: 1 to {length - 1}, or null"
        )
    length = sampling.prefix_steps or length
    if sampling.reuse > 1 and sampling.reuse not in useful(length):
        raise ValueError(
            f"sampling.reuse = {sampling.reuse} saves none of the {length} steps without gradient, or exceeds them; "
            f"allowed: {', '.join(map(str, [1, *useful(length)]))}"
        )


def useful(length: int) -> list[int]:
    """Returns the values of ``sampling.reuse`` that save calls in so many steps without gradient."""
    return [n for n in range(2, length + 1) if any(step % n for step in range(2, length))]


def _set(sampling: SamplingConfig) -> Iterator[str]:
    """Yields the settings that are not at their defaults, as a message names them."""
    if sampling.prefix_steps is not None:
        yield f"sampling.prefix_steps = {sampling.prefix_steps}"
    if sampling.reuse > 1:
        yield f"sampling.reuse = {sampling.reuse}"
