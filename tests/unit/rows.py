"""Scores for tests: rows of an evaluation without its videos."""

import math

from rlvid.evaluate.results.rows import METRICS, Row


def row(
    model: str, set_name: str = "in_domain", steps: int = 20, index: int = 0, copy: int = 0, **scores: float
) -> Row:
    """A video with these scores and no others."""
    extra = {name: value for name, value in scores.items() if name not in METRICS}
    values = dict.fromkeys(METRICS, math.nan) | {m: v for m, v in scores.items() if m in METRICS}
    return Row(model, set_name, steps, index, f"prompt {index}", **values, copy=copy, extra=extra)


def models_of_the_paper() -> list[Row]:
    """The base and one model, two prompt sets and two numbers of steps, three prompts each."""
    return [
        row(
            model, s, d, i, reward=0.2 + gain + 0.1 * i, clipsim=0.3 - gain, consistency=0.9, motion=0.1,
            reward_own=gain * i,
        )
        for model, gain in (("base", 0.0), ("Draft_LV & 100 %", 0.1))
        for s in ("in_domain", "scenes")
        for d in (20, 50)
        for i in range(3)
    ]  # fmt: skip
