"""From what the user names to what a report shows: evaluations, joined, and the runs of their models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlvid.evaluate.style import LOOKS, Look, looks_of
from rlvid.report.curves import Group
from rlvid.report.evidence import Evidence, Model, join, read_evidence
from rlvid.report.runs import Run, read_run

_NAME = "evaluation.yaml"


@dataclass(frozen=True)
class Gathered:
    """What a report is made from; ``notes`` say what is not there."""

    evidence: Evidence
    runs: tuple[Run, ...]
    looks: dict[str, Look]
    notes: tuple[str, ...]

    def models_of(self, run: Run) -> list[Model]:
        """The evaluated models of a run."""
        return [m for m in self.evidence.tuned if m.path and _place(m.path, self.evidence) == run.folder.resolve()]

    def groups(self) -> list[Group]:
        """The runs as they are drawn: those that differ in seed alone together, in their models' looks."""
        by_kind: dict[str, list[Run]] = {}
        for run in self.runs:
            by_kind.setdefault(run.kind, []).append(run)
        methods = [runs[0].config.method.name for runs in by_kind.values()]
        labels = [
            method if methods.count(method) == 1 else ", ".join(run.name for run in runs)
            for method, runs in zip(methods, by_kind.values(), strict=True)
        ]
        ends = [[m for run in runs for m in self.models_of(run)][-1:] for runs in by_kind.values()]
        looks = [self.looks[models[0].name] if models else None for models in ends]
        spare = [look for look in LOOKS if look not in self.looks.values()]
        found: list[Group] = []
        for label, runs, look in zip(labels, by_kind.values(), looks, strict=True):
            taken = [group.look for group in found]
            if look is None or look in taken:
                look = next((each for each in [*spare, *LOOKS] if each not in taken), LOOKS[0])
            found.append(Group(label, tuple(runs), look))
        return found


def gather(targets: Sequence[str | Path]) -> Gathered:
    """Reads evaluations and runs.

    Args:
        targets: folders of evaluations, and folders (or names under ``runs``) of runs; a run's own evaluation counts.

    Raises:
        ValueError: a target is neither, a run has no checkpoint, there is no evaluation, or one is damaged.
    """
    folders: dict[Path, Path] = {}
    runs: dict[Path, Run] = {}
    for target in targets:
        path = Path(target)
        if (path / _NAME).is_file() and not (path / "config.yaml").is_file():
            folders[path.resolve()] = path
            continue
        if path.is_dir() and not (path / "config.yaml").is_file():
            raise ValueError(f"{path}: neither an evaluation ({_NAME}) nor a run (config.yaml) is there")
        run = read_run(target)
        runs[run.folder.resolve()] = run
        for own in (run.folder, run.folder / "evaluation"):
            if (own / _NAME).is_file():
                folders[own.resolve()] = own
    if not folders:
        named = ", ".join(str(run.folder) for run in runs.values()) or "nothing"
        raise ValueError(
            f"{named}: no evaluation there, and a report needs one; run `rlvid evaluate RUN`, then give its folder too"
        )
    evidence = join(read_evidence(folder) for folder in folders.values())
    notes = _repeated(evidence)
    for model in evidence.tuned:
        if not model.path:
            continue
        place = _place(model.path, evidence)
        if place in runs:
            continue
        if not (place / "config.yaml").is_file():
            notes.append(
                f"{model.label}: its run's folder ({Path(model.path).name}) is not there any more; its curves, costs, "
                "config and card are left out."
            )
            continue
        runs[place] = read_run(place)
    looks = looks_of([m.name for m in evidence.models], evidence.base.name)
    if len(evidence.models) > len(set(looks.values())):
        notes.append("There are more models than looks, so some share a marker: tell them apart by name.")
    return Gathered(evidence, tuple(runs.values()), looks, tuple(dict.fromkeys(notes)))


def _place(path: str, evidence: Evidence) -> Path:
    """Where a model's run is: as written, or beside the evaluation."""
    options = [Path(path), *(folder / path for folder in evidence.folders)]
    return next((p for p in options if (p / "config.yaml").is_file()), Path(path)).resolve()


def _repeated(evidence: Evidence) -> list[str]:
    found = []
    for name, prompts in evidence.sets.items():
        many = len(prompts) - len(set(prompts))
        if many:
            found.append(
                f"Set {name.replace('_', ' ')}: {many} of {len(prompts)} prompts are repeated; each is a case of its "
                "own, from other noise, and they are not independent."
            )
    return found
