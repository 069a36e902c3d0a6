"""Looks of the guard, made up."""

from typing import Any

import numpy as np

from rlvid.runs.over_optimisation import HELD_OUT, TRAINED


def evaluation_of(
    rng: np.random.Generator, mean: dict[str, float], noise: float = 0.05, count: int = 16
) -> dict[str, Any]:
    """One value a prompt: prompts differ by the same amounts in every evaluation, and noise comes on top."""
    spread = np.random.default_rng(5).normal(0, 0.3, count)
    base = {TRAINED: 0.5, HELD_OUT: 0.5, "consistency": 0.95, "motion": 0.1, "diversity": 0.1} | mean
    scale = {"consistency": 0.01, "motion": 0.1, "diversity": 0.1}
    return {m: (v + scale.get(m, 1.0) * (spread + rng.normal(0, noise, count))).tolist() for m, v in base.items()}
