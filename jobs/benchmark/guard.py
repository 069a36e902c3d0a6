"""Measures the guard as regret: the loss of its choice of checkpoint and scale, beside four rules.

    python -m jobs.benchmark guard runs/*/ --out guard-regret --prompts 32
    python -m jobs.benchmark guard --out guard-regret

The runs are finished ones of the built-in world, with several checkpoints each, which no guard has stopped. Every
checkpoint is evaluated once at every scale: the same prompts from the same noise, the trained and the held-out rewards,
motion, consistency, diversity, distance from the base, and the oracle's score. ``--out`` keeps a small file for each,
so that a call that was interrupted continues where it was. It then holds ``regret.md``, ``regret.json`` and
``regret.png`` over all runs that are complete in it. Without runs, the second form only writes these three. They also
have the rank correlation of each reward and metric with the oracle over all checkpoints.

``jobs/benchmark/regret.py`` defines regret and false alarms, ``jobs/benchmark/correlation.py`` the correlations.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.benchmark.guard_report import write_report
from jobs.benchmark.options import make_folder, make_parser
from jobs.benchmark.regret import ORACLE, MeasuredRun
from rlvid.config import RunConfig
from rlvid.config.model import BUILT_IN
from rlvid.data.clips import digest
from rlvid.evaluate.candidates import CandidateScorer
from rlvid.evaluate.load import device
from rlvid.evaluate.models import EvaluatedModel, Loader, find_models
from rlvid.evaluate.results.rows import Row
from rlvid.evaluate.scorers import FurtherReward, Scorers, parse_rewards
from rlvid.files import damaged, read_mapping, write_atomic
from rlvid.runs.checkpoints import checkpoint_name
from rlvid.runs.over_optimisation import HELD_OUT, TRAINED
from rlvid.runs.recommendation import DISTANCE, VETO, Candidate
from rlvid.stats import finite_mean
from rlvid.terminal import fractions, say
from rlvid.world.captions import PROMPT_SETS, prompt_set

KEPT = (TRAINED, HELD_OUT, *VETO, DISTANCE, ORACLE)
"""The metrics of every video that are kept, besides further rewards."""
ABOUT = "about.json"
SETUP = ("set", "prompts", "videos", "steps", "reuse", "seed", "scales", "checkpoints", "further")
"""The options that say how a run is measured; the last three are unknown of runs that earlier versions measured."""


@dataclass(frozen=True)
class Plan:
    """The evaluation of a run: its candidates, the base first, further held-out rewards, and the setup of all runs."""

    name: str
    candidates: Sequence[EvaluatedModel]
    further: tuple[FurtherReward, ...]
    setup: dict[str, Any]

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self.candidates[0].config

    @property
    def about(self) -> dict[str, Any]:
        """All that the values of the run depend on, and its group of the report."""
        config, scorers = self.config, Scorers.of(self.config, further=self.further)
        return {
            **self.setup, "method": config.method.name, "lr": config.optimizer.lr, "run seed": config.seed,
            "rewards": scorers.names, "scorers": scorers.identity,
            "weights": digest([each.made_of for each in self.candidates]), "files": list(map(file_of, self.candidates)),
        }  # fmt: skip


def file_of(model: EvaluatedModel) -> str:
    """Returns the name of a candidate's file."""
    return "base.json" if model.step is None else f"{checkpoint_name(model.step)}x{model.scale:g}.json"


def plan_run(
    place: str, setup: dict[str, Any], scales: Sequence[float], most: int, further: Sequence[FurtherReward]
) -> Plan:
    """Plans the evaluation of a run's folder.

    Args:
        place: the folder.
        setup: prompts, videos, DDIM steps, reuse and seed.
        scales: of every checkpoint.
        most: checkpoints, evenly over the run; the last is always there.
        further: held-out rewards besides the run's own; one that the run was trained on is left out.

    Raises:
        ValueError: no such run, one of another world, or one that a guard may have stopped.
    """
    base, *models = find_models([f"{place}@all"], scales=scales)
    config = base.config
    if config.model.path not in BUILT_IN:
        raise ValueError(f"{place}: model.path = {config.model.path!r}; only the built-in world has an oracle")
    if config.guard.every and config.guard.stop:
        raise ValueError(f"{place}: guard.stop = true; regret is measured on runs that went to their end")
    steps = sorted({model.step for model in models if model.step is not None})
    kept = {steps[-(-(k + 1) * len(steps) // min(most, len(steps))) - 1] for k in range(min(most, len(steps)))}
    held_out = tuple(each for each in further if not config.reward.trains_on(each.name, each.path))
    return Plan(base.run.name, [base, *(model for model in models if model.step in kept)], held_out, setup)


def evaluate_run(plan: Plan, out: Path) -> None:
    """Evaluates the candidates of a run that have no file yet.

    Raises:
        ValueError: ``out`` holds evaluations of the run with another setup.
    """
    folder, setup, sampling = out / plan.name, plan.setup, plan.config.sampling
    check_about(folder, plan.about)
    missing = [each for each in plan.candidates if not (folder / file_of(each)).is_file()]
    if not missing:
        return
    base, loader = plan.candidates[0], Loader()
    scorer = CandidateScorer(
        loader.use(base), Scorers.of(plan.config, further=plan.further).load(device()),
        prompt_set(setup["set"], setup["prompts"], setup["seed"]), setup["videos"], setup["steps"] or sampling.steps,
        seed=setup["seed"], guidance=sampling.guidance, final=sampling.final_level, reuse=setup["reuse"],
    )  # fmt: skip
    for model in [base, *(each for each in missing if each is not base)]:  # distances need the base's videos
        loader.use(model)
        write_atomic(folder / file_of(model), json.dumps(columns(scorer.rows(), model)).encode())
        say(f"{plan.name}: {file_of(model)}")


def columns(rows: Sequence[Row], model: EvaluatedModel) -> dict[str, Any]:
    """Returns the content of a candidate's file: every kept metric of every video, and its prompt's place.

    Null stands for a value that is not finite.
    """
    metrics = [*KEPT, *(metric for metric in rows[0].extra if metric != DISTANCE)]
    scores = {metric: [row.score(metric) for row in rows] for metric in metrics}
    values = {m: [round(v, 6) if math.isfinite(v) else None for v in each] for m, each in scores.items()}
    return {
        "step": model.step or 0,
        "scale": model.scale or 1.0,
        "prompt": [row.index for row in rows],
        "values": values,
    }


def check_about(folder: Path, about: dict[str, Any]) -> None:
    """Writes the setup of a run's evaluation, or checks that it is the one of before.

    Raises:
        ValueError: it is another one.
    """
    if compare_about(folder, about):
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ABOUT, json.dumps(about, indent=1).encode())


def compare_about(folder: Path, about: dict[str, Any]) -> bool:
    """Returns whether a run was measured before.

    Raises:
        ValueError: it was measured otherwise.
    """
    if not (folder / ABOUT).is_file():
        return False
    before = read_about(folder)
    if changed := [key for key in about if before.get(key, about[key]) != about[key]]:
        raise ValueError(
            f"--out {folder}: was measured with {changed[0]} = {before.get(changed[0])!r}, and now it is "
            f"{about[changed[0]]!r}; choose another folder, or delete this one"
        )
    return True


def read_about(folder: Path) -> dict[str, Any]:
    """Reads the setup of a run's evaluation.

    Raises:
        ValueError: it is damaged.
    """
    way = f"delete {folder}; the run is then measured anew"
    try:
        found = read_mapping(folder / ABOUT)
    except ValueError as error:
        raise ValueError(f"{error}; {way}") from error
    kinds = {"method": str, "lr": int | float, "rewards": dict, "files": list}
    if wrong := [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]:
        raise damaged(folder / ABOUT, f"{wrong[0]} = {found.get(wrong[0])!r}", way)
    if not isinstance(found["rewards"].get(TRAINED), str):
        raise damaged(folder / ABOUT, "it names no trained reward", way)
    return found


def check_alike(out: Path, plans: Sequence[Plan]) -> None:
    """Checks that all runs of a report are measured alike: those in ``out``, and those that are to be.

    Raises:
        ValueError: two are not, or a file is damaged.
    """
    setups = {plan.name: plan.setup for plan in plans}
    setups |= {path.parent.name: read_about(path.parent) for path in sorted(out.glob(f"*/{ABOUT}"))}
    names = [*setups]
    for name in names[1:]:
        for key in SETUP:
            one, other = setups[names[0]].get(key), setups[name].get(key)
            if one != other and key in setups[names[0]] and key in setups[name]:
                raise ValueError(
                    f"--out {out}: {names[0]} is measured with {key} = {one!r}, and {name} with {other!r}; one report "
                    "is of runs that are measured alike: move one of these folders, or choose another --out"
                )


def read_run(folder: Path) -> MeasuredRun | None:
    """Reads the evaluations of a run, the values of a prompt's videos averaged; None where some are still missing.

    Raises:
        ValueError: a file is damaged.
    """
    about = read_about(folder)
    paths = [folder / name for name in about["files"]]
    if not all(path.is_file() for path in paths):
        return None
    candidates = list[Candidate]()
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            places, prompts = found["prompt"], sorted(set(found["prompt"]))
            values = {
                metric: [
                    finite_mean(v for v, k in zip(each, places, strict=True) if k == p and v is not None)
                    for p in prompts
                ]
                for metric, each in found["values"].items()
            }
            candidates.append(Candidate(found["step"], found["scale"], values))
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path, error, "delete it; it is then measured anew") from None
    trained, held_out = about["rewards"][TRAINED], about["rewards"].get(HELD_OUT) or ""
    group = f"{about['method']} at {about['lr']:g} on {trained}"
    return MeasuredRun(folder.name, group, candidates, trained, held_out)


def main(arguments: list[str]) -> None:
    """Evaluates the candidates of all runs, and writes the report."""
    options = parse(arguments)
    make_folder(options.out)
    further, scales = parse_rewards(options.rewards), fractions(options.scales, "--scales")
    known = vars(options) | {"scales": sorted(scales), "further": sorted(each.metric for each in further)}
    setup = {key: known[key] for key in SETUP}
    if 1 not in scales:
        raise ValueError(f"--scales {options.scales}: must hold 1, the scale that most rules choose from")
    plans = [plan_run(run, setup, scales, options.checkpoints, further) for run in options.runs]
    names = [plan.name for plan in plans]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two runs are called {twice!r}; measure them with an --out each")
    check_alike(options.out, plans)
    for plan in plans:
        compare_about(options.out / plan.name, plan.about)  # before the first is measured, which takes minutes
    for plan in plans:
        evaluate_run(plan, options.out)
    found = {path.parent.name: read_run(path.parent) for path in sorted(options.out.glob(f"*/{ABOUT}"))}
    complete = [run for run in found.values() if run is not None]
    if missing := [name for name, run in found.items() if run is None]:
        say(f"not complete, and left out: {', '.join(missing)}")
    if not complete:
        raise ValueError(f"--out {options.out}: holds no complete evaluation of a run; name runs")
    fixed = options.fixed or max(1, min(run.checkpoints[-1].step for run in complete) // 2)
    say(write_report(options.out, complete, fixed))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__, "guard")
    parser.add_argument("runs", nargs="*", help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the evaluations and the report")
    parser.add_argument("--set", default="in_domain", choices=PROMPT_SETS, help="built-in set of the prompts")
    parser.add_argument("--prompts", type=int, default=32, help="prompts; each rule chooses on one half of them")
    parser.add_argument("--videos", type=int, default=2, help="videos of each prompt; diversity needs two")
    parser.add_argument("--steps", type=int, help="DDIM steps of a video; default: the run's sampling.steps")
    parser.add_argument("--reuse", type=int, default=1, help="as sampling.reuse; 2 almost halves the time")
    parser.add_argument("--scales", default="0.25,0.5,0.75,1", help="scales of the learned change")
    parser.add_argument("--checkpoints", type=int, default=8, help="most checkpoints of a run, evenly over it")
    parser.add_argument("--rewards", default="", help="further held-out rewards, as for rlvid evaluate --rewards")
    parser.add_argument("--fixed", type=int, help="the fixed number of steps; default: half of the shortest run's")
    parser.add_argument("--seed", type=int, default=1000, help="of prompts and noise")
    options = parser.parse_args(arguments)
    if options.prompts < 8 or min(options.videos, options.checkpoints, options.reuse) < 1:
        raise ValueError("--prompts must be 8 or more, --videos, --checkpoints and --reuse 1 or more")
    for name in ("steps", "fixed"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise ValueError(f"--{name} {given}: must be at least 1")
    return options
