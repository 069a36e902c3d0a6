"""From what the user names to what a report shows: evaluations, joined, and the runs of their models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlvid.evaluate.results.seeds import Alike, end_or_step, name_groups, part_of_run
from rlvid.plots.style import LOOKS, Look, looks_of
from rlvid.report.evidence import Evidence, Model, join, read_evidence
from rlvid.report.runs import Run, read_run

_NAME = "evaluation.yaml"


@dataclass(frozen=True)
class Group:
    """Runs that differ in seed alone, drawn as one line; with several, a band from the lowest to the highest."""

    label: str
    runs: tuple[Run, ...]
    look: Look


@dataclass(frozen=True)
class Gathered:
    """What a report is made from.

    ``seeds`` maps a row of the tables over seeds to its models' names; empty where no two differ in seed alone.
    ``notes`` say what is not there.
    """

    evidence: Evidence
    runs: tuple[Run, ...]
    looks: dict[str, Look]
    seeds: dict[str, list[str]]
    notes: tuple[str, ...]

    @property
    def pictured(self) -> list[Model]:
        """Those that pictures show: of models that differ in seed alone, the first."""
        further = {name for names in self.seeds.values() for name in names[1:]}
        return [model for model in self.evidence.models if model.name not in further]

    def called(self, model: str) -> str:
        """What a drawing's legend calls a model: its row among those over seeds, or its label."""
        labels = {model.name: model.label for model in self.evidence.models}
        return next((label for label, names in self.seeds.items() if model in names), labels[model])

    def models_of(self, run: Run) -> list[Model]:
        """The evaluated models of a run."""
        return [m for m in self.evidence.tuned if m.path and _place(m.path, self.evidence) == run.folder.resolve()]

    def _named(self, runs: Sequence[Run]) -> Alike:
        """Runs by their names; one alone as its model is called, where it has one model."""
        models = self.models_of(runs[0]) if len(runs) == 1 else []
        names = [models[0].label] if len(models) == 1 else [run.name for run in runs]
        return Alike(runs[0].config.method.name, "", names)

    def line(self, run: Run) -> dict[int, Model]:
        """Step -> the run's model there, of those with all that was learned."""
        found = {model.step: model for model in self.models_of(run) if model.step is not None and model.scale == 1}
        return dict(sorted(found.items()))

    def groups(self) -> list[Group]:
        """The runs as they are drawn: those that differ in seed alone together, in their models' looks."""
        by_kind: dict[str, list[Run]] = {}
        for run in self.runs:
            by_kind.setdefault(run.kind, []).append(run)
        labels = name_groups([self._named(runs) for runs in by_kind.values()], self.evidence.base.name, count=False)
        ends = [
            sorted((m for run in runs for m in self.models_of(run)), key=lambda m: (m.step or 0, m.scale))[-1:]
            for runs in by_kind.values()
        ]
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
        try:
            runs[place] = read_run(place)
        except ValueError as error:  # its checkpoints were deleted
            notes.append(
                f"{model.label}: its run cannot be read ({error}); its curves, costs, config and card are left out."
            )
    groups = _alike(evidence, runs)
    by_group = looks_of([evidence.base.name, *groups], evidence.base.name)
    if len(by_group) > len(set(by_group.values())):
        notes.append("There are more models than looks, so some share a marker: tell them apart by name.")
    looks = {evidence.base.name: by_group[evidence.base.name]}
    looks |= {name: by_group[label] for label, names in groups.items() for name in names}
    seeds = groups if any(len(names) > 1 for names in groups.values()) else {}
    return Gathered(evidence, tuple(runs.values()), looks, seeds, tuple(dict.fromkeys(notes)))


def _alike(evidence: Evidence, runs: dict[Path, Run]) -> dict[str, list[str]]:
    """Label -> the models that differ in seed alone, at one step and scale."""
    groups: dict[tuple[object, ...], list[Model]] = {}
    of = {m.name: runs.get(_place(m.path, evidence)) if m.path else None for m in evidence.tuned}
    for model in evidence.tuned:
        run, key = of[model.name], (model.name,)
        if run is not None:
            at = end_or_step(run.config, model.kind == "run", model.step)
            shared = (run.kind, at, model.scale)
            seeds = {other.config.seed for m in groups.get(shared, ()) if (other := of[m.name])}
            key = shared if run.config.seed not in seeds else key  # the same run by another name is no other seed
        groups.setdefault(key, []).append(model)
    alike = []
    for members in groups.values():
        first, run = members[0], of[members[0].name]
        part = part_of_run(first.step if first.kind == "checkpoint" else None, first.scale)
        method = run.config.method.name if run else first.label
        alike.append(Alike(method, part, [model.label for model in members]))
    named = name_groups(alike, evidence.base.name)
    return {name: [model.name for model in members] for name, members in zip(named, groups.values(), strict=True)}


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
