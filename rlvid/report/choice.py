"""Which cases are pictured: fixed ones, chosen before anyone looked, and the extremes on both sides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rlvid.report.evidence import Case, Evidence, Model

_FIXED, _WORST = 4, 4


@dataclass(frozen=True)
class Choice:
    """The cases of each kind.

    Attributes:
        fixed: by set, its first prompts with the first D.
        worst: those that lost most in any tuned model, the worst first.
        moving: those that are written as files of their own.
        featured: why and which: the largest gain and the largest loss.
        evolutions: for each run with several checkpoints, step -> model; 0 is the base.
    """

    fixed: dict[str, list[Case]]
    worst: list[Case]
    moving: list[Case]
    featured: list[tuple[str, Case]]
    evolutions: list[dict[int, Model]]

    @cached_property
    def all(self) -> set[Case]:
        """Every case whose frames are needed."""
        fixed = {case for cases in self.fixed.values() for case in cases}
        return fixed | set(self.worst) | set(self.moving)


def choose(evidence: Evidence, moving: int, pictured: Sequence[Model]) -> Choice:
    """Picks the cases; ``moving`` of them, half from either end, become files. Extremes are those of ``pictured``."""
    tuned = [model for model in pictured if model != evidence.base]
    pairs = [(evidence.gain(m.name, case, evidence.judge), case, m) for case in evidence.cases for m in tuned]
    ranked = sorted((pair for pair in pairs if math.isfinite(pair[0])), key=lambda pair: pair[0])
    lowest = list(dict.fromkeys(case for gain, case, _ in ranked if gain < 0))
    highest = list(dict.fromkeys(case for gain, case, _ in reversed(ranked) if gain > 0))
    chosen = list(dict.fromkeys(highest[: (moving + 1) // 2] + lowest[: moving // 2]))
    featured = []
    if highest:
        featured.append((f"Largest gain: {ranked[-1][2].label}", highest[0]))
    if lowest:
        featured.append((f"Largest loss: {ranked[0][2].label}", lowest[0]))
    first = evidence.steps[0]
    fixed = {
        name: [Case(name, first, index, 0) for index in range(min(_FIXED, len(prompts)))]
        for name, prompts in evidence.sets.items()
    }
    return Choice(fixed, lowest[:_WORST], chosen, featured, _evolutions(evidence.base, tuned))


def _evolutions(base: Model, tuned: Sequence[Model]) -> list[dict[int, Model]]:
    found: dict[tuple[str, float], dict[int, Model]] = {}
    for model in tuned:
        if model.path and model.step is not None:
            found.setdefault((model.path, model.scale), {0: base})[int(model.step)] = model
    return [line for line in found.values() if len(line) > 2]
