"""Results over runs that differ in their seed alone: the mean over seeds, its interval, and the gain over the base.

``±`` is half the 95 % interval of Student's t over seeds: it covers the chance of training. The interval of a
difference is a bootstrap over prompts, each drawn with its videos of all seeds, because all seeds have the same
prompts; it covers the chance of the prompts, for these seeds.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np

from rlvid.config import RunConfig
from rlvid.evaluate.models import EvaluatedModel
from rlvid.evaluate.results.about import ModelRecord
from rlvid.evaluate.results.rows import Row, metrics_of
from rlvid.evaluate.results.summary import pair_up, paired_scores
from rlvid.stats import bootstrap_interval, mean_interval


@dataclass(frozen=True)
class SeedResult:
    """One metric of a group of runs, for a prompt set and number of steps.

    ``mean`` and ``half_width`` are over seeds (NaN for one); ``difference``, ``low`` and ``high`` are to the
    base, and NaN for the base itself.
    """

    group: str
    set: str
    steps: int
    metric: str
    seeds: int
    mean: float
    half_width: float
    difference: float
    low: float
    high: float


def group_seeds(models: Sequence[EvaluatedModel]) -> dict[str, list[str]]:
    """Group -> the names of its models: what differs in seed, name and place alone, at one step and scale.

    Raises:
        ValueError: no two models differ in their seed alone.
    """
    groups: dict[tuple[object, ...], list[EvaluatedModel]] = {}
    for model in models[1:]:
        groups.setdefault(seedless(model, model.config), []).append(model)
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
    return name_models([(members[0].config.method.name, members) for members in groups.values()], models[0].name)


def but_for_seed(config: RunConfig) -> str:
    """Returns a text that is equal for runs that differ in seed, name, place, guard and a measured floor alone."""
    kept = config.model_dump(mode="json", exclude={"name": True, "seed": True, "output": True, "guard": True})
    for part in kept["reward"]["mixture"]:
        if part.get("measured"):
            del part["floor"]
    return json.dumps(kept, sort_keys=True)


def seedless(model: EvaluatedModel | ModelRecord, config: RunConfig) -> tuple[object, ...]:
    """Returns what models that differ in seed alone have in common: settings, step and scale.

    Runs of a budget in seconds (``train.max_seconds``) end at steps of their own; their ends count as one step.
    """
    at = "end" if model.kind == "run" and config.train.max_seconds else model.step
    return but_for_seed(config), at, model.scale


@dataclass(frozen=True)
class RunGroup:
    """Models, or runs, that differ in seed alone: their method, which part of the run they are, and their names."""

    method: str
    part: str
    names: Sequence[str]


_COUNTED = re.compile(r"[-_ .=]+((seed|run|s)[-_ .=]*\d*)?$|(?<![a-z])(seed|run)$", re.IGNORECASE)


def name_groups(groups: Sequence[RunGroup], base: str, *, count: bool = True) -> list[str]:
    """Names each group for tables; all names differ from each other and from the base.

    One model is called by its name. Several are called by their method, where no other group has it too, else by what
    their names begin with, without a trailing ``seed``; and how many they are, unless ``count`` is False.
    """
    methods, found = [(each.method, each.part) for each in groups], list[str]()
    for each in groups:
        shown = each.names[0]
        if len(each.names) > 1:
            begin = _COUNTED.sub("", commonprefix(list(each.names)))  # noqa: RUF071 (no paths)
            alone = methods.count((each.method, each.part)) == 1 or not begin
            shown = (each.method if alone else begin) + each.part
            shown += f" ({len(each.names)} seeds)" if count else ""
        while shown in (base, *found):
            shown += "'"
        found.append(shown)
    return found


def name_models(
    groups: Sequence[tuple[str, Sequence[EvaluatedModel | ModelRecord]]], base: str
) -> dict[str, list[str]]:
    """Group -> the names of its models, from the method and the models of each group; see ``name_groups``."""
    alike = [RunGroup(method, _part(members[0]), [model.label for model in members]) for method, members in groups]
    names = name_groups(alike, base)
    return {name: [model.name for model in members] for name, (_, members) in zip(names, groups, strict=True)}


def _part(model: EvaluatedModel | ModelRecord) -> str:
    """``@40 × 0.5``; nothing for all that was learned up to a run's end."""
    at = f"@{model.step}" if model.kind == "checkpoint" and model.step is not None else ""
    return at + (f" × {model.scale:g}" if model.scale != 1 else "")


def seed_results(
    rows: Sequence[Row],
    groups: Mapping[str, Sequence[str]],
    base: str,
    metrics: Sequence[str] | None = None,
) -> list[SeedResult]:
    """Returns every metric of the base and of every group, for each prompt set and number of steps.

    Args:
        rows: of all models.
        groups: as ``group_seeds`` gives them.
        base: name of the base model.
        metrics: default: all.
    """
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    results = []
    for group, names in {base: [base], **groups}.items():
        paired = [pair_up(by_model[base], by_model[name]) for name in names]
        for set_name, steps in paired[0]:
            for metric in metrics or metrics_of(rows):
                seeds = [paired_scores(each[(set_name, steps)], metric) for each in paired]
                seeds = [each for each in seeds if len(each[0])]
                if seeds:
                    mean, half = mean_interval([float(after.mean()) for _, after, _ in seeds])
                    gained = _gain(seeds) if group != base else (math.nan,) * 3
                    results.append(SeedResult(group, set_name, steps, metric, len(seeds), mean, half, *gained))
    return results


def _gain(seeds: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Returns the mean difference over the videos of all seeds, and its interval; a prompt is drawn with all videos."""
    gains = np.concatenate([after - before for before, after, _ in seeds])
    prompts = np.concatenate([each for *_, each in seeds])
    return float(gains.mean()), *bootstrap_interval(gains, prompts)
