"""Selects the cases to show: fixed ones, chosen before any result is known, and the extremes on both sides."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from rlvid.evaluate.results.about import Case, ModelRecord
from rlvid.evaluate.results.read import EvaluationData

_FIXED, _WORST = 4, 4


class Extreme(NamedTuple):
    """A case, and the model whose gain or loss there it is about."""

    case: Case
    model: ModelRecord


@dataclass(frozen=True)
class CaseSelection:
    """The cases of each kind.

    Attributes:
        fixed: by set, its first prompts with the first D.
        worst: those that lost most in any tuned model, the worst first, each of a prompt of its own.
        moving: those that are written as files of their own, and why: the first prompt of each set, those that gained
            most and those that lost most.
        featured: why and which: the largest gain and the largest loss.
        evolutions: for each run with several checkpoints, step -> model; 0 is the base.
    """

    fixed: dict[str, list[Case]]
    worst: list[Extreme]
    moving: list[tuple[Case, ModelRecord | None]]
    featured: list[tuple[str, Extreme]]
    evolutions: list[dict[int, ModelRecord]]

    @cached_property
    def all(self) -> set[Case]:
        """Every case whose frames are needed."""
        fixed = {case for cases in self.fixed.values() for case in cases}
        return fixed | {each.case for each in self.worst} | {case for case, _ in self.moving}


def select_cases(evaluation: EvaluationData, moving: int, pictured: Sequence[ModelRecord]) -> CaseSelection:
    """Picks the cases.

    Args:
        evaluation: all models; extremes are those of any of them.
        moving: cases that become files beside the first prompt of each set, half from either end; 0 for no files.
        pictured: the models whose evolution is drawn.
    """
    pairs = [(evaluation.gain(m.name, case, evaluation.judge), Extreme(case, m)) for case in evaluation.cases
             for m in evaluation.tuned]  # fmt: skip
    ranked = sorted((pair for pair in pairs if math.isfinite(pair[0])), key=lambda pair: pair[0])
    lowest = _distinct(extreme for gain, extreme in ranked if gain < 0)
    highest = _distinct(extreme for gain, extreme in reversed(ranked) if gain > 0)
    ends = _distinct(highest[: (moving + 1) // 2] + lowest[: moving // 2])
    featured = [(f"Largest gain: {each.model.label}", each) for each in highest[:1]]
    featured += [(f"Largest loss: {each.model.label}", each) for each in lowest[:1]]
    first = evaluation.about.steps[0]
    fixed = {
        name: [Case(name, first, index, 0) for index in range(min(_FIXED, len(prompts)))]
        for name, prompts in evaluation.about.sets.items()
    }
    firsts: list[tuple[Case, ModelRecord | None]] = [(cases[0], None) for cases in fixed.values()] if moving else []
    chosen = {case for case, _ in firsts}
    further = [each for each in ends if each.case not in chosen]
    worst = _distinct(lowest, by_prompt=True)[:_WORST]
    return CaseSelection(fixed, worst, [*firsts, *further], featured, _evolutions(evaluation.base, pictured))


def _distinct(extremes: Iterable[Extreme], *, by_prompt: bool = False) -> list[Extreme]:
    """Returns the first of each case, or of each prompt."""
    found: dict[tuple[object, ...], Extreme] = {}
    for each in extremes:
        found.setdefault((each.case.set, each.case.index) if by_prompt else each.case, each)
    return list(found.values())


def _evolutions(base: ModelRecord, tuned: Sequence[ModelRecord]) -> list[dict[int, ModelRecord]]:
    found: dict[tuple[str, float], dict[int, ModelRecord]] = {}
    for model in tuned:
        if model != base and model.path and model.step is not None:
            found.setdefault((model.path, model.scale), {0: base})[int(model.step)] = model
    return [line for line in found.values() if len(line) > 2]
