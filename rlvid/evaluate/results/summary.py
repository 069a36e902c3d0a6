"""Summaries of the scores of videos, and comparisons of two models, prompt by prompt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rlvid.evaluate.results.rows import Row, metrics_of
from rlvid.shapes import ROUNDING
from rlvid.stats import RESAMPLES, beyond_chance, bootstrap_interval, mean_and_std


@dataclass(frozen=True)
class Summary:
    """Means and deviations over all videos of one model, prompt set and number of steps.

    ``mean`` and ``std`` (of a sample, over videos) of every metric are over the ``used[metric]`` videos where it is
    finite, and NaN where there are none (std: fewer than two). ``broken`` videos of ``count`` have no finite reward.
    """

    model: str
    set: str
    steps: int
    count: int
    broken: int
    mean: dict[str, float]
    std: dict[str, float]
    used: dict[str, int]


class BootstrapGain:
    """A mean gain with the ends of its 95 % interval, over ``prompts`` prompts."""

    prompts: int
    low: float
    high: float

    @property
    def way(self) -> int:
        """1 where a gain is above chance, -1 where a loss is, else 0; see ``rlvid.stats.beyond_chance``."""
        return beyond_chance(self.low, self.high, self.prompts)


@dataclass(frozen=True)
class Comparison(BootstrapGain):
    """The gain of a metric from base to tuned, over ``pairs`` of videos, of ``prompts``, where both are finite.

    ``low`` and ``high`` bound the 95 % interval of ``difference`` (percentiles of a paired bootstrap over prompts; NaN
    with fewer than two prompts). ``in_base_std`` is the difference in units of the base's standard deviation over
    videos.
    """

    base: str
    tuned: str
    set: str
    steps: int
    metric: str
    pairs: int
    prompts: int
    excluded: int
    difference: float
    low: float
    high: float
    in_base_std: float


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Mean, sample standard deviation and count of every metric for each (model, set, steps), in order of appearance.

    Scores that are not finite are left out and counted.
    """
    rows = list(rows)
    names = metrics_of(rows)
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.set, row.steps), []).append(row)
    summaries = []
    for (model, set_name, steps), group in groups.items():
        mean, std, used = {}, {}, {}
        for metric in names:
            values = np.array([row.score(metric) for row in group], dtype=np.float64)
            values = values[np.isfinite(values)]
            used[metric] = len(values)
            mean[metric], std[metric] = mean_and_std(values)
        summaries.append(Summary(model, set_name, steps, len(group), len(group) - used["reward"], mean, std, used))
    return summaries


def compare(base_rows: Iterable[Row], tuned_rows: Iterable[Row], *, resamples: int = RESAMPLES) -> list[Comparison]:
    """Compares two models: tuned minus base in every metric for each (set, steps), paired by (set, steps, index, copy).

    Args:
        base_rows: rows of one model.
        tuned_rows: rows of another model, from the same prompts, steps and seed.
        resamples: of the bootstrap over prompts; the videos of a prompt are drawn together.

    Raises:
        ValueError: the two do not hold the same videos, or one holds more than one model.
    """
    comparisons = []
    for (set_name, steps), pairs in pair_up(base_rows, tuned_rows).items():
        for metric in metrics_of(row for pair in pairs for row in pair):
            before, after, prompts = paired_scores(pairs, metric)
            gained = _paired(before, after, prompts, resamples)
            counts = (len(before), len(np.unique(prompts)), len(pairs) - len(before))
            comparisons.append(
                Comparison(pairs[0][0].model, pairs[0][1].model, set_name, steps, metric, *counts, *gained)
            )
    return comparisons


def pair_up(base_rows: Iterable[Row], tuned_rows: Iterable[Row]) -> dict[tuple[str, int], list[tuple[Row, Row]]]:
    """(set, steps) -> the videos of both models from the same prompt and noise.

    Raises:
        ValueError: as ``compare``.
    """
    base, tuned = _by_video(base_rows, "base"), _by_video(tuned_rows, "tuned")
    alone = sorted(base.keys() ^ tuned.keys())
    if alone:
        raise ValueError(
            f"compare: video (set, steps, index, copy) = {alone[0]} has one model's row only; evaluate both alike"
        )
    groups: dict[tuple[str, int], list[tuple[Row, Row]]] = {}
    for key, row in base.items():
        if row.prompt != tuned[key].prompt:
            raise ValueError(f"compare: video {key} has two prompts, {row.prompt!r} and {tuned[key].prompt!r}")
        groups.setdefault(key[:2], []).append((row, tuned[key]))
    return groups


def paired_scores(pairs: Sequence[tuple[Row, Row]], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Before, after and the prompt's index, of the videos where both scores are finite."""
    before, after = (np.array([pair[i].score(metric) for pair in pairs], dtype=np.float64) for i in (0, 1))
    both = np.isfinite(before) & np.isfinite(after)
    return before[both], after[both], np.array([pair[0].index for pair in pairs])[both]


def _by_video(rows: Iterable[Row], side: str) -> dict[tuple[str, int, int, int], Row]:
    found: dict[tuple[str, int, int, int], Row] = {}
    for row in rows:
        key = (row.set, row.steps, row.index, row.copy)
        if found.setdefault(key, row) is not row:
            raise ValueError(f"compare: the {side} rows hold video {key} twice")
    if len(models := {row.model for row in found.values()}) != 1:
        raise ValueError(f"compare: the {side} rows hold {len(models)} models; give the rows of one")
    return found


def _paired(
    before: np.ndarray, after: np.ndarray, prompts: np.ndarray, resamples: int
) -> tuple[float, float, float, float]:
    """Returns the mean difference, its 95 % interval by the paired bootstrap, and the same in base deviations."""
    gain = after - before
    if not len(gain):
        return (float("nan"),) * 4
    low, high = bootstrap_interval(gain, prompts, resamples)
    std = before.std(ddof=1) if len(gain) > 1 else 0.0
    real = std > ROUNDING * np.abs(before).max()  # else rounding made it
    return float(gain.mean()), low, high, float(gain.mean() / std) if real else float("nan")


def compare_all(rows: Iterable[Row], base: str | None = None) -> list[Comparison]:
    """Compares every other model with ``base`` (default: the first model); see ``compare``."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    if not by_model:
        raise ValueError("compare_all: no rows; evaluate at least one model")
    base = next(iter(by_model)) if base is None else base
    if base not in by_model:
        raise ValueError(f"compare_all: base = {base!r} was not evaluated; models: {', '.join(by_model)}")
    return [c for model, group in by_model.items() if model != base for c in compare(by_model[base], group)]


def comparisons_table(comparisons: Iterable[Comparison]) -> pa.Table:
    """Returns all differences, one a row: of a model to its base, in a metric, for a prompt set and number of steps."""
    comparisons = list(comparisons)
    named = {"model": "tuned", "base": "base", "set": "set", "steps": "steps", "metric": "metric", "pairs": "pairs"}
    kinds = {"steps": pa.int32(), "pairs": pa.int32()} | dict.fromkeys(("difference", "low", "high"), pa.float64())
    named |= {name: name for name in ("difference", "low", "high")}
    return pa.table(
        {
            name: pa.array([getattr(c, field) for c in comparisons], kinds.get(name, pa.string()))
            for name, field in named.items()
        }
    )
