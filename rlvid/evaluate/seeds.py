"""Runs that differ in their seed alone, as one: the mean over seeds, its interval, and what was gained over the base.

``±`` is half the 95 % interval of Student's t over seeds: it holds what a run owes to chance. The interval of a
difference is a bootstrap over prompts, each drawn with its videos of all seeds, for they are judged by the same
prompts; it holds the prompts' chance, for these seeds.
"""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import numpy as np

from rlvid.evaluate import write_whole
from rlvid.evaluate.columns import gain_text, set_title, title_of
from rlvid.evaluate.compared import Compared
from rlvid.evaluate.comparison import interval
from rlvid.evaluate.grid import Cell, Grid
from rlvid.evaluate.rows import Row, bootstrap_means, metrics_of, pair_up

_SHOWN = ("reward", "held_out", "clipsim", "consistency", "motion", "diversity", "oracle_score")


@dataclass(frozen=True)
class SeedResult:
    """One metric of a group of runs, for a prompt set and number of steps.

    ``mean`` and ``half`` are over seeds (``half`` is NaN for one); ``difference``, ``low`` and ``high`` are to the
    base, and NaN for the base itself.
    """

    group: str
    set: str
    steps: int
    metric: str
    seeds: int
    mean: float
    half: float
    difference: float
    low: float
    high: float


def group_seeds(models: Sequence[Compared]) -> dict[str, list[str]]:
    """Group -> the names of its models: what differs in seed, name and place alone, at one step and scale.

    Runs of a budget in seconds (``train.max_seconds``) end at steps of their own; their ends are one group.

    Raises:
        ValueError: no two models differ in their seed alone.
    """
    groups: dict[str, list[Compared]] = {}
    for model in models[1:]:
        settings = model.config.model_dump(mode="json", exclude={"name": True, "seed": True, "output": True})
        at = "end" if model.kind == "run" and model.config.train.max_seconds else model.step
        groups.setdefault(json.dumps([settings, at, model.scale], sort_keys=True), []).append(model)
    for members in groups.values():
        seeds = [model.config.seed for model in members]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            names = ", ".join(model.name for model in members if model.config.seed == twice)
            raise ValueError(f"--group-seeds: {names} have one seed, and would count as two; leave one out")
    if all(len(members) < 2 for members in groups.values()):
        raise ValueError(
            "--group-seeds: no two of the runs differ in their seed alone (settings, step and scale are compared); "
            "name runs of one description with other seeds, or leave it out"
        )
    named = name_groups([(_method(members[0]), [model.name for model in members]) for members in groups.values()])
    return {
        f"{name} ({len(members)} seed{'s' * (len(members) > 1)})": [model.name for model in members]
        for name, members in zip(named, groups.values(), strict=True)
    }


def _method(model: Compared) -> tuple[str, str]:
    """The method, and which part of the run the model is."""
    return model.config.method.name, part_of_run(model.step if model.kind == "checkpoint" else None, model.scale)


def part_of_run(step: int | None, scale: float) -> str:
    """``@40 × 0.5``; nothing for all that was learned up to a run's end (step None)."""
    return (f"@{step}" if step is not None else "") + (f" × {scale:g}" if scale != 1 else "")


_COUNTED = re.compile(r"[-_ .]*(seed|run|s)?[-_ .=]*\d*$", re.IGNORECASE)


def name_groups(groups: Sequence[tuple[tuple[str, str], Sequence[str]]]) -> list[str]:
    """What tables call each group of ((method, part of the run), names of its models), all different.

    The method, where no other group has it; else what its models' names begin with, without a trailing ``seed``.
    """
    methods, found = [method for method, _ in groups], list[str]()
    for (method, part), names in groups:
        begin = _COUNTED.sub("", commonprefix(list(names))) if len(names) > 1 else names[0]  # noqa: RUF071 (no paths)
        alone = methods.count((method, part)) == 1 or not begin
        shown = method + part if alone else begin + part * (len(names) > 1)
        found.append(shown if shown not in found else f"{shown}, {names[0]}")
    return found


def seed_results(
    rows: Sequence[Row],
    groups: Mapping[str, Sequence[str]],
    base: str,
    metrics: Sequence[str] | None = None,
    *,
    resamples: int = 2000,
) -> list[SeedResult]:
    """Every metric of the base and of every group, for each prompt set and number of steps.

    Args:
        rows: of all models.
        groups: as ``group_seeds`` gives them.
        base: name of the base model.
        metrics: default: all.
        resamples: of the bootstrap.
    """
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    results = []
    for group, names in {base: [base], **groups}.items():
        paired = [pair_up(by_model[base], by_model[name]) for name in names]
        for set_name, steps in paired[0]:
            for metric in metrics or metrics_of(rows):
                seeds = [_values(each[(set_name, steps)], metric) for each in paired]
                seeds = [each for each in seeds if len(each[0])]
                if seeds:
                    mean, half = interval([float(after.mean()) for _, after, _ in seeds])
                    gained = _gain(seeds, resamples) if group != base else (math.nan,) * 3
                    results.append(SeedResult(group, set_name, steps, metric, len(seeds), mean, half, *gained))
    return results


def _values(pairs: list[tuple[Row, Row]], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Before, after and the prompt's index, of the videos where both are finite."""
    before, after = (np.array([pair[i].score(metric) for pair in pairs], dtype=np.float64) for i in (0, 1))
    both = np.isfinite(before) & np.isfinite(after)
    return before[both], after[both], np.array([pair[0].index for pair in pairs])[both]


def _gain(seeds: list[tuple[np.ndarray, np.ndarray, np.ndarray]], resamples: int) -> tuple[float, float, float]:
    """The mean difference over the videos of all seeds, and its interval: a prompt is drawn with all its videos."""
    gains = np.concatenate([after - before for before, after, _ in seeds])
    prompts = np.concatenate([each for *_, each in seeds])
    low = high = math.nan
    if len(set(prompts.tolist())) > 1:
        means = bootstrap_means(gains, prompts, resamples, np.random.default_rng(0))
        low, high = np.percentile(means, [2.5, 97.5])
    return float(gains.mean()), float(low), float(high)


def seeds_markdown(results: Sequence[SeedResult]) -> str:
    """A page with a table for each number of steps, differences of the rewards beside the means."""
    lines = ["# Over seeds", ""]
    metrics = [m for m in dict.fromkeys(r.metric for r in results) if m in _SHOWN or m.startswith("reward_")]
    found = {(r.group, r.set, r.steps, r.metric): r for r in results}
    for steps in dict.fromkeys(r.steps for r in results):
        places = sorted({(r.set, r.group): None for r in results if r.steps == steps}, key=_order(results))
        rows = [
            [
                Cell(set_title(s)),
                Cell(group),
                *(_cell(found.get((group, s, steps, m)), found, results[0].group) for m in metrics),
                Cell(_over_base(found.get((group, s, steps, "reward")))),
            ]
            for s, group in places
        ]
        heads = ["Prompts", "Runs", *(title_of(m) for m in metrics), "Reward over base"]
        lines += [f"## {steps} DDIM steps", "", Grid(heads, rows, words=2).markdown(), ""]
    lines += [
        "Mean over seeds ± half the 95 % interval of Student's t over seeds. Bold: above the base by more than that. "
        "Differences to the base have the 95 % interval of a bootstrap over prompts, each drawn for all seeds at once.",
        "",
    ]
    return "\n".join(lines)


def _order(results: Sequence[SeedResult]):
    sets, groups = (list(dict.fromkeys(getattr(r, key) for r in results)) for key in ("set", "group"))
    return lambda place: (sets.index(place[0]), groups.index(place[1]))


def _cell(result: SeedResult | None, found: dict, base: str) -> Cell:
    if result is None:
        return Cell("–")
    text = f"{result.mean:.3f}" + (f" ± {result.half:.3f}" if math.isfinite(result.half) else "")
    least = found.get((base, result.set, result.steps, result.metric))
    return Cell(text, least is not None and result.mean - result.half > least.mean)


def _over_base(result: SeedResult | None) -> str:
    return gain_text(result.difference, result.low, result.high) if result else "–"


def write_seeds(folder: Path, results: Sequence[SeedResult]) -> list[Path]:
    """Writes ``seeds.md`` and ``seeds.csv`` (a line a group, set, number of steps and metric)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(SeedResult.__dataclass_fields__)
    writer.writerow(names)
    for result in results:
        values = [getattr(result, name) for name in names]
        writer.writerow(["" if isinstance(v, float) and not math.isfinite(v) else v for v in values])
    paths = [folder / "seeds.md", folder / "seeds.csv"]
    for path, text in zip(paths, (seeds_markdown(results), out.getvalue()), strict=True):
        write_whole(path, text.encode())
    return paths
