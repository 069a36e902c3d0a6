"""Proposes settings and stops trials: Ray Tune's searcher and scheduler, with the journal as their memory.

Tune's own restore keeps neither what ASHA has seen nor trials that began after its last snapshot, and unpickles. Here a
start reads the journal instead: finished trials are not run, the others come first with what was proposed for them, and
ASHA gets the past results in their order, Optuna by the number of the trial.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from rlvid.terminal import say
from tuning.description import COST, Sweep
from tuning.journal import ENDS, FINISHED, GOES_ON, INVALID, STOPPED, Journal, Trial
from tuning.judges import check_trial
from tuning.space import shown


class Proposals(Searcher):
    """Proposes the trials that have not ended: those of the journal, those planned, then Optuna's.

    Args:
        sweep: the sweep.
        journal: what was done before; gets a line for each new trial.
        planned: settings of all trials that are known from the start.
    """

    def __init__(self, sweep: Sweep, journal: Journal, planned: list[dict[str, Any]]) -> None:
        super().__init__()
        self._sweep, self._journal, self._optuna = sweep, journal, None
        self._base = sweep.base()
        known = journal.trials
        for number in range(len(known), len(planned)):
            journal.append({"trial": number, "settings": planned[number]})
        self._open = [trial for trial in journal.trials if trial.end not in ENDS]
        self._next = len(journal.trials)
        self._running: dict[str, int] = {}
        if sweep.algorithm == "optuna":
            past = [(trial.settings, trial.score) for trial in known if trial.end in (STOPPED, FINISHED)]
            self._optuna = _optuna(sweep, past, sweep.seed + len(known))

    @property
    def left(self) -> int:
        """Trials that have not ended, those that are not proposed yet included."""
        return len(self._open) + self._sweep.count - self._next

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Does nothing: the space is the sweep's."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Returns the next trial's number, run, budgets, and judged rungs; Tune passes them to ``run_trial``.

        Optuna knows no more than the ranges: a combination that is no valid run ends there, and the next one comes.
        """
        while (trial := self._propose()) is not None:
            try:
                run = self._sweep.run(trial.settings, trial.name, self._sweep.rungs[0])
                budgets = self._sweep.budgets(run)
                check_trial(self._sweep.objectives, self._base, run)
            except ValueError as error:
                self._journal.append({"trial": trial.number, "invalid": str(error)})
                say(f"{trial.name} is {INVALID}: {error}")
                continue
            self._running[trial_id] = trial.number
            return {"trial": trial.number, "run": run.model_dump(), "budgets": budgets, "judged": trial.judged}
        return Searcher.FINISHED

    def _propose(self) -> Trial | None:
        if self._open:
            return self._open.pop(0)
        if self._optuna is None or self._next == self._sweep.count:
            return None
        trial = Trial(self._next, _plain(self._optuna.suggest(str(self._next))))
        self._journal.append({"trial": trial.number, "settings": trial.settings})
        self._next += 1
        return trial

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Passes the score of a trial that ended to Optuna."""
        number = self._running.pop(trial_id, None)
        if self._optuna is None or number is None:
            return
        trial = self._journal.trial(number)
        if trial.end in (STOPPED, FINISHED):
            self._optuna.add_evaluated_point(trial.settings, trial.score)

    def save(self, checkpoint_path: str) -> None:
        """Writes the numbers that are left into Tune's snapshot; nothing is restored from it."""
        Path(checkpoint_path).write_text(json.dumps([trial.number for trial in self._open]), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Fails always: a sweep is restored from its journal.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a sweep is restored from its journal: start the same command again")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if hasattr(value, "item") else value for key, value in settings.items()}


def _optuna(sweep: Sweep, past: list[tuple[dict[str, Any], float | None]], seed: int) -> Any:
    """Tune's OptunaSearch (TPE) that knows the past; its first proposals are random, so a restart needs another seed.

    Raises:
        ValueError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError(
            "algorithm = 'optuna' needs the package optuna: pip install '.[optuna]'; or set algorithm=random"
        ) from None
    from ray.tune.search.optuna import OptunaSearch

    kinds = optuna.distributions
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, optuna.distributions.BaseDistribution] = {}
    for one in sweep.dimensions:
        if one.kind == "choice":
            space[one.key] = kinds.CategoricalDistribution(one.values)
        elif one.kind == "integers":
            space[one.key] = kinds.IntDistribution(*one.values)
        else:
            low, high = one.values
            space[one.key] = kinds.FloatDistribution(low, high, log=one.kind == "loguniform")
    found = OptunaSearch(space, metric="score", mode="max", seed=seed)
    for settings, score in past:
        found.add_evaluated_point(settings, score)
    return found


class Judge(FIFOScheduler):
    """Decides after each rung whether a trial continues: by ASHA (Li et al. 2018), or all continue.

    A rung counts as the time reduction^k, so that ASHA's rungs are the sweep's, whatever their steps. The last rung
    ends a trial, so ASHA does not stop it there.

    Args:
        sweep: the sweep.
        journal: what was decided before; gets a line for each decision.
        tell: gets a line of text for each.
    """

    def __init__(self, sweep: Sweep, journal: Journal, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._sweep, self._journal, self._tell, self._asha = sweep, journal, tell, None
        self._seen: set[int] = set()
        if sweep.scheduler == "asha":
            self._asha = ASHAScheduler(
                time_attr="time", metric="score", mode="max", grace_period=1, stop_last_trials=False,
                reduction_factor=sweep.reduction, max_t=sweep.reduction ** len(sweep.rungs),
            )  # fmt: skip
            for entry in journal.entries:
                if "score" in entry:
                    self._ask(entry["trial"], entry["step"], entry["score"])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune's question after each report; the answer is in the journal before Tune has it."""
        number = int(trial.config["trial"])
        named = self._journal.trial(number)
        if "failed" not in result and not math.isfinite(result[self._sweep.metric]):
            result = {"failed": f"{self._sweep.metric} is not finite after {result['step']} {self._sweep.unit_name}"}
        if "failed" in result:
            self._journal.append({"trial": number, "failed": result["failed"]})
            self._tell(f"{named.name} failed: {result['failed']}")
            return TrialScheduler.STOP
        step, score = int(result["step"]), float(result[self._sweep.metric])
        stop = self._ask(number, step, score)
        decision = FINISHED if step == self._sweep.rungs[-1] else STOPPED if stop else GOES_ON
        self._journal.append({"trial": number, "step": step, "score": score, "decision": decision})
        values = ", ".join(f"{name} {result[name]:.3f}" for name in self._sweep.objectives if name != COST)
        self._tell(f"{named.name} ({shown(named.settings)}) after {step} {self._sweep.unit_name}: {values}; {decision}")
        return TrialScheduler.STOP if decision == STOPPED else TrialScheduler.CONTINUE

    def _ask(self, number: int, step: int, score: float) -> bool:
        """Returns whether ASHA would stop the trial here; it keeps the score either way."""
        rung = self._sweep.rungs.index(step)
        if self._asha is None or rung + 1 == len(self._sweep.rungs):
            return False
        named = SimpleNamespace(trial_id=str(number))  # Tune's own ids change with each start
        if number not in self._seen:
            self._seen.add(number)
            self._asha.on_trial_add(None, named)
        time = self._sweep.reduction**rung
        return self._asha.on_trial_result(None, named, {"time": time, "score": score}) == TrialScheduler.STOP
