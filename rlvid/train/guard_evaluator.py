"""The guard's evaluation of a checkpoint: generates and scores fixed videos, without Ray.

Only the methods import models and rewards, so that the driver, which sends the class to an actor, does not.
"""

import os
from pathlib import Path
from typing import Any

import torch

from rlvid.config import RunConfig
from rlvid.config.reward import RewardConfig
from rlvid.evaluate.results.rows import METRICS
from rlvid.stats import finite_mean


class GuardEvaluator:
    """Generates the fixed videos of a checkpoint and scores them; works as a Ray actor or in this process.

    Args:
        config: the run's.
        model: path of the model, absolute where need be.
        reward: the rewards' settings with absolute paths.
        prompts: distinct prompts; ``guard.videos_per_prompt`` videos of each.
        use_gpu: whether it has one.
        aside: lower the process's priority, so that training comes first.
    """

    def __init__(
        self,
        config: dict[str, Any],
        model: str,
        reward: dict[str, Any],
        prompts: list[str],
        use_gpu: bool,
        aside: bool = False,
    ) -> None:
        from rlvid.evaluate.scorers import load_run_scorer
        from rlvid.models.trained import load_trainable

        if aside:
            os.nice(10)
        self.config = RunConfig.model_validate(config)
        device = torch.device("cuda" if use_gpu else "cpu")
        if not use_gpu:
            torch.set_num_threads(1)
        self.model = load_trainable(self.config.model, self.config.seed, model, device)
        rewards = RewardConfig.model_validate(reward)
        self.scorer = load_run_scorer(self.config.model_copy(update={"reward": rewards}), device)
        self.prompts, self.fresh = prompts, True

    def evaluate(self, folder: str | None) -> dict[str, list[float]]:
        """Returns metric -> one value per prompt, its videos' mean; ``folder`` is a checkpoint, None the base."""
        from rlvid.evaluate.score import VideoBatch, evaluate_model, split
        from rlvid.models.trained import load_trained

        if folder is None:
            assert self.fresh, "the base model is evaluated first"
        else:
            load_trained(self.model.denoiser, self.config.model, Path(folder))
        self.fresh = False
        copies, sampling = self.config.guard.videos_per_prompt, self.config.sampling
        steps, parts = self.config.guard.steps or sampling.steps, split(self.prompts, copies, most=8)
        rows = evaluate_model(
            self.model,
            (VideoBatch("guard", "guard", steps, start, part, copies) for start, part in parts),
            self.scorer,
            seed=self.config.seed,
            guidance=sampling.guidance,
            final=sampling.final_level,
        )
        groups = [rows[start : start + copies] for start in range(0, len(rows), copies)]
        return {metric: [finite_mean(getattr(row, metric) for row in group) for group in groups] for metric in METRICS}
