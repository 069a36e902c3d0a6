"""The guard's files in a run's folder: its evaluations, the best checkpoint, and the flag that ends training.

======================  ==========================================================================================
``guard.jsonl``         a line per evaluation: step, scale, time, the mean of every metric, and one value per prompt
``guard.png``           trained and held-out reward over the evaluations
``guard/step-000040/``  copies of checkpoints that wait for their evaluation, so that none is deleted before it
``guard/stop``          there once training is to end
``best/``               a copy of the recommended checkpoint's adapter (or unet), its state.json, and best.json: step,
                        scale, the reason, and the means
``tensorboard/guard/``  the means as scalars, the warnings as text
``logs/guard.log``      warnings and errors
======================  ==========================================================================================
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvid.config import RunConfig
from rlvid.data.prompts import resolve_prompts
from rlvid.files import write_atomic
from rlvid.models.trained_files import trained_file
from rlvid.runs.checkpoints import checkpoint_name, find_checkpoints, flaw, read_state
from rlvid.runs.guard_log import GuardEvaluation, at_scale_1, best_step, describe, read_lines
from rlvid.runs.over_optimisation import Loss, Verdict, judge
from rlvid.runs.recommendation import Recommendation, recommend
from rlvid.train.record import reward_digest
from rlvid.world.captions import PROMPT_SETS


def guard_prompts(config: RunConfig, captions: Sequence[str]) -> list[str]:
    """Returns the prompts of a run's evaluations: ``guard.prompts``, or the first distinct captions of its clips.

    Raises:
        ValueError: there are fewer than four, or ``guard.prompts`` cannot be read.
    """
    spec, count = config.guard.prompts, config.guard.count
    if spec is None:
        found = list(dict.fromkeys(captions))[:count]
    elif spec in PROMPT_SETS:
        found = resolve_prompts(spec, count, config.seed)
    else:
        found = list(dict.fromkeys(resolve_prompts(str(Path(spec).expanduser()))))[:count]
    if len(found) < 4:
        raise ValueError(
            f"guard.prompts = {spec or 'the captions of the clips'!r}: there are {len(found)} different ones, and "
            "noise is judged over at least 4; name a file with more, or a built-in set such as in_domain"
        )
    return found


def _digest(settings: list[Any]) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def forget(run: Path) -> None:
    """Deletes what the guard wrote for a run that has not begun: its settings may still change."""
    if not (run / "guard.jsonl").exists():
        return
    for folder in (run / "guard", run / "best", run / "tensorboard" / "guard"):
        shutil.rmtree(folder, ignore_errors=True)
    (run / "guard.png").unlink(missing_ok=True)
    (run / "guard.jsonl").unlink()  # last: a process that is killed before begins anew


class GuardLog:
    """The evaluations of one run, in the order of their steps.

    Args:
        run: the run's folder.
        prompts: of the evaluations.
        config: the run's.

    Raises:
        ValueError: ``guard.jsonl`` is damaged, or of other prompts or numbers of videos or steps.
    """

    def __init__(self, run: Path, prompts: Sequence[str], config: RunConfig) -> None:
        self.run, self.config = run, config
        self.path, self.pending, self.best = run / "guard.jsonl", run / "guard", run / "best"
        settings: list[Any] = [list(prompts), config.guard.videos_per_prompt]
        settings.append(config.guard.steps or config.sampling.steps)
        if config.guard_rewards:
            settings.append([each.model_dump() for each in config.guard_rewards])
        known = [_digest(settings)]  # the only one of earlier versions
        if files := [found for each in config.guard_rewards if (found := reward_digest(each.path))]:
            known.append(_digest([*settings, files]))
        self.identity = known[-1]
        self._lines = read_lines(run)
        if any(line["of"] not in known for line in self._lines):
            raise ValueError(
                f"{self.path} holds evaluations with another guard.prompts, guard.videos_per_prompt, guard.steps or "
                "guard.rewards (in earlier versions [] on the built-in models), or with other files of these rewards; "
                "restore them, or delete that file to start the guard anew"
            )
        self.all = [GuardEvaluation.of(line) for line in self._lines]

    @property
    def checkpoints(self) -> list[GuardEvaluation]:
        """The evaluations at scale 1, which are judged, in the order of their steps."""
        return at_scale_1(self.all)

    @property
    def steps(self) -> list[int]:
        """The steps of these, ascending."""
        return [evaluation.step for evaluation in self.checkpoints]

    def add(self, evaluation: GuardEvaluation) -> None:
        """Saves an evaluation, in place of an earlier one of its step and scale."""
        mean = {metric: _number(evaluation.mean(metric)) for metric in evaluation.values}
        values = {metric: [_number(value) for value in each] for metric, each in evaluation.values.items()}
        line = {"step": evaluation.step, "scale": evaluation.scale, "time": time.time(), "of": self.identity}
        line |= {"mean": mean, "values": values}
        others = [x for x in self._lines if (x["step"], x["scale"]) != evaluation.place]
        self._lines = sorted([*others, line], key=lambda x: (x["step"], x["scale"]))
        self.all = sorted([x for x in self.all if x.place != evaluation.place] + [evaluation], key=lambda x: x.place)
        write_atomic(self.path, "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in self._lines).encode())

    def verdict(self) -> Verdict:
        """Judges all evaluations at scale 1."""
        return judge([evaluation.values for evaluation in self.checkpoints])

    def recommendation(self) -> Recommendation:
        """Recommends a checkpoint and a scale, among those whose weights are still there."""
        there = {step for step in self.steps if not step or self._copy(step)}
        return recommend([evaluation for evaluation in self.all if evaluation.step in there])

    def missing(self, step: int) -> list[float]:
        """Returns the scales at which a checkpoint is still to be evaluated: 1 first, for the warnings."""
        done, scales = {evaluation.place for evaluation in self.all}, self.config.guard.scales if step else [1.0]
        return [scale for scale in sorted(scales, key=lambda each: each != 1) if (step, scale) not in done]

    def stage(self, last: bool) -> list[int]:
        """Copies checkpoints that are due for an evaluation; returns the steps that wait, ascending.

        Args:
            last: also the latest checkpoint, whatever its step.
        """
        every = self.config.guard.every
        found = find_checkpoints(self.run, resumable=False)
        for each in found:
            due = each.step % every == 0 or (last and each is found[-1])
            target = self.pending / checkpoint_name(each.step)
            if due and self.missing(each.step) and not target.is_dir():
                try:
                    copy_trained(each.folder, target)
                except OSError:
                    shutil.rmtree(target.with_name(f".{target.name}"), ignore_errors=True)
                    if flaw(each.folder, resumable=False, read=True) is None:
                        raise  # else it is damaged, or was deleted meanwhile: a later one has come
        waiting = find_checkpoints(self.pending, resumable=False)
        return sorted(each.step for each in waiting if self.missing(each.step))

    def update_best(self, best: Recommendation) -> None:
        """Updates ``best/``, and deletes the copies of evaluated checkpoints."""
        fresh = self.run / ".best"
        if not self.best.is_dir() and (fresh / "best.json").is_file():  # killed between the two last steps below
            fresh.rename(self.best)
        mean = next(each for each in self.all if each.place == (best.step, best.scale))
        means = {metric: _number(mean.mean(metric)) for metric in mean.values}
        about = {"step": best.step, "scale": best.scale, "reason": best.reason, "mean": means}
        text = (json.dumps(about, indent=2) + "\n").encode()
        copied = self._copy(best.step) if best.step else self.run
        if best_step(self.run) == best.step:
            write_atomic(self.best / "best.json", text)
        elif copied is not None:
            if copied != fresh:  # else a kill came before the two last steps below
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir()
                if best.step:
                    copy_trained(copied, fresh)
            (fresh / "best.json").write_bytes(text)
            shutil.rmtree(self.best, ignore_errors=True)
            fresh.rename(self.best)
        for found in find_checkpoints(self.pending, resumable=False):
            if not self.missing(found.step):
                shutil.rmtree(found.folder, ignore_errors=True)

    def _copy(self, step: int) -> Path | None:
        """Returns a folder with the trained weights of a step, if there is one."""
        places = [folder / checkpoint_name(step) for folder in (self.pending, self.run)]
        places += [folder for folder in (self.best, self.run / ".best") if _step_in(folder) == step]
        return next((place for place in places if flaw(place, resumable=False) is None), None)

    def flag(self, verdict: Verdict) -> bool:
        """Returns whether training should end; writes or removes ``guard/stop``, which workers read."""
        path = stop_flag(self.run)
        if self.config.guard.stop and verdict.fatal_loss:
            write_atomic(path, f"{verdict.fatal_loss.metric}\n".encode())
            return True
        path.unlink(missing_ok=True)
        return False

    def describe(self, loss: Loss) -> str:
        """Describes a loss in one line: the metric, the steps, and the trained reward."""
        return describe(self.checkpoints, loss)


def stop_flag(run: Path) -> Path:
    """Returns the file whose presence asks training to end."""
    return run / "guard" / "stop"


def copy_trained(checkpoint: Path, target: Path) -> None:
    """Copies the files of a checkpoint that evaluation needs; ``target`` appears atomically, unless it exists."""
    part = target if target.is_dir() else target.with_name(f".{target.name}")
    if part != target:
        shutil.rmtree(part, ignore_errors=True)
    weights = trained_file(checkpoint).parent
    shutil.copytree(weights, part / weights.name)
    shutil.copy2(checkpoint / "state.json", part / "state.json")
    if why := flaw(part, resumable=False, read=True):
        raise OSError(f"checkpoint {checkpoint} is damaged ({why})")
    if part != target:
        part.rename(target)


def _step_in(folder: Path) -> int | None:
    """Returns the step of the checkpoint in a folder, if it holds one."""
    return read_state(folder).step if flaw(folder, resumable=False) is None else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
