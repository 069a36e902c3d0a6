"""The guard's evaluation of a checkpoint: generates and scores fixed videos, without Ray.

Only the methods import models and rewards, so that the driver, which sends the class to an actor, does not.
"""

import os
from pathlib import Path
from typing import Any

import torch

from rlvid.collection import collection_paused
from rlvid.config import RunConfig
from rlvid.config.reward import RewardConfig
from rlvid.evaluate.results.rows import METRICS, per_prompt
from rlvid.runs.recommendation import DISTANCE


class GuardEvaluator:
    """Generates the fixed videos of a checkpoint and scores them; works as a Ray actor or in this process.

    Args:
        config: the run's.
        model: path of the model, absolute where need be.
        reward: the rewards' settings with absolute paths.
        prompts: distinct prompts; ``guard.videos_per_prompt`` videos of each.
        use_gpu: whether it has one.
        aside: lower the process's priority, so that training comes first.
        texts: where embeddings of the prompts are kept; None loads the text encoder.
    """

    def __init__(
        self,
        config: dict[str, Any],
        model: str,
        reward: dict[str, Any],
        prompts: list[str],
        use_gpu: bool,
        aside: bool = False,
        texts: str | None = None,
    ) -> None:
        with collection_paused():
            from rlvid.data.embeddings import embedder_of
            from rlvid.evaluate.candidates import CandidateScorer
            from rlvid.evaluate.scorers import guard_rewards, load_run_scorer
            from rlvid.models.trained import load_trainable

        if aside:
            os.nice(10)
        self.config = RunConfig.model_validate(config)
        device = torch.device("cuda" if use_gpu else "cpu")
        if not use_gpu:
            torch.set_num_threads(1)
        made = load_trainable(
            self.config.model, self.config.seed, model, device,
            negative_prompt=self.config.sampling.negative_prompt, text=embedder_of(model, texts),
        )  # fmt: skip
        self.denoiser = made.denoiser
        rewards = self.config.model_copy(update={"reward": RewardConfig.model_validate(reward)})
        scorer = load_run_scorer(rewards, device, guard_rewards(self.config))
        guard, sampling = self.config.guard, self.config.sampling
        self._scorer = CandidateScorer(
            made, scorer, prompts, guard.videos_per_prompt, guard.steps or sampling.steps,
            seed=self.config.seed, guidance=sampling.guidance, final=sampling.final_level,
        )  # fmt: skip
        self.metrics, self.fresh, self._base = (*METRICS, *scorer.further, DISTANCE), True, None
        if self.config.guard_blends:
            self._base = {name: tensor.cpu().clone() for name, tensor in self.denoiser.state_dict().items()}

    def evaluate(self, folder: str | None, scale: float = 1.0) -> dict[str, list[float]]:
        """Returns metric -> one value per prompt, its videos' mean.

        Args:
            folder: a checkpoint's; None for the base model, which is evaluated before all others.
            scale: of the learned change.
        """
        assert self.fresh or folder is not None, "the base model is evaluated first"
        if self.fresh and folder is not None:  # distances need the base's videos, also after a restart
            self._scorer.rows()
        self.fresh = False
        if folder is not None:
            self._load(Path(folder), scale)
        return per_prompt(self._scorer.rows(), self.metrics)

    def _load(self, folder: Path, scale: float) -> None:
        from rlvid.models.lora import lora_scale
        from rlvid.models.trained import blend, load_trained

        if self.config.model.finetune == "full" and scale != 1:
            blend(self.denoiser, self._base, folder, scale)
            return
        load_trained(self.denoiser, self.config.model, folder)
        if self.config.model.finetune == "lora":
            lora_scale(self.denoiser, scale)
