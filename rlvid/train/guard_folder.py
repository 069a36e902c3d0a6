"""What the guard leaves in a run's folder: its looks, the best checkpoint, and the flag that ends training.

======================  ==========================================================================================
``guard.jsonl``         a line a look: step, time, the mean of every metric, and one value a prompt
``guard.png``           trained and held-out reward over the looks
``guard/step-000040/``  copies of checkpoints that wait for their look, so that none is deleted before it
``guard/stop``          there once training is to end
``best/``               a copy of the best checkpoint's adapter (or unet), its state.json, and best.json
``tensorboard/guard/``  the same numbers as scalars, the warnings as text
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

from rlvid.config import RunConfig
from rlvid.data.prompts import resolve_prompts
from rlvid.files import write_whole
from rlvid.models.trained import trained_file
from rlvid.runs.checkpoints import checkpoint_name, find_checkpoints, flaw
from rlvid.runs.guard_log import GuardEvaluation, best_step, describe, read_lines
from rlvid.runs.over_optimisation import Loss, Verdict, judge
from rlvid.world.captions import PROMPT_SETS


def guard_prompts(config: RunConfig, captions: list[str]) -> list[str]:
    """The prompts of a run's looks: ``guard.prompts``, or the first distinct captions of its clips.

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


class GuardLog:
    """The looks of one run, in the order of their steps.

    Args:
        run: the run's folder.
        prompts: of the looks.
        config: the run's.

    Raises:
        ValueError: ``guard.jsonl`` is damaged, or of other prompts or numbers of videos or steps.
    """

    def __init__(self, run: Path, prompts: Sequence[str], config: RunConfig) -> None:
        self.run, self.config = run, config
        self.path, self.pending, self.best = run / "guard.jsonl", run / "guard", run / "best"
        asked = [list(prompts), config.guard.videos_per_prompt, config.guard.steps or config.sampling.steps]
        self.identity = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
        self._lines = read_lines(run)
        if any(line["of"] != self.identity for line in self._lines):
            raise ValueError(
                f"{self.path} holds looks at other prompts, guard.videos_per_prompt or guard.steps than these; "
                "bring the settings back, or delete that file to begin anew"
            )
        self.all = [GuardEvaluation.of(line) for line in self._lines]

    @property
    def steps(self) -> list[int]:
        """Of all looks, ascending."""
        return [look.step for look in self.all]

    def add(self, look: GuardEvaluation) -> None:
        """Notes a look; one that is there already is replaced."""
        mean = {metric: _number(look.mean(metric)) for metric in look.values}
        values = {metric: [_number(value) for value in each] for metric, each in look.values.items()}
        line = {"step": look.step, "time": time.time(), "of": self.identity, "mean": mean, "values": values}
        self._lines = sorted([x for x in self._lines if x["step"] != look.step] + [line], key=lambda x: x["step"])
        self.all = sorted([x for x in self.all if x.step != look.step] + [look], key=lambda x: x.step)
        write_whole(self.path, "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in self._lines).encode())

    def verdict(self) -> Verdict:
        """On all looks."""
        return judge([look.values for look in self.all])

    def stage(self, last: bool) -> list[int]:
        """Copies checkpoints that are due for a look; the steps that wait, ascending.

        Args:
            last: also the latest checkpoint, whatever its step.
        """
        every, done = self.config.guard.every, set(self.steps)
        found = find_checkpoints(self.run, resumable=False)
        for each in found:
            due = each.step % every == 0 or (last and each is found[-1])
            target = self.pending / checkpoint_name(each.step)
            if due and each.step not in done and not target.is_dir():
                try:
                    copy_trained(each.folder, target)
                except OSError:
                    shutil.rmtree(target.with_name(f".{target.name}"), ignore_errors=True)
                    if flaw(each.folder, resumable=False, read=True) is None:
                        raise  # else it is damaged, or was deleted meanwhile: a later one has come
        return sorted(each.step for each in find_checkpoints(self.pending, resumable=False) if each.step not in done)

    def settle(self, verdict: Verdict) -> None:
        """Brings ``best/`` up to what the looks say, and forgets copies that have had their look."""
        look, fresh = self.all[verdict.best], self.run / ".best"
        if not self.best.is_dir() and (fresh / "best.json").is_file():  # killed between the two last steps below
            fresh.rename(self.best)
        copied = next((p for p in self._copies(look.step) if look.step == 0 or flaw(p, resumable=False) is None), None)
        if best_step(self.run) != look.step and copied is not None:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            if look.step:
                copy_trained(copied, fresh)
            about = {"step": look.step, "mean": {m: _number(look.mean(m)) for m in look.values}}
            (fresh / "best.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(self.best, ignore_errors=True)
            fresh.rename(self.best)
        for found in find_checkpoints(self.pending, resumable=False):
            if found.step in self.steps:
                shutil.rmtree(found.folder, ignore_errors=True)

    def _copies(self, step: int) -> list[Path]:
        return [folder / checkpoint_name(step) for folder in (self.pending, self.run)]

    def flag(self, verdict: Verdict) -> bool:
        """Whether training is to end (``guard.stop``); leaves or removes ``guard/stop``, which workers look for."""
        path = stop_flag(self.run)
        if self.config.guard.stop and verdict.spoilt:
            write_whole(path, f"{verdict.spoilt.metric}\n".encode())
            return True
        path.unlink(missing_ok=True)
        return False

    def describe(self, loss: Loss) -> str:
        """One line: what was lost, since when, and at what trained reward."""
        return describe(self.all, loss)


def stop_flag(run: Path) -> Path:
    """The file whose presence asks training to end."""
    return run / "guard" / "stop"


def copy_trained(checkpoint: Path, target: Path) -> None:
    """Copies what evaluation needs of a checkpoint; ``target`` appears atomically, unless it is there."""
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


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
