"""The journal of a sweep on disk, from which it resumes after the end of its driver.

A sweep's folder, ``{storage}/{name}``::

    sweep.yaml                 the description, as validated, and the base run's settings
    journal.jsonl              what was proposed, measured and decided, a line each, in order
    base.json                  the base model's scores
    trial-000/                 a run's folder, as of any run; of variants and seeds LABEL-seed0/
    trial-000/rungs/000004.json    the scores after 4 steps
    logs/trial-000.log         what its training printed
    hparams/                   TensorBoard: scores of each trial against its settings
    report/                    tables, pictures, best.yaml, report.md

Scores are written by the trial before they are reported, and a decision by the driver before it is acted on. So
whatever is in neither was not finished, and its run resumes from its own checkpoint.
"""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from rlvid.files import damaged, write_atomic
from tuning.space import VARIANT

BASE = "base.json"
"""The file of the base model's scores."""
GOES_ON, STOPPED, FINISHED = "goes on", "stopped early", "finished"
INVALID = "no valid run"
ENDS = (STOPPED, FINISHED, INVALID)
"""The final ends of a trial; a failed trial is tried again."""


_WAY_OUT = "delete that line and those after it, or the sweep's folder, and start again"


class _Line(BaseModel):
    """A line of the journal: settings, a failure, an invalid run, or a score with its decision."""

    model_config = ConfigDict(extra="forbid", strict=True)

    trial: int
    settings: dict[str, Any] | None = None
    failed: str | None = None
    invalid: str | None = None
    step: int | None = None
    score: float | None = None
    decision: Literal["goes on", "stopped early", "finished"] | None = None


class _Scores(BaseModel):
    """A file of scores, see ``tuning.measure.measure``."""

    model_config = ConfigDict(extra="forbid")

    step: int
    seconds: float
    videos: int
    mean: dict[str, float]
    std: dict[str, float]
    rows: list[dict[str, Any]]
    scaled: dict[str, dict[str, dict[str, float]]] = {}


@dataclass
class Trial:
    """A trial in the journal: the rungs that were judged, how it ended, if it has, and its last score."""

    number: int
    settings: dict[str, Any]
    judged: list[int] = field(default_factory=list)
    end: str | None = None
    reason: str | None = None
    score: float | None = None

    @property
    def name(self) -> str:
        """Of the trial and its run."""
        return trial_name(self.number, self.settings)


def trial_name(number: int, settings: dict[str, Any]) -> str:
    """``trial-007``, or ``LABEL-seed0`` where variants and seeds are all that varies."""
    if settings.keys() == {VARIANT, "seed"}:
        return f"{settings[VARIANT]}-seed{settings['seed']}"
    return f"trial-{number:03d}"


class Journal:
    """Appends lines that survive the process, and reads them back.

    Each line is parsed once: a journal holds what it has read, and reads what was added to the file since, by itself or
    by a copy, as Tune works on copies of what it is given.

    A last line that a kill has cut short is dropped, and its work is done again. A failed trial is open again, so that
    starting the sweep once more gives it another chance.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.jsonl"
        self._forget()
        if self.path.is_file():
            write_atomic(self.path, b"".join(_line(entry) for entry in self.entries))
            self._forget()

    def _forget(self) -> None:
        self._entries, self._trials, self._read = list[dict[str, Any]](), dict[int, Trial](), 0

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All lines.

        Raises:
            ValueError: a line is damaged.
        """
        self._catch_up()
        return list(self._entries)

    def append(self, entry: dict[str, Any]) -> None:
        """Writes a line through to the disk."""
        with open(self.path, "ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    @property
    def trials(self) -> list[Trial]:
        """All trials that were proposed, by number; they do not change with the journal."""
        self._catch_up()
        return [_copy(self._trials[number]) for number in sorted(self._trials)]

    def trial(self, number: int) -> Trial:
        """Returns one of the trials."""
        self._catch_up()
        return _copy(self._trials[number])

    def _catch_up(self) -> None:
        """Reads the lines that were added since the last call."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                entry = self._parse(line)
                self._entries.append(entry)
                self._note(entry)
                self._read += len(line)

    def _parse(self, line: bytes) -> dict[str, Any]:
        number = len(self._entries) + 1
        try:
            entry = _Line.model_validate(json.loads(line)).model_dump(exclude_unset=True)
        except ValueError as error:
            raise damaged(self.path, f"line {number}: {error}", _WAY_OUT) from None
        if "settings" not in entry and (
            entry["trial"] not in self._trials
            or not (entry.keys() & {"failed", "invalid"} or entry.keys() >= {"decision", "step", "score"})
        ):
            raise damaged(self.path, f"line {number}: it is of no trial that was proposed, or has no result", _WAY_OUT)
        return entry

    def _note(self, entry: dict[str, Any]) -> None:
        number = entry["trial"]
        if "settings" in entry:
            self._trials[number] = Trial(number, entry["settings"])
            return
        trial = self._trials[number]
        if "failed" in entry:
            trial.end, trial.reason = "failed", entry["failed"]
        elif "invalid" in entry:
            trial.end, trial.reason = INVALID, entry["invalid"]
        else:
            trial.judged.append(entry["step"])
            trial.end, trial.reason = None if entry["decision"] == GOES_ON else entry["decision"], None
            trial.score = entry["score"]


def _copy(trial: Trial) -> Trial:
    return replace(trial, judged=list(trial.judged))


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def scores_path(folder: Path, name: str, rung: int) -> Path:
    """Returns the path of a trial's scores at a rung."""
    return folder / name / "rungs" / f"{rung:06d}.json"


def read_scores(path: Path) -> dict[str, Any] | None:
    """Scores as ``tuning.measure`` makes them; None where there are none yet.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        return _Scores.model_validate(json.loads(path.read_text(encoding="utf-8"))).model_dump()
    except ValueError as error:
        raise damaged(path, error, "bring it back, or choose another name=... to sweep anew") from None


def write_scores(path: Path, scores: dict[str, Any]) -> None:
    """Writes scores in one step."""
    write_atomic(path, json.dumps(scores).encode())
