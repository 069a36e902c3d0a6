"""The run's global order of samples.

Global batch k is the same set of samples for every number of workers W; worker r has every W-th of them from r on.

Only the functions that draw import torch: the feed then starts a second sooner.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def clip_indices(serials: Sequence[int] | np.ndarray, count: int, seed: int, *source: int) -> np.ndarray:
    """Returns the clips from which a run's samples start: each clip once an epoch, in the epoch's order.

    Args:
        serials: places of the samples in the run's global order, from 0.
        count: number of clips.
        seed: of the run.
        source: its number in a mixture, so that sources of one size differ in their order.

    Returns:
        int64 in [0, count) for each serial, a function of the serial, the count and the seed alone.

    Raises:
        ValueError: ``count`` is not positive or a serial is negative.
    """
    least = int(np.min(serials, initial=0))
    if count < 1 or least < 0:
        raise ValueError(f"serial = {least} of count = {count} clips: serial starts at 0 and count at 1")
    epochs, places = np.divmod(np.asarray(serials, dtype=np.int64), count)
    found, by_epoch = np.empty_like(places), np.argsort(epochs, kind="stable")
    present, starts = np.unique(epochs[by_epoch], return_index=True)
    for epoch, start, end in zip(present, starts, [*starts[1:], len(by_epoch)], strict=False):  # of none: no epoch
        of_epoch = by_epoch[start:end]
        found[of_epoch] = _order(count, seed, int(epoch), *source)[places[of_epoch]]
    return found


def mixed_indices(
    serials: Sequence[int] | np.ndarray, counts: Sequence[int], weights: Sequence[float], seed: int
) -> np.ndarray:
    """Returns the rows from which a run's samples start where sources are mixed by weights.

    The source of a draw follows a Kronecker sequence of the golden ratio from a seeded start, so that each source's
    share of any number of draws in a row stays within a few draws of its weight. Its rows come in the order of
    ``clip_indices``, each once an epoch of that source.

    Args:
        serials: places of the draws in the run's global order, from 0.
        counts: number of rows of each source.
        weights: of the sources, positive; they need not add up to 1.
        seed: of the run.

    Returns:
        int64 for each serial: the number of rows of the sources before, and the place in its own.

    Raises:
        ValueError: a count is not positive or a serial is negative.
    """
    asked = np.asarray(serials, dtype=np.int64)
    if int(np.min(asked, initial=0)) < 0:
        raise ValueError("a serial is negative; serials start at 0")
    sources = _sources(int(np.max(asked, initial=-1)) + 1, weights, seed)
    found, mine = np.empty_like(asked), sources[asked]
    starts = np.cumsum([0, *counts])
    for number, count in enumerate(counts):
        places = np.cumsum(sources == number)[asked[mine == number]] - 1  # draws of this source before
        found[mine == number] = clip_indices(places, count, seed, number) + starts[number]
    return found


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The golden ratio's fraction, times 2^64; products overflow, which leaves their fraction."""


def _sources(draws: int, weights: Sequence[float], seed: int) -> np.ndarray:
    """Returns the number of the source of each of the first draws."""
    import torch

    from rlvid.randomness import generator

    start = np.uint64(int(torch.randint(2**62, (), generator=generator(seed, "mixture"))))
    points = (start + np.arange(draws, dtype=np.uint64) * _GOLDEN) >> np.uint64(11)
    borders = np.cumsum(weights)[:-1] / np.sum(weights) * 2.0**53
    return np.searchsorted(borders, points.astype(np.float64), side="right").astype(np.min_scalar_type(len(weights)))


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int, *source: int) -> np.ndarray:
    from rlvid.randomness import permutation

    return permutation(count, seed, "order", epoch, *source).numpy()
