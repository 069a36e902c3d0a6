"""Pages on groups of models: results over seeds, and pairwise comparisons."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from rlvid.escape import csv_text
from rlvid.evaluate.results.pairwise import Pairwise
from rlvid.evaluate.results.seeds import SeedResult
from rlvid.evaluate.tables.table import Cell, Grid, steps_page, write_tables
from rlvid.metric_names import NONE, main_metrics, metric_of, set_title
from rlvid.stats import MIN_PROMPTS

_SEEDS_HEADS = ("group", "set", "steps", "metric", "seeds", "mean", "half", "difference", "low", "high")
_PAIRWISE_HEADS = ("one", "other", "steps", "metric", "videos", "prompts", "difference", "low", "high", "half")
_SEEDS_LEGEND = (
    "Mean over seeds ± half the 95 % interval of Student's t over seeds. Bold: above the base by more than that. "
    "Differences to the base have the 95 % interval of a bootstrap over prompts, each drawn for all seeds at once."
)


def seeds_grids(results: Sequence[SeedResult]) -> dict[int, Grid]:
    """Maps each number of steps to its table, differences of the reward beside the means."""
    metrics, grids = main_metrics(dict.fromkeys(r.metric for r in results)), {}
    found = {(r.group, r.set, r.steps, r.metric): r for r in results}
    for steps in dict.fromkeys(r.steps for r in results):
        places = sorted({(r.set, r.group): None for r in results if r.steps == steps}, key=_order(results))
        rows: list[list[Cell | str]] = [
            [
                set_title(s),
                group,
                *(_seed_cell(found.get((group, s, steps, m)), found, results[0].group) for m in metrics),
                _over_base(found.get((group, s, steps, "reward"))),
            ]
            for s, group in places
        ]
        grids[steps] = Grid(
            ["Prompts", "Runs", *(metric_of(m).name for m in metrics), "Reward over base"], rows, words=2
        )
    return grids


def _order(results: Sequence[SeedResult]) -> Callable[[tuple[str, str]], tuple[int, int]]:
    sets, groups = (list(dict.fromkeys(getattr(r, key) for r in results)) for key in ("set", "group"))
    return lambda place: (sets.index(place[0]), groups.index(place[1]))


def _seed_cell(result: SeedResult | None, found: dict[tuple[str, str, int, str], SeedResult], base: str) -> Cell:
    if result is None:
        return Cell(NONE)
    least = found.get((base, result.set, result.steps, result.metric))
    text = metric_of(result.metric).mean(result.mean, result.half_width)
    return Cell(text, least is not None and result.mean - result.half_width > least.mean)


def _over_base(result: SeedResult | None) -> str:
    return metric_of("reward").gain(result.difference, result.low, result.high) if result else NONE


def write_seeds(folder: Path, results: Sequence[SeedResult]) -> list[Path]:
    """Writes ``seeds.md``, ``seeds.tex`` and ``seeds.csv`` (a line a group, set, number of steps and metric)."""
    grids = seeds_grids(results)
    return write_tables(
        folder,
        "seeds",
        page=steps_page("Over seeds", grids, _SEEDS_LEGEND),
        csv=csv_text([_SEEDS_HEADS, *map(astuple, results)]),
        latex=[grid.latex(f"{steps} sampling steps. {_SEEDS_LEGEND}") for steps, grid in grids.items()],
    )


def pairwise_grids(found: Sequence[Pairwise]) -> dict[int, Grid]:
    """Maps each number of steps to the table with a row for every two, metrics across."""
    metrics, grids = list(dict.fromkeys(each.metric for each in found)), {}
    for steps in dict.fromkeys(each.steps for each in found):
        pairs: dict[frozenset[str], dict[str, Pairwise]] = {}
        for each in found:
            if each.steps == steps:
                pairs.setdefault(frozenset((each.first, each.second)), {})[each.metric] = each
        rows: list[list[Cell | str]] = []
        for by_metric in pairs.values():
            first = next(iter(by_metric.values()))  # all differences of a row go the way of its first
            signs = {metric: 1 if each.first == first.first else -1 for metric, each in by_metric.items()}
            cells = [_pair_cell(by_metric[m], signs[m]) if m in by_metric else Cell(NONE) for m in metrics]
            rows.append([first.first, first.second, *cells])
        grids[steps] = Grid(["Model", "minus", *(metric_of(m).name for m in metrics)], rows, 2)
    return grids


def pairwise_legend(groups: Mapping[str, Sequence[str]]) -> str:
    """Returns the legend of the tables."""
    seeds = any(len(names) > 1 for names in groups.values())
    return (
        "The first minus the second: difference [95 % interval of a bootstrap over prompts, paired by prompt and noise"
        + ("] ± half of Welch's 95 % interval over seeds, where both have several or one is the base" if seeds else "]")
        + f". Bold: beyond every bound that is shown, over {MIN_PROMPTS} prompts or more. Each difference is judged by "
        "itself, without a correction for their number."
    )


def _pair_cell(each: Pairwise, sign: int) -> Cell:
    low, high = sorted((sign * each.low, sign * each.high))
    metric = metric_of(each.metric)
    return Cell(metric.gain(sign * each.difference, low, high) + metric.margin(each.half_width), each.significant)


def write_pairwise(folder: Path, found: Sequence[Pairwise], groups: Mapping[str, Sequence[str]]) -> list[Path]:
    """Writes ``versus.md``, ``.tex`` and ``.csv`` (a line for every two rows, number of steps and metric)."""
    grids, legend = pairwise_grids(found), pairwise_legend(groups)
    return write_tables(
        folder,
        "versus",
        page=steps_page("Each against each, over all prompts", grids, legend),
        csv=csv_text([_PAIRWISE_HEADS, *map(astuple, found)]),
        latex=[grid.latex(f"Each against each, D = {steps}. {legend}") for steps, grid in grids.items()],
    )
