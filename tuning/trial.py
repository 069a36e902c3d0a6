"""A trial: trains a run to a rung, measures and reports it, and trains on to the next rung.

Each rung is a separate training that ends by itself and resumes bit for bit. Tune may stop a trial only while it
reports, when it has no processes: no training is killed, and no placement group is left behind.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from rich.console import Console

from rlvid.config import RunConfig
from rlvid.files import held
from rlvid.metric_names import REWARD_PREFIX
from tuning.description import COST, METRICS
from tuning.journal import BASE, read_scores, scores_path, write_scores
from tuning.judges import GAIN
from tuning.measure import measure, work_here

_MEMORY = 300 * 2**20  # bytes of logical memory that a trial itself asks for; its CPU is for its workers
_PATIENCE_S = 60  # how long the processes of a killed driver may take to end


def trainable(job: dict[str, Any]) -> Any:
    """Returns the function that Tune runs for each trial.

    A trial's config has its number (``trial``), its ``run``, the keys of ``train`` that end it at each rung
    (``budgets``), and the rungs ``judged`` already.
    """
    return tune.with_resources(tune.with_parameters(run_trial, job=job), {"CPU": 0, "memory": _MEMORY})


def run_trial(config: dict[str, Any], job: dict[str, Any]) -> None:
    """Runs a trial to its last rung, or until Tune stops it at a report; reports ``failed`` when it cannot continue."""
    number, folder = int(config["trial"]), Path(job["base"]["output"]["storage"])
    work_here(job)
    try:
        base = read_scores(folder / BASE)
        if base is None:
            raise ValueError(f"{folder / BASE} is missing; start the sweep again")
        for rung, budget in zip(job["rungs"], config["budgets"], strict=True):
            path = scores_path(folder, config["run"]["name"], rung)
            scores = read_scores(path)
            if scores is None:
                ended = _train(folder, config["run"], budget)
                at = budget["steps"] if budget["max_seconds"] is None else ended.last_step
                scores = measured(job, ended.folder, at, base)
                write_scores(path, scores)
            if rung not in config["judged"]:
                tune.report({"trial": number, "step": rung, **objectives(scores)})
    except (ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        tune.report({"trial": number, "failed": (lines or [type(error).__name__])[-1]})


def _train(folder: Path, run: dict[str, Any], budget: dict[str, Any]) -> Any:
    """Trains a trial's run to a rung, from its last checkpoint; returns what ``rlvid.train.launch.train`` does."""
    from rlvid.train.launch import train

    description = RunConfig.model_validate(run)
    description = description.model_copy(update={"train": description.train.model_copy(update=budget)})
    _wait_for(folder / description.name / ".lock")
    (folder / "logs").mkdir(exist_ok=True)
    with open(folder / "logs" / f"{description.name}.log", "a", encoding="utf-8") as log:
        return train(description, Console(file=log, width=120))


def _wait_for(lock: Path) -> None:
    """Returns once no process of a killed driver holds the run any more, or after a while."""
    if lock.is_file():
        with suppress(ValueError), held(lock, "", patience=_PATIENCE_S):
            return


def measured(job: dict[str, Any], run: Path | None, step: int, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """``measure`` as a Ray task on the resources of one worker, which the trial's training does not use meanwhile."""
    task = ray.remote(measure).options(
        num_cpus=job["base"]["train"]["cpus_per_worker"],
        num_gpus=1 if job["use_gpu"] else 0,
        scheduling_strategy="DEFAULT",  # else it would have to fit into the trial's own reservation
    )
    return ray.get(task.remote(job, None if run is None else str(run), step, base))


def objectives(scores: dict[str, Any]) -> dict[str, float]:
    """Returns all possible objectives from scores."""
    further = [name for name in scores["mean"] if name == GAIN or name.startswith(REWARD_PREFIX)]
    return {name: scores["mean"][name] for name in (*METRICS, *further)} | {COST: scores[COST]}
