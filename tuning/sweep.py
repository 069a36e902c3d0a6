"""Searches for settings: trains many short runs, stops weak ones early, and writes a report.

    python tuning/sweep.py                                       # tuning/toy.yaml: lambda and S on the built-in world
    python tuning/sweep.py toy name=mine trials=12 algorithm=random 'space.method.tau={uniform: [0.4, 0.8]}'
    ray job submit --working-dir . -- python tuning/sweep.py my-sweep.yaml storage=/shared/runs

Start the same command again after an interruption, whatever ended it: finished trials are kept, others go on from their
last checkpoint. docs/sweeps.md says more.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "tuning":
    sys.path[0] = str(ROOT)  # started as a script: modules are found as tuning.*, and none by its bare name

from rlvid.config import RunConfig  # noqa: E402
from rlvid.files import held  # noqa: E402
from rlvid.interrupt import kept  # noqa: E402
from rlvid.terminal import console, run_command, say, shell, short  # noqa: E402
from tuning.description import Sweep  # noqa: E402
from tuning.journal import BASE, ENDS, Journal, read_scores, write_scores  # noqa: E402
from tuning.load import load_sweep, split_source  # noqa: E402
from tuning.resume import keep_description  # noqa: E402


def check(sweep: Sweep, planned: list[dict[str, Any]]) -> None:
    """Checks a sweep before Ray starts, besides the checks of its description.

    Raises:
        ValueError: the storage would be lost, a trial's files or the prompts are not there, or settings do not fit the
            model.
    """
    from rlvid.reward.load import check_one
    from rlvid.train.preflight import check as check_run
    from rlvid.train.preflight import in_a_job

    if in_a_job(sweep.folder):
        raise ValueError(
            f"storage = {sweep.storage!r} lies in the job's own folder, which the cluster deletes; give an absolute "
            "path that all nodes share"
        )
    _ = sweep.prompts  # are read here, before anything starts

    def files_of(run: RunConfig) -> object:
        reward = run.reward.model_dump_json(exclude={"attenuation"})
        return reward, run.model.model_dump_json(), run.data.model_dump_json(), run.method.name

    for run in different_runs(sweep, planned, files_of):
        check_run(run)
    for each in sweep.base().guard_rewards:
        check_one(each.name, each.path, f"guard.rewards {each.label}")


def different_runs(
    sweep: Sweep, planned: list[dict[str, Any]], about: Callable[[RunConfig], object]
) -> Iterator[RunConfig]:
    """Yields the runs of planned trials and probes: the first one of all that have the same ``about``."""
    seen = set()
    for settings in [*planned, *sweep.probes]:
        run = sweep.run(settings, "trial", sweep.rungs[-1])
        if (key := about(run)) not in seen:
            seen.add(key)
            yield run


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks the sweep's folder while the block runs.

    Raises:
        ValueError: another process holds it, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            otherwise = f"sweep {folder} is being run by another process; wait for its end"
            stack.enter_context(held(folder / ".lock", otherwise, folder, folder / "report", *folder.glob("*/rungs")))
        except OSError as error:
            raise ValueError(
                f"storage: {folder} cannot be written ({error.strerror}); choose another storage=..."
            ) from None
        yield


def run(sweep: Sweep, address: str | None = None) -> None:
    """Runs the trials that are left and writes the report.

    Raises:
        ValueError: bad input, before Ray starts where that can be known.
        RuntimeError: trials failed or were left over; the report is of the others.
    """
    planned = sweep.planned()
    check(sweep, planned)
    with exclusive(sweep.folder):
        keep_description(sweep)
        journal = Journal(sweep.folder)
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # is read when ray is imported
        from tuning.search import Proposals

        proposals = Proposals(sweep, journal, planned)
        say(
            f"sweep {sweep.name}: {sweep.count} trials over {', '.join(sweep.space)} ({sweep.algorithm}, "
            f"{sweep.scheduler}), measured after {', '.join(map(str, sweep.rungs))} {sweep.unit_name} by "
            f"{sweep.metric}; {proposals.left} to run"
        )
        with kept(lambda: _kept(sweep, journal)):
            if proposals.left:
                fit(sweep, planned, journal, proposals, address)
            from tuning.report import write_report

            report = write_report(sweep, journal)
    if report is None:
        say("nothing was measured, so there is no report")
    else:
        say_where(sweep)
    open_trials = [trial for trial in journal.trials if trial.end not in ENDS]
    if open_trials or len(journal.trials) < sweep.count:
        failed = ", ".join(f"{trial.name} ({trial.reason or 'interrupted'})" for trial in open_trials)
        raise RuntimeError(f"not all trials have ended: {failed or 'some never began'}; start the same command again")


def _kept(sweep: Sweep, journal: Journal) -> str:
    ended = sum(trial.end in ENDS for trial in journal.trials)
    return f"{ended} of {sweep.count} trials have ended and the others keep their checkpoints, in {short(sweep.folder)}"


def fit(sweep: Sweep, planned: list[dict[str, Any]], journal: Journal, proposals: Any, address: str | None) -> None:
    """Runs the remaining trials with Tune."""
    for name, value in {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # TensorBoard has the runs' own events
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # rlvid.interrupt has Ctrl-C
        "TUNE_MAX_PENDING_TRIALS_PG": str(sweep.concurrent),
    }.items():
        os.environ.setdefault(name, value)
    # For workers of a Ray that starts here; on a cluster, `ray job submit --working-dir .` brings the folder along.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    from rlvid.cluster.connect import start_ray
    from rlvid.cluster.nodes import check_nodes

    base = sweep.base()
    start_ray(address)

    from ray import tune

    from rlvid.data.sources import training_set
    from tuning.measure import job_of
    from tuning.search import Judge
    from tuning.trial import measured, trainable

    job = job_of(sweep, use_gpu=check_room(sweep, planned))
    check_nodes(str(sweep.folder.parent), sweep.name)
    training_set(base, console)  # once for all trials
    known = sweep.folder / BASE
    scores = read_scores(known)
    if scores is None:
        scores = measured(job, None, 0)
        write_scores(known, scores)
    values = ", ".join(f"{name} {scores['mean'][name]:.3f}" for name in sweep.objectives if name in scores["mean"])
    say(f"base model: {values}")
    tuner = tune.Tuner(
        trainable(job),
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=Judge(sweep, journal, say),
            num_samples=proposals.left,
            max_concurrent_trials=sweep.concurrent,
            trial_name_creator=lambda trial: f"trial-{trial.config['trial']:03d}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']:03d}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(sweep.folder / ".tune"),
            failure_config=tune.FailureConfig(max_failures=base.train.max_failures),
            verbose=0,
        ),
    )
    tuner.fit()


def check_room(sweep: Sweep, planned: list[dict[str, Any]]) -> bool:
    """Returns whether the base's workers, and so measurements, get a GPU each.

    Raises:
        ValueError: so many trials at a time do not fit into the cluster: they would wait for each other.
    """
    from rlvid.cluster.nodes import check_resources, needed, nodes_possible, workers_that_fit

    for run in different_runs(sweep, planned, lambda run: (run.train.model_dump_json(), run.guard.model_dump_json())):
        need = needed(run, check_resources(run))
        fit = int(workers_that_fit(nodes_possible(), need) // run.train.workers)
        if fit < sweep.concurrent:
            each = ", ".join(f"{amount:g} {kind}" for kind, amount in need.items())
            raise ValueError(
                f"concurrent = {sweep.concurrent}: trials with train.workers = {run.train.workers} at {each} each do "
                f"not fit into the cluster so often, as a worker lies on one node; allowed: 1 to {fit}"
            )
    return check_resources(sweep.base())


def say_where(sweep: Sweep) -> None:
    """Prints where the results are."""
    shown = os.path.relpath(sweep.folder)
    say(f"report       {shown}/report/report.md (results.csv, parallel.png, heatmap.png)")
    say(f"TensorBoard  tensorboard --logdir {shell(shown)}")
    say(f"next         rlvid train {shell(f'{shown}/report/best.yaml')}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake is one line and exit code 2, failed trials give 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", default="toy", help="name of a shipped sweep, such as toy, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the sweep or of the run")
    parser.add_argument("--address", help="Ray cluster to use; default: RAY_ADDRESS, else Ray on this machine")
    options = parser.parse_intermixed_args(arguments)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(level=logging.ERROR)
    source = split_source([options.sweep, *options.overrides])
    return run_command(lambda: run(load_sweep(*source), options.address))


if __name__ == "__main__":
    sys.exit(main())
