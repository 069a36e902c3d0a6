"""The models of an evaluation: the base, runs, their checkpoints, and scales of the learned change.

[LABEL=]RUN[@STEP|@best|@all][*SCALE]       toy    toy@40    toy@all    toy*0.5    half=toy@best*0.5
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rlvid import __version__
from rlvid.config import RunConfig, shipped_configs
from rlvid.config.model import BUILT_IN, ModelConfig
from rlvid.credentials import refuse_credentials
from rlvid.evaluate.load import TunedModel, load_base, load_found, scale_name
from rlvid.models.base import VideoModel
from rlvid.models.folders import movable
from rlvid.models.load import check_model, resolved_shift
from rlvid.models.text_rows import TextEmbedder
from rlvid.models.trained import check_trained, load_trained
from rlvid.models.video_shape import VideoShape, resolved_shape
from rlvid.runs.checkpoints import CheckpointRef, flaw
from rlvid.runs.find import check_whole, choose, find_checkpoints_of, run_folder_of
from rlvid.runs.guard_log import best_step, find_best
from rlvid.storage import is_uri

FORM = "[LABEL=]RUN[@STEP|@best|@all][*SCALE]"
BASE = "base"
_SUFFIX = re.compile(r"(?P<run>.+?)(@(?P<which>\d+|best|all))?(\*(?P<scale>[^*@/]*))?")
_LABEL = re.compile(r"(?P<label>[^=/@*?:]+)=(?P<rest>.+)")


@dataclass(frozen=True)
class Spec:
    """A MODEL argument: ``which`` is a step, ``best``, ``all`` or, for the latest checkpoint, None."""

    text: str
    label: str | None
    run: str
    which: str | None
    scale: float | None


def parse_spec(text: str) -> Spec:
    """Parses a MODEL; the name of an existing run may itself hold ``=``, ``@`` or ``*``.

    Raises:
        ValueError: it is empty, or has no number where the scale should be.
    """
    refuse_credentials(text, "MODEL")
    if not text.strip():
        raise ValueError(f"MODEL is empty; expected {FORM}")
    if not is_uri(text) and run_folder_of(text):
        return Spec(text, None, text, None, None)
    labelled = _LABEL.fullmatch(text)
    found = _SUFFIX.fullmatch(labelled["rest"] if labelled else text)
    assert found is not None  # for the text is not empty
    scale = None
    if found["scale"] is not None:
        scale = _scale(found["scale"], text)
    return Spec(text, labelled["label"].strip() if labelled else None, found["run"], found["which"], scale)


def _scale(written: str, text: str) -> float:
    try:
        scale = float(written)
    except ValueError:
        scale = 0.0
    if not 0 < scale <= 4:
        raise ValueError(
            f"MODEL {text!r}: expected a number above 0 and at most 4 after *, such as 0.5; the base model (0) is "
            "always there"
        )
    return scale


@dataclass(frozen=True)
class EvaluatedModel:
    """One model of an evaluation.

    Attributes:
        name: what tables and rows call it; no two have the same.
        kind: ``base``, ``run`` (its latest checkpoint) or ``checkpoint`` (one that was asked for).
        config: of the run, with paths that hold on every node; for the base, of the first run.
        checkpoint: for the base, the first run's; None for a base model without a run.
        scale: how much of what was learned it has; 0 for the base.
        step: of the checkpoint; None for the base.
    """

    name: str
    kind: Literal["base", "run", "checkpoint"]
    config: RunConfig
    checkpoint: CheckpointRef | None
    scale: float
    step: int | None

    @property
    def label(self) -> str:
        """As pages call it."""
        return self.name

    @property
    def run(self) -> Path:
        """The run's folder; of a base model without a run, the one of its evaluation."""
        return self.checkpoint.folder.parent if self.checkpoint else Path("runs").resolve() / f"{self.config.name}-base"

    @property
    def path(self) -> str:
        """The run's folder, or the base model."""
        return self.config.model.path if self.kind == "base" else str(self.run)

    @cached_property
    def shape(self) -> VideoShape:
        """The shape of its videos."""
        return resolved_shape(self.config.model)

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """All that its weights depend on, but for the name and the place of things."""
        spec = self.config.model
        made: dict[str, Any] = {"base": stamp(spec.path), "precision": spec.precision, "train": spec.finetune}
        made["shape"] = [self.shape.frames, *self.shape.sides.values()]
        if negative := self.config.sampling.negative_prompt:
            made["negative_prompt"] = negative
        if spec.shift is not None:
            made["shift"] = spec.shift
        if self.scale and self.checkpoint:
            made["tuned"] = (self.checkpoint.folder / "state.json").read_text(encoding="utf-8")
            made["scale"] = self.scale * spec.lora.scale
        return made

    def describe(self) -> dict[str, Any]:
        """Returns the model's entry in ``evaluation.yaml``."""
        about = {"name": self.name, "label": self.label, "kind": self.kind, "path": self.path}
        return about | {"step": self.step, "scale": self.scale}


def find_models(
    texts: Sequence[str], *, scales: Sequence[float] = (1.0,), step: int | None = None
) -> tuple[EvaluatedModel, ...]:
    """Returns the base model of the first run, and then the models that the texts name.

    Args:
        texts: a MODEL each.
        scales: a model each, for every MODEL without a scale of its own.
        step: of the checkpoint, for every MODEL that names none.

    Raises:
        ValueError: no such run or checkpoint; two models of one name; base models, or their samplers, that differ.
    """
    specs = [parse_spec(text) for text in texts]
    if not specs:
        raise ValueError(f"no MODEL; name at least one: {FORM}; or, for a base model alone, --base CONFIG")
    alone, models = len({spec.run for spec in specs}) == 1, list[EvaluatedModel]()
    for spec in specs:
        config, found = _located(spec)
        config = _movable(config)
        for checkpoint in _chosen(spec, found, step):
            at = f"@{checkpoint.step if spec.which == 'all' else spec.which}" if spec.which else ""
            if spec.label is None:
                name = (config.method.name if alone else config.name) + at
            else:
                name = spec.label + (at if spec.which == "all" else "")
            kind: Literal["run", "checkpoint"] = "checkpoint" if spec.which or step is not None else "run"
            checkpoint = CheckpointRef(checkpoint.folder.resolve(), checkpoint.step)
            each_scale = scales if spec.scale is None else (spec.scale,)
            for scale in each_scale:
                # a label says all, unless it is to name several
                shown = name if spec.label and len(each_scale) == 1 else scale_name(name, scale)
                models.append(EvaluatedModel(shown, kind, config, checkpoint, scale, checkpoint.step))
    first = models[0]
    models = [EvaluatedModel(BASE, "base", first.config, first.checkpoint, 0.0, None), *models]
    _check(models)
    return tuple(models)


def base_alone(config: RunConfig) -> tuple[EvaluatedModel, ...]:
    """Returns the base model of a description that no run needs to have."""
    return (EvaluatedModel(BASE, "base", _movable(config), None, 0.0, None),)


def _movable(config: RunConfig) -> RunConfig:
    """Returns the settings with paths that hold on every node."""
    model = config.model.model_copy(update={"path": movable(config.model.path)})
    return config.model_copy(update={"model": model, "reward": config.reward.resolved()})


def check_weights(models: Sequence[EvaluatedModel]) -> None:
    """Checks the base model and every checkpoint before anything is loaded.

    Raises:
        ValueError: a file of them is missing, damaged or of another model.
    """
    check_model(models[0].config.model.path)
    for folder, model in {each.checkpoint.folder: each for each in models if each.checkpoint}.items():
        check_trained(model.config.model, folder)


def _located(spec: Spec) -> tuple[RunConfig, list[CheckpointRef]]:
    try:
        return find_checkpoints_of(spec.run)
    except ValueError as error:
        raise ValueError(f"{error}{_hint(spec.run)}") from None


def _hint(run: str) -> str:
    """Returns what may have been meant by a name that no run has."""
    path = Path(run)
    if run_folder_of(run) is not None:
        return ""
    if run in BUILT_IN:
        return f"; for this base model alone: rlvid evaluate --base toy name={run} model.path={run}"
    if run in shipped_configs() or (path.suffix in (".yaml", ".yml") and path.is_file()):
        return f"; for the base model of this config alone: rlvid evaluate --base {shlex.quote(run)}"
    return f"; after @ comes a step, best or all: {FORM}" if "@" in run and not is_uri(run) else ""


def _chosen(spec: Spec, found: list[CheckpointRef], step: int | None) -> list[CheckpointRef]:
    if spec.which == "all":
        for each in found:
            check_whole(each)
        return found
    run = found[0].folder.parent
    if spec.which == "best":
        best = find_best(run)
        if best is None:
            raise ValueError(f"{spec.text!r}: the best checkpoint of run {run} {_why_no_best(run)}")
        check_whole(best)
        return [best]
    return [choose(found, int(spec.which) if spec.which else step)]


def _why_no_best(run: Path) -> str:
    step = best_step(run)
    if step is None:
        return "was never sought; guard.every=N has the guard look for it"
    if step == 0:
        return "is the base model"
    return f"is damaged ({flaw(run / 'best', resumable=False)}); name another step, as in {run.name}@STEP"


def _check(models: list[EvaluatedModel]) -> None:
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        why = "that is what the base model is called" if twice == BASE else "give each a label: LABEL=RUN"
        raise ValueError(f"two models are called {twice!r}; {why}")
    shapes = [_shape(model) for model in models]
    for model, shape in zip(models, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"{model.name!r} cannot stand beside {models[1].name!r}: its base is {shape}, the other's {shapes[0]}; "
                "evaluate runs of one base model, of one number of frames and size, together"
            )
    samplers = [_sampler(model, models[0].config.sampling.guidance) for model in models]
    for model, sampler in zip(models, samplers, strict=True):
        for key, value in sampler.items():
            if value != samplers[0][key]:
                raise ValueError(
                    f"{model.name!r} cannot stand beside {models[1].name!r}: its {key} is {value!r}, the other's "
                    f"{samplers[0][key]!r}, and the base would be sampled with the other's alone; evaluate runs of one "
                    f"{key} together"
                )


def _shape(model: EvaluatedModel) -> str:
    return f"{model.config.model.path!r} with {model.shape.frames} frames of {model.shape.pixels} pixels"


def _sampler(model: EvaluatedModel, guidance: float) -> dict[str, Any]:
    """Returns the settings, by key, that videos are sampled with as each run has them; the rest is the first run's."""
    return {
        "model.shift": resolved_shift(model.config.model),
        "sampling.negative_prompt": "".join(model.config.sampling.negative_texts(guidance)),
    }


def stamp(path: str) -> Any:
    """Returns a stamp that changes with a file or folder: names, sizes and times of its files, but not its path."""
    place = Path(path)
    if path in BUILT_IN or not place.exists():
        return [path, __version__]
    files = sorted(each for each in place.rglob("*") if each.is_file()) if place.is_dir() else [place]
    states = [(each.relative_to(place).as_posix(), each.stat()) for each in files]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


class Loader:
    """Loads one model at a time; reuses the parts that it shares with the model before.

    Args:
        texts: embeds the prompts of models of each ``model.precision``; default: their own text encoders.
    """

    def __init__(self, texts: Mapping[str, TextEmbedder | bool] | None = None) -> None:
        self._texts = texts or {}
        self._tuned: TunedModel | None = None
        self._alone: VideoModel | None = None
        self._now: EvaluatedModel | None = None

    def use(self, model: EvaluatedModel) -> VideoModel:
        """Returns the model, in place of the one before.

        Raises:
            ValueError: its checkpoint is no longer the one that was planned with, or does not fit the model.
        """
        if model.checkpoint is None:  # the only model of its evaluation
            if self._alone is None:
                self._alone = load_base(model.config, self._texts.get(model.config.model.precision, True))
            return self._alone
        if model != self._now:
            self._now = None  # until all of this has succeeded
            if self._tuned is None or _base(self._tuned.config) != _base(model.config):
                self._tuned = None  # before the next is loaded: there may be no room for two
                text = self._texts.get(model.config.model.precision, True)
                self._tuned = load_found(model.config, model.checkpoint, text)
            elif self._tuned.checkpoint != model.checkpoint:
                load_trained(self._tuned.model.denoiser, model.config.model, model.checkpoint.folder)
                self._tuned = replace(self._tuned, checkpoint=model.checkpoint)
            self._tuned.use(model.scale)
            folder = model.checkpoint.folder  # best/ is another one where training went on and found a better one
            if model.scale and (folder / "state.json").read_text(encoding="utf-8") != model.made_of["tuned"]:
                raise ValueError(f"{folder} has changed since this evaluation began; start the same command again")
            self._now = model
        assert self._tuned is not None
        return self._tuned.model


def _base(config: RunConfig) -> tuple[ModelConfig, str]:
    return config.model, config.sampling.negative_prompt
