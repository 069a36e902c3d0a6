"""The typed description of a run: YAML plus ``key=value`` overrides, validated in one place before anything starts."""

import hashlib
import json
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from rlvid.config.guard import BUILTIN_JUDGES, GuardConfig
from rlvid.config.methods import VALUE_METHODS, AnyMethod
from rlvid.config.methods.policy_gradient import PolicyGradient
from rlvid.config.methods.reward_gradient import InstructVideoConfig
from rlvid.config.model import BUILT_IN, ModelConfig, SamplingConfig
from rlvid.config.parse import apply_override, explain, read_named
from rlvid.config.prefix import check_prefix
from rlvid.config.reward import NamedReward, RewardConfig
from rlvid.config.reward_names import absolute
from rlvid.config.section import Section
from rlvid.config.train import NOT_REAL, DataConfig, OptimizerConfig, OutputConfig, TrainConfig
from rlvid.credentials import refuse_credentials, refuse_credentials_in_arguments


class RunConfig(Section):
    """The settings of a run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="name of the run and its folder")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of every draw of the run")
    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
    method: AnyMethod = InstructVideoConfig()
    reward: RewardConfig = RewardConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    output: OutputConfig = OutputConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        train = self.train
        if train.batch_size % train.group_size:
            raise ValueError(
                f"train.group_size = {train.group_size} does not divide train.batch_size = {train.batch_size}; "
                "a prompt's samples must be in one batch"
            )
        self.method.check(self.sampling.steps, self.eta, train.batch_size, train.group_size)
        check_prefix(self.sampling, self.method, self.eta)
        self._guard_fits()
        if self.method.needs_gradient and self.reward.without_gradient:
            raise ValueError(
                f"reward.name = {self.reward.without_gradient!r} gives no gradient, which method {self.method.name!r} "
                f"needs; choose another reward, or one of {VALUE_METHODS}"
            )
        if self.model.finetune == "full" and self.method.needs_base:
            raise ValueError(
                "model.finetune = 'full' keeps no copy of the base model, which method.kl compares with; "
                "set model.finetune=lora or method.kl=0"
            )
        self._data_fits()
        share, rest = divmod(self.train.batch_size, self.train.workers)
        if rest:
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} is not a multiple of train.workers = {self.train.workers}"
                "; choose a batch that every worker gets an equal share of"
            )
        if self.train.micro_batch is not None and share % self.train.micro_batch:
            raise ValueError(
                f"train.micro_batch = {self.train.micro_batch} does not divide a worker's share of {share} videos; "
                f"allowed: divisors of {share}"
            )
        self._rollouts_fit(share)
        if self.model.frames is not None and self.reward.segments > self.model.frames:
            raise ValueError(
                f"reward.segments = {self.reward.segments} exceeds model.frames = {self.model.frames}; "
                f"allowed: 1 to {self.model.frames}"
            )
        return self

    def _rollouts_fit(self, share: int) -> None:
        size = self.train.rollout_batch
        if size is None:
            return
        if self.method.needs_gradient:
            raise ValueError(
                f"train.rollout_batch = {size} is for methods that sample what they then train on; method "
                f"{self.method.name!r} back-propagates through its samples: leave it out, and set train.micro_batch"
            )
        if share % size or size % self.micro_batch:
            allowed = [n for n in range(1, share + 1) if share % n == 0 and n % self.micro_batch == 0]
            raise ValueError(
                f"train.rollout_batch = {size} is not a multiple of train.micro_batch = {self.micro_batch} that "
                f"divides a worker's share of {share} videos; allowed: {', '.join(map(str, allowed))}"
            )

    def _data_fits(self) -> None:
        data, method = self.data, self.method
        weights, count = data.weights, len(data.sources)
        if weights is not None and isinstance(data.source, str):
            raise ValueError(
                f"data.weights = {list(weights)}: data.source = {data.source!r} is one source and no list; give a list "
                "such as data.source=[a,b], or leave data.weights out"
            )
        if weights is not None and (len(weights) != count or min(weights, default=0) <= 0):
            raise ValueError(
                f"data.weights = {list(weights)}: data.source names {count} source{'s' * (count > 1)}; give a number "
                "above 0 for each, in their order"
            )
        if data.prompts is not None and not {"prompts", "samples"} & {*data.sources}:
            raise ValueError(
                f"data.prompts = {data.prompts!r} is for data.source=prompts and data.source=samples; data.source = "
                f"{data.named!r} has captions of its own: set one of the two, or leave data.prompts out"
            )
        if "prompts" in data.sources and method.needs_clips:
            raise ValueError(
                f"data.source = {data.named!r}: prompts have no clips, and method {method.name!r} edits clips; set "
                "data.source=samples, or a method that starts from noise"
            )
        if self.reward.ceiling_quantile is not None and set(data.sources) <= {*NOT_REAL}:
            raise ValueError(
                f"reward.ceiling = {self.reward.ceiling!r} is a quantile of the rewards of real clips, and data.source "
                f"= {data.named!r} has none; set data.source to clips or videos, or reward.ceiling to a number, such "
                "as reward.ceiling=0.8"
            )

    def _guard_fits(self) -> None:
        every, often = self.guard.every, self.output.checkpoint_every
        if every % often:
            raise ValueError(
                f"guard.every = {every} is not a multiple of output.checkpoint_every = {often}, and the guard reads "
                f"checkpoints; set output.checkpoint_every={every}, or guard.every={-(-every // often) * often}"
            )
        if every and self.reward.held_out is None:
            raise ValueError(
                f"guard.every = {every} needs a reward to hold the trained one against; set reward.held_out, or "
                "guard.every=0"
            )
        for each in self.guard.rewards or ():
            if self.reward.trains_on(each.name, each.path):
                raise ValueError(
                    f"guard.rewards: {each.label!r} is the reward that is trained on, and shows no over-optimisation; "
                    "name rewards that training does not know"
                )
            if (each.name, absolute(each.path)) == (self.reward.held_out, absolute(self.reward.held_out_path)):
                raise ValueError(
                    f"guard.rewards: {each.label!r} is reward.held_out, and would count twice; leave it out here"
                )

    @property
    def guard_rewards(self) -> list[NamedReward]:
        """The guard's held-out rewards beside ``reward.held_out``."""
        if self.guard.rewards is not None:
            return self.guard.rewards
        known = {*self.reward.parts, (self.reward.held_out, self.reward.held_out_path)}
        judges = BUILTIN_JUDGES if self.model.path in BUILT_IN else ()
        return [NamedReward(name=name) for name in judges if (name, None) not in known]

    @property
    def guard_blends(self) -> bool:
        """Whether the guard interpolates all weights between the base model and a checkpoint."""
        return self.model.finetune == "full" and self.guard.scales != [1.0]

    @property
    def eta(self) -> float:
        """Strength of the noise that steps add in training."""
        return self.method.eta if self.sampling.eta is None else self.sampling.eta

    @property
    def frame_weights(self) -> Literal["paper", "normalised"]:
        """How TAR's weights add up; a sum that varies would be noise where videos are compared."""
        return self.reward.tar_normalisation or ("paper" if self.method.needs_gradient else "normalised")

    @property
    def micro_batch(self) -> int:
        """Videos in one forward pass of a worker."""
        return self.train.micro_batch or self.train.batch_size // self.train.workers

    @property
    def rollout_batch(self) -> int:
        """Videos in one forward pass of a worker that samples what it then trains on."""
        return self.train.rollout_batch or self.micro_batch

    @property
    def videos_per_start(self) -> int:
        """Neighbouring samples that start from the same noise and are scored at the same frames."""
        same = isinstance(self.method, PolicyGradient) and self.method.same_start
        return self.train.group_size if same else 1

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits over everything that the bits of the result depend on: not its place, nor its length."""
        free = {
            "model": {"decode_offload", "decode_share"}, "train": _FREE_TRAIN_KEYS, "reward": {"timeout"},
            "data": _FREE_DATA_KEYS,
        }  # fmt: skip
        kept = self.model_dump(mode="json", exclude={"output": True, "guard": True, "name": True, **free})
        for section, key in _LATER_KEYS:
            if kept[section][key] is None:
                del kept[section][key]  # runs of versions without it go on
        if self.sampling.kernel == "ddim":
            del kept["sampling"]["kernel"]
        if self.sampling.reuse == 1:
            del kept["sampling"]["reuse"]
        for key in ("levels", "alpha"):
            if getattr(self.model.lora, key) is None:
                del kept["model"]["lora"][key]
        if not self.sampling.negative_prompt:
            del kept["sampling"]["negative_prompt"]
        if self.reward.pessimism == 0:
            del kept["reward"]["pessimism"]
        for part in kept["reward"]["mixture"]:
            part.pop("measured", None)
        for key in self.method.added:
            if getattr(self.method, key) == type(self.method).model_fields[key].default:
                del kept["method"][key]
        if self.videos_per_start > 1:
            kept["method"]["frames"] = "shared"  # earlier versions drew them for each video
        if remote := kept["reward"].get("remote"):
            kept["reward"]["remote"] = {"whole_video": remote["whole_video"]}  # the rest says where, not what
        if self.data.encoder_gpus:
            kept["data"]["encodes"] = "GPU"  # to other bits than a CPU
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


_LATER_KEYS = (
    ("data", "weights"), ("train", "rollout_batch"), ("reward", "remote"), ("reward", "ceiling"), ("model", "height"),
    ("model", "width"), ("model", "shift"), ("model", "decode_window"), ("sampling", "guidance_interval"),
    ("sampling", "prefix_steps"),
)  # fmt: skip

_FREE_TRAIN_KEYS = {"steps", "max_seconds", "max_failures", "grace_period", "cpus_per_worker", "use_gpu", "resume"}

_FREE_DATA_KEYS = {"encoders", "encoder_gpus", "cache"}

_FORMER_KEYS = {
    "model.train": "is now model.finetune",
    "reward.weights": "is now reward.tar_normalisation",
    "sampling.final": "is now sampling.final_level",
    "data.clips": "is now data.count",
    "guard.copies": "is now guard.videos_per_prompt",
    "output.video_prompts": "is gone: leave it out",
    "train.max_skipped": "is gone: leave it out",
    "guard.cpus": "is gone: leave it out; the guard takes the CPU time that the workers leave",
    "reward.differentiable": "is gone: leave it out; set the attribute `differentiable` of your function",
}
"""Keys of earlier versions, and the way out."""


def shipped_configs() -> dict[str, Path]:
    """Returns the paths of the run descriptions inside the package, by name."""
    folder = Path(str(resources.files("rlvid"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> RunConfig:
    """Reads a run description.

    Args:
        source: name of a shipped description, path of a YAML file, or what ``read_description`` read.
        overrides: ``section.key=value`` strings, values in YAML; later ones win.

    Raises:
        ValueError: in one line: the file or key, the value, what is allowed.
    """
    data = deepcopy(source) if isinstance(source, dict) else read_description(source)
    refuse_credentials_in_arguments(overrides or [])
    for override in overrides or []:
        apply_override(data, override, "section.key=value, such as train.steps=100")
    return parse_config(data)


def read_description(source: str | Path) -> dict[str, Any]:
    """The sections of a description, as they are written: see ``load_config``."""
    sections = "sections (model, sampling, method, ...)"
    return read_named("config", str(source), shipped_configs(), sections)[1]


def parse_config(data: dict[str, Any]) -> RunConfig:
    """Validates a mapping; raises ValueError with one line that names every wrong key."""
    refuse_credentials(data, "")
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError("; ".join(explain(each, RunConfig, _FORMER_KEYS) for each in error.errors())) from None
