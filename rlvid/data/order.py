"""The run's global order of samples.

Global batch k is the same set of samples for every number of workers W; worker r has every W-th of them from r on.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rlvid.randomness import permutation


def clip_indices(serials: Sequence[int] | np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns the clips from which a run's samples start: each clip once an epoch, in the epoch's order.

    Args:
        serials: places of the samples in the run's global order, from 0.
        count: number of clips.
        seed: of the run.

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
        found[of_epoch] = _order(count, seed, int(epoch))[places[of_epoch]]
    return found


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(count, seed, "order", epoch).numpy()
