"""Statistics that tables, the guard and the study share: intervals of means and shares, rankings, agreement.

All intervals are at 95 %. Student's t is SciPy's; the bootstrap draws prompts with all their videos, because the videos
of a prompt are not independent of each other.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

MIN_PROMPTS = 6
"""Prompts from which on a gain can be beyond chance: that 5 all go the same way has a probability of 1/16 by chance."""
RESAMPLES = 2000
_DRAWN_AT_ONCE = 2**20
"""Clusters that a bootstrap draws before it sums them: 8 MB of numbers."""
_UPPER = 0.975


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t with ``freedom`` degrees of freedom, which may be a fraction."""
    from scipy.special import stdtrit  # half a second, which commands that ask for no interval save

    return float(stdtrit(freedom, probability))


def finite_mean(values: Iterable[float]) -> float:
    """Averages the finite values; NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and standard deviation of a sample; NaN without any, or for fewer than two."""
    mean = float(values.mean()) if len(values) else math.nan
    return mean, float(values.std(ddof=1)) if len(values) > 1 else math.nan


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Returns the points, of finite values, that no other beats: as high in every value and higher in one.

    From the highest first value on, a point can be beaten by points before it alone, and then by one of the front.
    """
    front = dict[tuple[float, ...], None]()
    for point in sorted(set(points), reverse=True):
        if not any(all(x >= y for x, y in zip(other, point, strict=True)) for other in front):
            front[point] = None
    return [point for point in points if point in front]


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of Student's 95 % interval of it (NaN for one value)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    return mean, t_quantile(_UPPER, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def one_sided_half(values: Sequence[float], level: float) -> float:
    """Distance from a mean to the end of its one-sided t interval, which misses with probability ``level``.

    NaN for fewer than two values.
    """
    if len(values) < 2:
        return math.nan
    return t_quantile(1 - level, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def welch(*samples: Sequence[float]) -> float:
    """Half of Welch's 95 % interval of the difference of two means (B. L. Welch, Biometrika 34, 1947).

    An empty sample's mean is known exactly. NaN for a sample of one, and for two empty ones.
    """
    if any(len(sample) == 1 for sample in samples) or not any(samples):
        return math.nan
    parts = [(float(np.var(sample, ddof=1)) / len(sample), len(sample) - 1) for sample in samples if sample]
    total = sum(part for part, _ in parts)
    if not total:
        return 0.0
    freedom = total**2 / sum(part**2 / free for part, free in parts)
    return t_quantile(_UPPER, freedom) * math.sqrt(total)


def bootstrap_means(
    values: np.ndarray, clusters: np.ndarray, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Returns the mean of each resample (R,), where whole clusters are drawn with replacement, as many as there are.

    Args:
        values: N numbers.
        clusters: N labels; here a prompt's index.
        resamples: R.
        generator: of the draws.
    """
    _, place = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)
    means, at_once = np.empty(resamples), max(1, _DRAWN_AT_ONCE // len(sums))
    for first in range(0, resamples, at_once):  # the draws are the same however many are taken at once
        part = means[first : first + at_once]
        drawn = generator.integers(0, len(sums), (len(part), len(sums)))
        part[:] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return means


def bootstrap_interval(values: np.ndarray, clusters: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean: percentiles over ``bootstrap_means``; NaN for fewer than two clusters."""
    if len(np.unique(clusters)) < 2:
        return math.nan, math.nan
    low, high = np.percentile(
        bootstrap_means(values, clusters, resamples, np.random.default_rng(0)), [100 * (1 - _UPPER), 100 * _UPPER]
    )
    return float(low), float(high)


def beyond_chance(low: float, high: float, prompts: int) -> int:
    """1 where the whole interval of a difference is above 0, -1 where it is below, else 0.

    Also 0 with fewer than ``MIN_PROMPTS`` prompts, for which a bootstrap's interval is too narrow.
    """
    return 0 if prompts < MIN_PROMPTS else int(low > 0) - int(high < 0)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share in [0, 1] that was seen in ``count`` trials (Wilson 1927); (0, 1) without any.

    SciPy's takes whole successes, and a tie is half a one.
    """
    if not count:
        return 0.0, 1.0
    from scipy.special import ndtri

    z = float(ndtri(_UPPER))
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
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


def calibration(
    predicted: np.ndarray, seen: np.ndarray, bins: int = 10
) -> tuple[list[tuple[int, float, float]], float]:
    """Holds predicted probabilities against shares that were seen, in bins of equal width.

    Args:
        predicted: N probabilities.
        seen: N shares in [0, 1], such as the votes for what was predicted.
        bins: of the predictions.

    Returns:
        For each bin that is not empty its count, mean prediction and mean share; and the expected calibration error,
        the mean distance of the two weighed by the counts (Guo et al., ICML 2017, equation 3).
    """
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    rows = [
        (int(own.sum()), float(predicted[own].mean()), float(seen[own].mean()))
        for own in (place == number for number in range(bins))
        if own.any()
    ]
    return rows, sum(count * abs(a - b) for count, a, b in rows) / len(predicted)
