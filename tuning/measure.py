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
from rlvid.evaluate.results.rows import Row, metrics_of, per_prompt
from rlvid.runs.checkpoints import read_state
from rlvid.runs.recommendation import Candidate, Gain, least_gain
from tuning.description import COST, Evaluation, Sweep
from tuning.judges import GAIN

if TYPE_CHECKING:
    from rlvid.evaluate.results.summary import Summary
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


def measure(job: dict[str, Any], run: str | None, step: int, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Scores of a trial after ``step`` steps, or of the base model (``run`` None).

    Args:
        job: see ``job_of``; the base's rewards, those of its guard among them, and its sampling measure.
        run: the trial's folder.
        step: of the checkpoint.
        base: the base model's scores, for a trial.

    Returns:
        ``step``, ``seconds`` of training steps and ``videos`` rewarded until then, ``mean`` and ``std`` over videos of
        every metric, and the ``rows`` (``rlvid.evaluate.results.rows.Row``) that they are of; ``scaled`` has mean and
        std at each further scale of the learned change, none of the base model. ``mean`` has the objective ``gain``
        too, where the run has a held-out reward and scores of the base model have it: those of a sweep that began with
        a former version do not.
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

    def summary_of(rows: list[Row]) -> "Summary":
        (summary,) = summarise(rows)
        if run is None and config.reward.held_out is not None:
            summary.mean[GAIN] = least(rows, rows).deviations
        elif base is not None and GAIN in base["mean"]:
            summary.mean[GAIN] = least(rows, rows_of(base)).deviations
        return summary

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
            own = summary_of(rows_at(tuned.use(scale)))
            scaled[f"{scale:g}"] = {"mean": own.mean, "std": own.std}
        state = read_state(tuned.checkpoint.folder)
        cost = {COST: state.seconds, "videos": state.videos}
    summary = summary_of(rows)
    found = {"mean": summary.mean, "std": summary.std, "rows": [asdict(row) for row in rows], "scaled": scaled}
    return {"step": step, **cost, **found}


def least(rows: list[Row], base: list[Row]) -> Gain:
    """Returns the guard's gain over the base model: that of the held-out reward which gains least.

    Its ``deviations``, in the base's standard deviation over prompts, are the objective ``gain``: NaN where a prompt
    lacks a finite video, and for fewer than two prompts.
    """
    candidate, first = (
        Candidate(step, 1.0, per_prompt(each, metrics_of(each))) for step, each in ((1, rows), (0, base))
    )
    return least_gain(candidate, first)


def rows_of(scores: dict[str, Any]) -> list[Row]:
    """Returns the rows that scores were made of."""
    return [Row(**row) for row in scores["rows"]]
