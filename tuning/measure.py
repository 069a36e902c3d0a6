"""The fixed measurement that compares all trials.

It generates the same prompts from the same noise with the trial's model, in the sampling of the *base* description, and
scores all frames alike with the base's rewards and those of its guard. So lambda, S, the trial's own reward or its
guidance in training change what the model has learned, and never the scale that it is measured on.
"""

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvid.collection import collection_paused
from rlvid.config import RunConfig
from rlvid.evaluate.results.rows import Row, metrics_of
from rlvid.runs.checkpoints import read_state
from rlvid.runs.recommendation import Candidate, Gain, least_gain
from rlvid.stats import finite_mean
from tuning.description import COST, GAIN, Evaluation, Sweep

if TYPE_CHECKING:
    from rlvid.models.base import VideoModel


def job_of(sweep: Sweep, use_gpu: bool) -> dict[str, Any]:
    """Returns the values that every process of the sweep needs: plain values, read once."""
    return {
        "rungs": sweep.rungs, "evaluation": sweep.evaluation.model_dump(), "prompts": sweep.prompts,
        "base": sweep.base().model_dump(), "use_gpu": use_gpu, "here": os.getcwd(),
    }  # fmt: skip


def work_here(job: dict[str, Any]) -> None:
    """Makes the driver's folder this process's, for paths that are written from there; a node may do without it."""
    with suppress(FileNotFoundError):
        os.chdir(job["here"])


def measure(job: dict[str, Any], run: str | None, step: int) -> dict[str, Any]:
    """Scores of a trial after ``step`` steps, or of the base model (``run`` None).

    Args:
        job: see ``job_of``; the base's rewards, those of its guard among them, and its sampling measure.
        run: the trial's folder.
        step: of the checkpoint.

    Returns:
        ``step``, ``seconds`` of training steps and ``videos`` rewarded until then, ``mean`` and ``std`` over videos of
        every metric, and the ``rows`` (``rlvid.evaluate.results.rows.Row``) that they are of; ``scaled`` has mean and
        std at each further scale of the learned change, none of the base model.
    """
    with collection_paused():  # in the task alone: the processes of the sweep and of its trials load no model
        from rlvid.evaluate.load import device, load_run, texts_of
        from rlvid.evaluate.results.summary import summarise
        from rlvid.evaluate.score import VideoBatch, evaluate_model, split
        from rlvid.evaluate.scorers import guard_rewards, load_run_scorer
        from rlvid.models.trained import load_trainable

    work_here(job)
    config, how = RunConfig.model_validate(job["base"]), Evaluation.model_validate(job["evaluation"])
    scorer = load_run_scorer(config, device(), guard_rewards(config))

    def rows_at(model: "VideoModel") -> list[Row]:
        sampling, parts = config.sampling, split(job["prompts"], how.copies)
        name, prompt_set, steps = "base" if run is None else Path(run).name, Path(how.prompts).stem, how.steps
        return evaluate_model(
            model,
            (VideoBatch(name, prompt_set, steps or sampling.steps, start, part, how.copies) for start, part in parts),
            scorer,
            seed=how.seed,
            guidance=sampling.guidance,
            final=sampling.final_level,
        )

    cost: dict[str, float] = {COST: 0.0, "videos": 0}
    scaled = dict[str, dict[str, dict[str, float]]]()
    if run is None:
        spec, texts = config.model, texts_of(config, job["prompts"])
        rows = rows_at(
            load_trainable(
                spec, config.seed, spec.path, device(), negative_prompt=config.sampling.negative_prompt, text=texts
            )
        )
    else:
        tuned = load_run(run, step, job["prompts"])
        rows = rows_at(tuned.use(1.0))
        for scale in how.scales:
            (own,) = summarise(rows_at(tuned.use(scale)))
            scaled[f"{scale:g}"] = {"mean": own.mean, "std": own.std}
        state = read_state(tuned.checkpoint.folder)
        cost = {COST: state.seconds, "videos": state.videos}
    (summary,) = summarise(rows)
    return {
        "step": step,
        **cost,
        "mean": summary.mean,
        "std": summary.std,
        "rows": list(map(asdict, rows)),
        "scaled": scaled,
    }


def add_gain(scores: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Adds the objective ``gain`` to the means of scores: the guard's (``rlvid.runs.recommendation.least_gain``).

    It is the least gain over the base model in a held-out reward, in standard deviations of the base's prompts; NaN
    where one of the videos is not finite.
    """
    scores["mean"][GAIN] = least(scores, base).deviations
    return scores


def least(scores: dict[str, Any], base: dict[str, Any]) -> Gain:
    """Returns the guard's gain of scores over the base model's: that of the held-out reward which gains least."""
    candidate, first = (Candidate(step, 1.0, _per_prompt(rows_of(each))) for step, each in ((1, scores), (0, base)))
    return least_gain(candidate, first)


def _per_prompt(rows: list[Row]) -> dict[str, list[float]]:
    """Returns the mean of every metric over the videos of each prompt."""
    prompts = {row.index: [other for other in rows if other.index == row.index] for row in rows}
    return {
        metric: [finite_mean(row.score(metric) for row in group) for group in prompts.values()]
        for metric in metrics_of(rows)
    }


def rows_of(scores: dict[str, Any]) -> list[Row]:
    """Returns the rows that scores were made of."""
    return [Row(**row) for row in scores["rows"]]
