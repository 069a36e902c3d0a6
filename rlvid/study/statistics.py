"""What choices between pairs add up to: an interval, a ranking, and how far people agree."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share in [0, 1] that was seen in ``count`` trials (Wilson 1927); (0, 1) without any."""
    if not count:
        return 0.0, 1.0
    scale = 1 + Z**2 / count
    centre = (share + Z**2 / (2 * count)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bradley_terry(wins_MM: np.ndarray) -> np.ndarray:
    """Log-strengths (M,), of mean 0: the first of two models wins with probability 1 / (1 + exp(s_2 - s_1)).

    By Hunter's MM algorithm (2004). Entry (i, j) says how often i won against j; a tie is half a win for both.
    All are NaN where no finite maximum exists: some models never won, or never lost, against all others.
    """
    models = len(wins_MM)
    reach = np.linalg.matrix_power((wins_MM > 0) + np.eye(models), models) > 0
    if not reach.all():
        return np.full(models, np.nan)
    strength, played, won = np.ones(models), wins_MM + wins_MM.T, wins_MM.sum(1)
    for _ in range(100_000):
        updated = won / (played / (strength[:, None] + strength)).sum(1)
        updated /= np.exp(np.log(updated).mean())
        if np.abs(updated / strength - 1).max() < 1e-12:
            break
        strength = updated
    return np.log(updated)


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float:
    """Krippendorff's alpha for nominal answers: 1 is full agreement, 0 what chance gives.

    Args:
        units: for each thing that was judged, the answers of those who judged it; fewer than two count for nothing.

    Returns:
        NaN where nothing was judged twice, or all answers are the same one.
    """
    judged = [Counter(unit) for unit in units if len(unit) > 1]
    total: Counter[Hashable] = sum(judged, Counter())
    count = total.total()
    expected = sum(number * (count - number) for number in total.values())
    if not expected:
        return math.nan
    observed = sum(sum(n * (unit.total() - n) for n in unit.values()) / (unit.total() - 1) for unit in judged)
    return 1 - (count - 1) * observed / expected
