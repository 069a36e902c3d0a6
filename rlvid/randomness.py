"""Randomness that belongs to the sample, not to the process.

Every draw comes from a generator seeded by what the draw is for. A result therefore depends neither on the
number of workers nor on an interruption, and no state of a random number generator has to be saved.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Returns a CPU generator for one purpose at one position, such as ``(step, sample index)``."""
    text = f"{seed}/{purpose}/" + "/".join(map(str, position))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape: tuple[int, ...], seed: int, purpose: str, positions: Sequence[tuple[int, ...]]) -> Tensor:
    """Returns standard normal draws (B, *shape), float32 on the CPU; row i comes from ``positions[i]`` alone."""
    return torch.stack([torch.randn(shape, generator=generator(seed, purpose, *p)) for p in positions])


def uniform(shape: tuple[int, ...], seed: int, purpose: str, positions: Sequence[tuple[int, ...]]) -> Tensor:
    """Uniform draws in [0, 1) of shape (B, *shape), float32 on the CPU; row i comes from ``positions[i]`` alone."""
    return torch.stack([torch.rand(shape, generator=generator(seed, purpose, *p)) for p in positions])


def permutation(count: int, seed: int, purpose: str, *position: int) -> Tensor:
    """Returns a permutation of 0 .. count - 1, int64."""
    return torch.randperm(count, generator=generator(seed, purpose, *position))
