"""The inputs of a report: the user's evaluations, joined, and the runs of their models."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlvid.evaluate.results.about import ModelRecord
from rlvid.evaluate.results.read import EvaluationData, read_evaluation
from rlvid.evaluate.results.seeds import RunGroup, name_groups, name_models, seedless
from rlvid.metric_names import set_title
from rlvid.plots.style import STYLES, PlotStyle, styles_of
from rlvid.report.runs import Run, read_run

_NAME = "evaluation.yaml"


@dataclass(frozen=True)
class Group:
    """Runs that differ in seed alone, drawn as one line; with several, a band from the lowest to the highest."""

    label: str
    runs: tuple[Run, ...]
    style: PlotStyle


@dataclass(frozen=True)
class ReportInputs:
    """The inputs of a report.

    ``seeds`` maps a row of the tables over seeds to its models' names; empty where no two differ in seed alone.
    ``notes`` name missing parts.
    """

    evaluation: EvaluationData
    runs: tuple[Run, ...]
    styles: dict[str, PlotStyle]
    seeds: dict[str, list[str]]
    notes: tuple[str, ...]

    @property
    def pictured(self) -> list[ModelRecord]:
        """Those that pictures show: of models that differ in seed alone, the first."""
        further = {name for names in self.seeds.values() for name in names[1:]}
        return [model for model in self.evaluation.models if model.name not in further]

    def called(self, model: str) -> str:
        """Returns a model's name in legends: its row among those over seeds, or its label."""
        labels = {model.name: model.label for model in self.evaluation.models}
        return next((label for label, names in self.seeds.items() if model in names), labels[model])

    def models_of(self, run: Run) -> list[ModelRecord]:
        """Returns the evaluated models of a run."""
        return [m for m in self.evaluation.tuned if m.path and _place(m.path, self.evaluation) == run.folder.resolve()]

    def _named(self, runs: Sequence[Run]) -> RunGroup:
        """Runs by their names; one alone as its model is called, where it has one model."""
        models = self.models_of(runs[0]) if len(runs) == 1 else []
        names = [models[0].label] if len(models) == 1 else [run.name for run in runs]
        return RunGroup(runs[0].config.method.name, "", names)

    def line(self, run: Run) -> dict[int, ModelRecord]:
        """Step -> the run's model there, of those with all that was learned."""
        found = {model.step: model for model in self.models_of(run) if model.step is not None and model.scale == 1}
        return dict(sorted(found.items()))

    def groups(self) -> list[Group]:
        """Returns the runs as they are drawn: those that differ in seed alone together, in their models' styles."""
        by_kind: dict[str, list[Run]] = {}
        for run in self.runs:
            by_kind.setdefault(run.kind, []).append(run)
        labels = name_groups([self._named(runs) for runs in by_kind.values()], self.evaluation.base.name, count=False)
        ends = [
            sorted((m for run in runs for m in self.models_of(run)), key=lambda m: (m.step or 0, m.scale))[-1:]
            for runs in by_kind.values()
        ]
        styles = [self.styles[models[0].name] if models else None for models in ends]
        spare = [style for style in STYLES if style not in self.styles.values()]
        found: list[Group] = []
        for label, runs, style in zip(labels, by_kind.values(), styles, strict=True):
            taken = [group.style for group in found]
            if style is None or style in taken:
                style = next((each for each in [*spare, *STYLES] if each not in taken), STYLES[0])
            found.append(Group(label, tuple(runs), style))
        return found


def read_inputs(targets: Sequence[str | Path]) -> ReportInputs:
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
    evaluation = join(read_evaluation(folder) for folder in folders.values())
    notes = _repeated(evaluation)
    for model in evaluation.tuned:
        if not model.path:
            continue
        place = _place(model.path, evaluation)
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
    groups = _alike(evaluation, runs)
    by_group = styles_of([evaluation.base.name, *groups], evaluation.base.name)
    if len(by_group) > len(set(by_group.values())):
        notes.append("There are more models than styles, so some share a marker: tell them apart by name.")
    styles = {evaluation.base.name: by_group[evaluation.base.name]}
    styles |= {name: by_group[label] for label, names in groups.items() for name in names}
    seeds = groups if any(len(names) > 1 for names in groups.values()) else {}
    return ReportInputs(evaluation, tuple(runs.values()), styles, seeds, tuple(dict.fromkeys(notes)))


def _alike(evaluation: EvaluationData, runs: dict[Path, Run]) -> dict[str, list[str]]:
    """Maps each label to the models that differ in seed alone, at one step and scale."""
    groups: dict[tuple[object, ...], list[ModelRecord]] = {}
    of = {m.name: runs.get(_place(m.path, evaluation)) if m.path else None for m in evaluation.tuned}
    for model in evaluation.tuned:
        run = of[model.name]
        key: tuple[object, ...] = (model.name,)
        if run is not None:
            shared = seedless(model, run.config)
            seeds = {other.config.seed for m in groups.get(shared, ()) if (other := of[m.name])}
            key = shared if run.config.seed not in seeds else key  # the same run by another name is no other seed
        groups.setdefault(key, []).append(model)
    methods = [run.config.method.name if (run := of[first.name]) else first.label for first, *_ in groups.values()]
    return name_models(list(zip(methods, groups.values(), strict=True)), evaluation.base.name)


def _place(path: str, evaluation: EvaluationData) -> Path:
    """Returns the folder of a model's run: as written, or beside the evaluation."""
    options = [Path(path), *(folder / path for folder in evaluation.folders)]
    return next((p for p in options if (p / "config.yaml").is_file()), Path(path)).resolve()


def _repeated(evaluation: EvaluationData) -> list[str]:
    found = []
    for name, prompts in evaluation.about.sets.items():
        many = len(prompts) - len(set(prompts))
        if many:
            found.append(
                f"Set {set_title(name)}: {many} of {len(prompts)} prompts are repeated; each is a case of its "
                "own, from other noise, and they are not independent."
            )
    return found


def join(found: Iterable[EvaluationData]) -> EvaluationData:
    """Evaluations of the same prompts, noise and base as one; a name that comes again gets its folder's beside it.

    Raises:
        ValueError: none are given, or two differ in what must be the same, or score the base otherwise.
    """
    found = list(found)
    if not found:
        raise ValueError("no evaluation is given, and a report needs one; run `rlvid evaluate RUN` first")
    whole = found[0]
    for other in found[1:]:
        for key in ("frames", "size", "fps", "seed", "sets", "steps", "copies", "clip", "metrics"):
            one, two = getattr(whole.about, key), getattr(other.about, key)
            if one != two:
                shown = "" if key == "sets" else f" ({one} and {two})"
                raise ValueError(
                    f"{whole.folders[0]} and {other.folders[0]} differ in {key}{shown}: models of different shapes, or "
                    "prompts, are not compared; evaluate them together: rlvid evaluate RUN RUN"
                )
        if whole.base.name != other.base.name:
            raise ValueError(
                f"{whole.folders[0]} and {other.folders[0]} have other bases, {whole.base.name} and {other.base.name}; "
                "evaluate their models together: rlvid evaluate RUN RUN"
            )
        _check_base(whole, other)
        whole = _joined(whole, other)
    return whole


def _check_base(one: EvaluationData, two: EvaluationData) -> None:
    """Raises ValueError where the same videos of the base have other scores: by another reward, or they are others."""
    for metric in one.about.metrics:
        pairs = np.array([[each.scores[each.base.name, case][metric] for each in (one, two)] for case in one.cases])
        pairs = pairs[np.isfinite(pairs).all(1)]
        if len(pairs) and np.abs(pairs[:, 0] - pairs[:, 1]).mean() > 0.1 * pairs[:, 0].std() + 1e-6:
            raise ValueError(
                f"{one.folders[0]} and {two.folders[0]} give the base's videos other scores ({metric}): by another "
                "reward, or with other guidance; evaluate their models together: rlvid evaluate RUN RUN"
            )


def _joined(one: EvaluationData, two: EvaluationData) -> EvaluationData:
    taken, names = {m.name for m in one.models}, {}
    for model in two.tuned:
        name = model.name if model.name not in taken else f"{model.name} ({two.folders[0].name})"
        while name in taken:
            name += "'"
        taken.add(name)
        names[model.name] = name
    added = [
        m.model_copy(update={} if names[m.name] == m.name else dict.fromkeys(("name", "label"), names[m.name]))
        for m in two.tuned
    ]
    return replace(
        one,
        folders=one.folders + two.folders,
        models=(*one.models, *added),
        scores=one.scores | {(names[m], case): v for (m, case), v in two.scores.items() if m in names},
        differences=one.differences
        | {(names[m], name, steps, k): d for (m, name, steps, k), d in two.differences.items() if m in names},
        videos=one.videos | {(names[m], case): v for (m, case), v in two.videos.items() if m in names},
    )
