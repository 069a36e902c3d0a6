"""The description of a sweep: YAML plus ``key=value`` overrides, validated before anything starts."""

import math
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, model_validator

from rlvid.config import RunConfig, load_config, read_description
from rlvid.config.reward_names import absolute
from rlvid.config.section import Section
from rlvid.config.train import MADE
from rlvid.data.prompts import has_prompts, resolve_prompts
from rlvid.metric_names import REWARD_PREFIX
from rlvid.models.folders import movable
from rlvid.storage import place_of
from rlvid.world.captions import PROMPT_SETS
from tuning.judges import GAIN, check_objectives, check_trial
from tuning.space import MAX_TRIALS, VARIANT, Dimension, draw, grid, parse_space, shown, size

COST = "seconds"
"""The objective that is not a metric of videos: seconds of training steps."""
METRICS = (
    "reward", "held_out", "clipsim", "consistency", "consistency_all_pairs", "consistency_vbench", "motion",
    "flickering",
)  # fmt: skip
"""Metrics of videos that may be objectives (``rlvid.evaluate.metrics``), beside ``reward_NAME`` of the base's guard;
more is better in each. The oracle of the built-in world is none of them: nothing may be chosen by it. Tables show it
all the same."""

_RESERVED = {
    "name": "each trial has a name of its own",
    "output.storage": "set storage=... of the sweep",
    "train.steps": "set rungs=[...] of the sweep",
    "train.max_seconds": "set rungs=[...] and unit=seconds of the sweep",
}
_ENDLESS = 100_000
"""Steps of a trial that ends by its seconds."""


class Evaluation(Section):
    """The fixed measurement: the same prompts from the same noise for every trial, with equal weights of all frames."""

    prompts: str = Field("in_domain", description="a built-in set, or a file, also one beside the sweep's")
    videos: int = Field(12, ge=2, le=240, description="number of prompts")
    copies: int = Field(1, ge=1, le=16, description="videos of each prompt; from 2 on, diversity is measured")
    steps: int | None = Field(None, ge=1, le=500, description="sampling steps D; default: sampling.steps of the base")
    seed: int = Field(0, ge=0, description="of the noise")
    scales: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [], description="scales of the learned change at which trials are measured too, for the table over seeds"
    )


class Sweep(Section):
    """The settings of a sweep."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,94}$",  # the best run is called NAME-best
        description="of the sweep and of its folder in storage",
    )
    storage: str = Field("runs", description="folder that holds sweeps; on a cluster, one that all nodes share")
    config: str = Field("toy", description="the base: a shipped run description or a YAML file")
    settings: dict[str, Any] = Field({}, description="settings of every trial, by their dotted keys")
    space: dict[str, Any] = Field({}, description="what varies, by dotted keys; forms: tuning/space.py")
    first: list[dict[str, Any]] = Field([], description="settings that are tried first (random, optuna)")
    algorithm: Literal["random", "grid", "optuna"] = Field("random", description="search algorithm")
    scheduler: Literal["asha", "none"] = Field("asha", description="scheduler that stops trials early")
    trials: int | None = Field(None, ge=1, le=MAX_TRIALS, description="how many; a grid has its own number")
    concurrent: int = Field(1, ge=1, description="trials at a time")
    seed: int = Field(0, ge=0, description="seed of the drawn settings; a trial's own seed is its setting `seed`")
    rungs: list[int] = Field(description="budgets after which a trial is measured; the last one ends it")
    unit: Literal["steps", "seconds", "videos", "tflops"] = Field(
        "steps",
        description="what rungs count: training steps, seconds of them, videos that the reward scores, or TFLOPs as "
        "`rlvid plan` counts them",
    )
    reduction: float = Field(3.0, gt=1, description="ASHA continues the best 1 / reduction of the trials of a rung")
    metric: str = Field("held_out", description="objective of ASHA, Optuna and the best config")
    objectives: list[str] = Field(
        ["reward", "held_out", "consistency", "motion", COST], min_length=1, description="of the Pareto table"
    )
    evaluation: Evaluation = Evaluation()
    _counted: dict[str, float] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> "Sweep":
        if "://" in self.storage:
            raise ValueError(f"storage = {self.storage!r}: must be a folder, such as one that all nodes mount")
        rungs = self.rungs
        if not rungs or rungs[0] < 1 or any(b <= a for a, b in pairwise(rungs)):
            raise ValueError(f"rungs = {rungs}; expected ascending whole numbers from 1, such as [4, 12]")
        for one in [*self.objectives, self.metric]:
            if one not in (*METRICS, GAIN, COST) and not one.startswith(REWARD_PREFIX):
                raise ValueError(
                    f"objective {one!r} is none; allowed: {', '.join((*METRICS, GAIN, COST))}, and "
                    f"{REWARD_PREFIX}NAME for a reward of the base's guard"
                )
        if self.metric == COST or self.metric not in self.objectives:
            raise ValueError(f"metric = {self.metric!r}; allowed: one of objectives, and not {COST}")
        if self.trials is None and self.algorithm != "grid":
            raise ValueError(f"trials is missing; algorithm = {self.algorithm!r} needs to know how many")
        if self.first and self.algorithm == "grid":
            raise ValueError("first is for random and optuna; a grid tries everything")
        own = [key for each in self.variants.values() for key in each]
        for key in [*self.settings, *self.space, *own]:
            if key in _RESERVED:
                raise ValueError(f"{key} belongs to the sweep: {_RESERVED[key]}")
        if both := sorted({*self.settings, *own} & self.space.keys()):
            raise ValueError(f"{both[0]} is in space, and in settings or a variant too; leave it out of one")
        for settings in self.first:
            if settings.keys() != self.space.keys():
                raise ValueError(f"first: {settings} must name each key of space once ({', '.join(self.space)})")
        if self.evaluation.prompts not in PROMPT_SETS and not has_prompts(Path(self.evaluation.prompts).expanduser()):
            raise ValueError(
                f"evaluation.prompts = {self.evaluation.prompts!r} is neither a file nor one of "
                f"{', '.join(PROMPT_SETS)}"
            )
        return self

    @cached_property
    def prompts(self) -> list[str]:
        """What all trials are measured by.

        Raises:
            ValueError: the set or file has fewer than ``evaluation.videos``, or cannot be read.
        """
        spec, count = self.evaluation.prompts, self.evaluation.videos
        try:
            return resolve_prompts(spec if spec in PROMPT_SETS else str(Path(spec).expanduser()), count)
        except ValueError as error:
            raise ValueError(f"evaluation.prompts with evaluation.videos = {count}: {error}") from None

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Settings of each variant of the space, by its label."""
        given = self.space.get(VARIANT)
        named = given if isinstance(given, dict) else {}
        return {str(label): each for label, each in named.items() if isinstance(each, dict)}

    @cached_property
    def originals(self) -> dict[str, dict[str, Any]]:
        """The descriptions that trials start from, read once: an edit of a file meanwhile changes no trial."""
        named = [self.config, *(str(each["config"]) for each in self.variants.values() if "config" in each)]
        return {name: read_description(name) for name in dict.fromkeys(named)}

    def original(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Returns the description that these settings change: the variant's, or else the sweep's."""
        return self.originals[str(self._variant(settings).get("config", self.config))]

    def _variant(self, settings: dict[str, Any]) -> dict[str, Any]:
        return self.variants[settings[VARIANT]] if VARIANT in settings else {}

    @property
    def folder(self) -> Path:
        """Absolute path of the sweep's folder."""
        return Path(self.storage).expanduser().resolve() / self.name

    @property
    def dimensions(self) -> list[Dimension]:
        """What varies."""
        return parse_space(self.space)

    def base(self) -> RunConfig:
        """The run that trials vary, with absolute paths; its reward and sampling measure all trials."""
        made = self.run({}, "base", self.rungs[-1])
        prompts = made.data.prompts
        sources = tuple(source if source in MADE else place_of(source) for source in made.data.sources)
        data = made.data.model_copy(
            update={
                "source": sources if len(sources) > 1 else sources[0],
                "prompts": prompts if prompts in PROMPT_SETS else absolute(prompts),
            }
        )
        model = made.model.model_copy(update={"path": movable(made.model.path)})
        parts = {"reward": made.reward.resolved(), "guard": made.guard.resolved(), "model": model, "data": data}
        return made.model_copy(update=parts)

    def run(self, settings: dict[str, Any], name: str, rung: int) -> RunConfig:
        """Returns the description of a run with these settings, in the sweep's folder and as long as a rung.

        Its paths are as they are written, so that a trial goes on where the sweep is started from another copy of its
        working folder. A guard only warns: a trial that it ended would never reach its rung.

        Raises:
            ValueError: they are not those of a run; names them.
        """
        place = [f"name={name}", f"output.storage={yaml_text(str(self.folder))}"]
        made = self._load(settings, [*place, "guard.stop=false"])
        return made.model_copy(update={"train": made.train.model_copy(update=self.budget(made, rung))})

    @property
    def unit_name(self) -> str:
        """``unit`` as people write it."""
        return "TFLOPs" if self.unit == "tflops" else self.unit

    def budget(self, run: RunConfig, rung: int) -> dict[str, Any]:
        """Returns the keys of ``train`` with which a run ends at a rung.

        Raises:
            ValueError: ``unit`` is ``tflops``, and the rung does not pay for one step.
        """
        if self.unit == "seconds":
            return {"steps": _ENDLESS, "max_seconds": float(rung)}
        if self.unit == "tflops":
            step = self._tflops(run)
            if step > rung:
                raise ValueError(
                    f"rungs = {self.rungs}: a step takes {step:.3g} TFLOPs; allowed: from {math.ceil(step)} on"
                )
        else:
            step = run.train.batch_size * getattr(run.method, "repeats", 1) if self.unit == "videos" else 1
        return {"steps": max(1, int(rung // step)), "max_seconds": None}

    def budgets(self, run: RunConfig) -> list[dict[str, Any]]:
        """Returns the budget of each rung.

        Raises:
            ValueError: two rungs end at the same step, or see ``budget``.
        """
        made = [self.budget(run, rung) for rung in self.rungs]
        for rungs, (one, other) in zip(pairwise(self.rungs), pairwise(made), strict=True):
            if one == other:
                raise ValueError(
                    f"rungs = {self.rungs}: after {rungs[0]} and after {rungs[1]} {self.unit_name}, {run.method.name} "
                    f"with batches of {run.train.batch_size} is at step {one['steps']}; leave one of the two out, in a "
                    "sweep that has begun under another name=..."
                )
        return made

    def _tflops(self, run: RunConfig) -> float:
        """Returns the TFLOPs of a training step, counted once for runs whose steps cost the same."""
        from rlvid.plan.plan import flops_of_step

        train = run.train.model_copy(update={"steps": 1, "max_seconds": None})
        free = {name: type(getattr(run, name))() for name in ("optimizer", "output", "guard")}
        key = run.model_copy(update={"name": "", "seed": 0, "train": train, **free})
        dumped = key.model_dump_json()
        if dumped not in self._counted:
            self._counted[dumped] = flops_of_step(key) / 1e12
        return self._counted[dumped]

    def to_train(self, settings: dict[str, Any], name: str) -> RunConfig:
        """Returns the same for `rlvid train`: of the base's own length, and in the storage of the sweep."""
        original = load_config(self.original(settings))
        budget = f"train.max_seconds={'null' if original.train.max_seconds is None else original.train.max_seconds}"
        place = [f"name={name}", f"output.storage={yaml_text(self.storage)}", f"train.steps={original.train.steps}"]
        outputs = {f"output.{key}": getattr(original.output, key) for key in ("videos_every", "archive_every")}
        kept = [f"{key}={value}" for key, value in outputs.items() if key not in self.settings]
        return self._load(settings, [*place, budget, *kept])

    def _load(self, settings: dict[str, Any], fixed: list[str]) -> RunConfig:
        """Returns the run with these settings, without videos and archive unless they are among ``fixed``."""
        variant = {key: value for key, value in self._variant(settings).items() if key != "config"}
        given = self.settings | variant | {key: value for key, value in settings.items() if key != VARIANT}
        method = given.pop("method.name", given.pop("method", None))
        original, first = self.original(settings), ["output.videos_every=0", "output.archive_every=0"]
        try:
            if method is not None and method != load_config(original).method.name:
                first.append(f"method={yaml_text(method)}")  # has keys of its own: the original's section goes
            return load_config(original, [*first, *(f"{k}={yaml_text(v)}" for k, v in given.items()), *fixed])
        except ValueError as error:
            raise ValueError(f"{f'space: a trial with {shown(settings)}: ' if settings else ''}{error}") from None

    def planned(self) -> list[dict[str, Any]]:
        """Returns the settings of all trials, each of them a valid run, as are ``probes``.

        Optuna's are not known but for ``first``.

        Raises:
            ValueError: a key is unknown, a value is not allowed, or the space is empty or does not fit ``trials``.
        """
        dimensions, trials = self.dimensions, self.trials or 0
        base = self.base()
        if base.reward.floor_is_open:
            raise ValueError(
                "reward.mixture: floor = 'base': one reward scores all trials of a sweep, and each run would measure a "
                "floor of its own; give a number such as floor=0.03"
            )
        check_objectives(self.objectives, base)
        if self.algorithm == "grid":
            made = grid(dimensions, self.trials)
        else:
            drawn = trials if self.algorithm == "random" else min(len(self.first), trials)
            made = draw(dimensions, self.first, drawn, self.seed)
        for settings in [*made, *self.probes]:
            run = self.run(settings, "trial", self.rungs[0])
            self.budgets(run)
            check_trial(self.objectives, base, run)
        return made

    @property
    def probes(self) -> list[dict[str, Any]]:
        """One setting each: all that can be looked at before Optuna proposes whole trials."""
        if self.algorithm != "optuna":
            return []
        return [{dimension.key: value} for dimension in self.dimensions for value in dimension.probes]

    @property
    def count(self) -> int:
        """How many trials there are in all."""
        return (size(self.dimensions) or 0) if self.algorithm == "grid" else (self.trials or 0)


def yaml_text(value: Any) -> str:
    """Returns a value as YAML, in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
