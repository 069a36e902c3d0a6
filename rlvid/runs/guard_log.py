"""Reads the guard's files in a run's folder: its evaluations, its warnings, and its best checkpoint.

``rlvid.train.guard_folder`` lists the files, and writes them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from rlvid.escape import one_line
from rlvid.files import damaged, read_mapping
from rlvid.metric_names import metric_of
from rlvid.runs.checkpoints import CheckpointRef, flaw, read_state
from rlvid.runs.over_optimisation import COLLAPSE, HELD_OUT, TOLERANCE, TRAINED, Loss, is_fatal, judge
from rlvid.runs.recommendation import DISTANCE, Candidate, Recommendation
from rlvid.stats import finite_mean

_ANEW = "delete the folder best; while the run continues, the guard writes it again"


class _Line(BaseModel):
    """A line of ``guard.jsonl``; null stands for a number that is not finite."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    step: Annotated[int, Field(ge=0)]
    scale: Annotated[float, Field(gt=0, le=4)] = 1.0
    """Of the learned change; earlier versions evaluated at scale 1 alone, and wrote none."""
    time: float
    of: str
    mean: dict[str, float | None]
    values: dict[str, list[float | None]]


@dataclass(frozen=True)
class GuardEvaluation(Candidate):
    """The guard's evaluation of a checkpoint at a scale of the learned change; the base model's is step 0, scale 1."""

    @classmethod
    def of(cls, line: dict[str, Any]) -> "GuardEvaluation":
        """Makes an evaluation of a line of ``guard.jsonl``."""
        values = {m: [math.nan if v is None else float(v) for v in each] for m, each in line["values"].items()}
        return cls(line["step"], line["scale"], values)

    @property
    def place(self) -> tuple[int, float]:
        """Step and scale."""
        return self.step, self.scale

    def mean(self, metric: str) -> float:
        """Averages a metric over the prompts with a finite value; NaN where there is none."""
        return finite_mean(self.values[metric])


def at_scale_1(evaluations: Iterable[GuardEvaluation]) -> list[GuardEvaluation]:
    """Returns the evaluations of checkpoints as they are, which the warnings are about, in the order of their steps."""
    return sorted((each for each in evaluations if each.scale == 1), key=lambda each: each.step)


def describe(evaluations: Sequence[GuardEvaluation], loss: Loss) -> str:
    """Describes a warning in one line; ``loss`` gives evaluations by their place in those at scale 1."""
    now, then = evaluations[loss.at], evaluations[loss.best]
    side = "" if is_fatal(loss.metric) else "side effect, "
    trained, lost = metric_of(TRAINED), metric_of(HELD_OUT if loss.metric == COLLAPSE else loss.metric)
    what = f"{lost.spoken} falls"
    if is_fatal(loss.metric):
        what = "collapsed" if loss.metric == COLLAPSE else "over-optimised"
    return (
        f"{side}{what} at step {now.step}: since step {then.step} the {trained.axis} went from "
        f"{trained.number(then.mean(TRAINED))} to {trained.number(now.mean(TRAINED))} and {lost.spoken} from "
        f"{lost.number(loss.before)} to {lost.number(loss.after)}, at two evaluations in a row beyond noise "
        f"({lost.margin(loss.half).strip()} over {len(now.values[TRAINED])} prompts)"
    )


def warnings_of(run: Path) -> list[str] | None:
    """Returns the warnings of a run's guard, a line each; None where there was no guard.

    Raises:
        ValueError: ``guard.jsonl`` is damaged.
    """
    found = at_scale_1(map(GuardEvaluation.of, read_lines(run)))
    if not found:
        return None
    return [describe(found, loss) for loss in judge([each.values for each in found]).warnings.values()]


def find_best(run: Path) -> CheckpointRef | None:
    """Returns the guard's best checkpoint, if it has one that is not the base model."""
    if flaw(run / "best", resumable=False) is not None:
        return None
    return CheckpointRef(run / "best", read_state(run / "best").step)


def best_step(run: Path) -> int | None:
    """Returns the step of the guard's best model, 0 for the base; None where there was no guard.

    Raises:
        ValueError: ``best.json`` is damaged.
    """
    found = read_recommendation(run)
    return found.step if found else None


def read_recommendation(run: Path) -> Recommendation | None:
    """Reads the checkpoint and the scale that the guard recommends; None where there was no guard.

    Raises:
        ValueError: ``best.json`` is damaged.
    """
    path = run / "best" / "best.json"
    if not path.is_file():
        return None
    try:
        found = read_mapping(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_ANEW}") from None
    step, scale, reason = found.get("step"), found.get("scale", 1.0), found.get("reason", "")
    if type(step) is not int or step < 0:
        raise damaged(path, f"step: {step!r:.40}; allowed: 0 or more", _ANEW)
    if type(scale) not in (int, float) or not 0 < scale <= 4:
        raise damaged(path, f"scale: {scale!r:.40}; allowed: above 0 and at most 4", _ANEW)
    return Recommendation(step, float(scale), one_line(str(reason)))


def read_means(run: Path) -> tuple[list[int], dict[str, list[float]]]:
    """Reads the steps and the means of every metric of a run's evaluations at scale 1; both empty without any."""
    lines = [line for line in read_lines(run) if line["scale"] == 1]
    names = list(lines[0]["mean"]) if lines else []
    found = {m: [math.nan if x["mean"][m] is None else float(x["mean"][m]) for x in lines] for m in names}
    return [line["step"] for line in lines], found


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Reads ``guard.jsonl``, a dict per line with the keys of ``_Line``; empty where there was no guard.

    Raises:
        ValueError: it is damaged.
    """
    path, way_out = run / "guard.jsonl", "delete it; the guard then starts anew"
    if not path.is_file():
        return []
    try:
        found = [_Line.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, OSError) as error:
        raise damaged(path, error, way_out) from None
    if not all(DISTANCE in line.values for line in found):  # earlier versions did not measure it
        for line in found:
            line.values.pop(DISTANCE, None)
            line.mean.pop(DISTANCE, None)
    for line in found:
        alike = line.values.keys() == found[0].values.keys() and line.mean.keys() == found[0].mean.keys()
        lengths = {len(each) for each in line.values.values()}
        if not alike or not {TRAINED, HELD_OUT, *TOLERANCE} <= line.values.keys() or len(lengths) != 1 or 0 in lengths:
            raise damaged(path, f"the evaluation at step {line.step} lacks numbers", way_out)
    return [line.model_dump() for line in found]
