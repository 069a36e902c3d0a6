"""Finds the row of an exported model in an evaluation, by run, step and scale in ``evaluation.yaml``."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from rlvid.evaluate.results.about import ModelRecord, read_about

_FILES = ("evaluation.yaml", "evaluation.json", "evaluation.parquet")


@dataclass(frozen=True)
class ExportedModel:
    """An exported model: a run's folder, its step, and the scale of the learned change."""

    run: Path
    step: int
    scale: float

    @property
    def model(self) -> str:
        """As ``rlvid evaluate`` takes it."""
        return f"{self.run.name}@{self.step}" + ("" if self.scale == 1 else f"*{self.scale:g}")


@dataclass(frozen=True)
class CardEvaluation:
    """An evaluation for a model card, and the row of the exported model in it.

    Attributes:
        folder: of the evaluation.
        tuned: names of all models but the base.
        name: of the exported model; None where it is not there.
        why: what is missing then.
    """

    folder: Path
    tuned: tuple[str, ...]
    name: str | None
    why: str


def find_evaluated(exported: ExportedModel, folder: Path | None = None) -> CardEvaluation | None:
    """Returns the evaluation that a card shows: of a folder, or else of the run's own; None where the run has none.

    Args:
        exported: what is looked for.
        folder: of an evaluation, that must have it.

    Raises:
        ValueError: the folder has no finished evaluation, or one without the exported model; or a file is damaged.
    """
    if folder is None:
        found = find_evaluation(exported.run)
        return None if found is None else _evaluated(exported, found.parent)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"--evaluation {folder}: no evaluation there (no {missing[0]}); name a folder that `rlvid evaluate` wrote"
        )
    evaluated = _evaluated(exported, folder)
    if evaluated.name is None:
        raise ValueError(f"--evaluation {folder}: {evaluated.why}")
    return evaluated


def _evaluated(exported: ExportedModel, folder: Path) -> CardEvaluation:
    path = folder / "evaluation.yaml"
    if not path.is_file():
        why = f"it has no evaluation.yaml, which tells its models apart; {_again(exported)}"
        return CardEvaluation(folder, (), None, why)
    about = read_about(folder)
    base = next((model.name for model in about.models if model.kind == "base"), None)
    tuned = {model.name: model for model in about.models if model.kind != "base"}
    name = _row_of(exported, tuned) if exported.scale else base
    if not about.complete:
        return CardEvaluation(folder, tuple(tuned), None, "it is not finished; start the same rlvid evaluate again")
    known = ", ".join(f"{each} (step {m.step})" for each, m in tuned.items()) or "the base alone"
    why = f"the exported model, {exported.model}, is not in it, but {known}; {_again(exported)}"
    return CardEvaluation(folder, tuple(tuned), name, "" if name else why)


def _again(exported: ExportedModel) -> str:
    return f"evaluate it (rlvid evaluate {shlex.quote(exported.model)}), and export again"


def _row_of(exported: ExportedModel, models: dict[str, ModelRecord]) -> str | None:
    """Compares runs by their folder; if an evaluation's run has moved, by the folder's name."""

    def same(path: str) -> bool:
        place = Path(path)
        return place.resolve() == exported.run.resolve() or (place.name == exported.run.name and not place.exists())

    found = [
        name
        for name, model in models.items()
        if model.step == exported.step and model.scale == exported.scale and same(model.path or "")
    ]
    return found[0] if found else None


def find_evaluation(run: Path) -> Path | None:
    """Returns the ``evaluation.parquet`` of a run, where there is one."""
    return next((p / "evaluation.parquet" for p in (run, run / "evaluation") if (p / "evaluation.parquet").is_file()),
                None)  # fmt: skip
