"""The typed description of a run: YAML plus ``key=value`` overrides, validated in one place before anything starts."""

import hashlib
import json
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from rlvid.config.guard import GuardConfig
from rlvid.config.methods import AnyMethod, InstructVideoConfig
from rlvid.config.parse import explain, read_named, split_override
from rlvid.config.reward import Precision, RewardConfig
from rlvid.config.section import Decay, Section
from rlvid.credentials import refuse_credentials, refuse_credentials_in_arguments


class LoraConfig(Section):
    """The low-rank adapter that learns."""

    rank: int = Field(4, ge=1, le=1024, description="rank r of the adapter; its scale alpha / r is 1")
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="which linear layers get an adapter: ends of their names, or the sets 'attention' (those four), "
        "'attention+ff' (and the feed-forward layers) and 'temporal' (attention between frames alone)",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ModelConfig(Section):
    """The text-to-video model."""

    path: str = Field(
        "builtin",
        description="'builtin', a folder in diffusers' layout (unet, vae, text_encoder, ...), a hub id that is in the "
        "Hugging Face cache, or 'random': ModelScopeT2V's structure with random weights, for dry runs",
    )
    frames: int | None = Field(
        None, ge=2, description="frames F of a video; default: 8 for the built-in model, else 16"
    )
    size: int | None = Field(None, ge=8, description="height and width in pixels; default: what the model was made for")
    precision: Precision = Field(
        "float32", description="of the frozen weights and of the computation; what is trained is always kept in float32"
    )
    decode_chunk: int = Field(
        64, ge=1, description="most frames that go through the autoencoder at once; fewer need less memory"
    )
    finetune: Literal["lora", "full"] = Field("lora", description="what learns: an adapter, or the whole denoiser")
    lora: LoraConfig = Field(LoraConfig(), description="the adapter (finetune: lora)")


class SamplingConfig(Section):
    """The DDIM chain."""

    steps: int = Field(20, ge=1, le=500, description="D, steps of the whole DDIM chain")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance g; 1 is without guidance, in one branch")
    eta: float | None = Field(
        None,
        ge=0,
        le=1,
        description="DDIM's eta in training: 0 is deterministic, 1 ancestral; default: 1 for alignprop, ddpo and dpok, "
        "else 0. Evaluation samples with 0",
    )
    final_level: Literal["exact", "paper"] = Field(
        "exact", description="where the last step ends: at alpha-bar = 1, or at alpha-bar_0 as the paper's code does"
    )


class DataConfig(Section):
    """Where clips and prompts come from."""

    source: str = Field(
        "builtin",
        description="'builtin' (rendered clips), 'samples' (the base model's own, made once), or a folder of encoded "
        "clips made by `rlvid encode`",
    )
    count: int = Field(512, ge=1, description="how many clips to render or to sample; a folder has its own number")
    prompts: str | None = Field(
        None,
        description="what to sample (samples only): a file of prompts, used round and round, or 'in_domain', "
        "'new_shapes' or 'scenes'; default: in_domain",
    )


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(1e-5, gt=0, description="learning rate after warm-up")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's two decay rates")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    warmup: int = Field(10, ge=0, description="steps of linear warm-up")
    clip_norm: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 does not clip")


class TrainConfig(Section):
    """Steps, workers and what happens on failures."""

    steps: int = Field(20_000, ge=1, description="batches; most methods take one optimiser step on each")
    max_seconds: float | None = Field(
        None, gt=0, description="seconds of steps, without checkpoints and videos; training ends at the nearest step"
    )
    batch_size: int = Field(8, ge=1, description="videos in a step, over all workers")
    group_size: int = Field(1, ge=1, description="videos of one prompt that stand together in a batch")
    micro_batch: int | None = Field(
        None, ge=1, description="videos in one forward pass of a worker; default: its share"
    )
    checkpoint_activations: bool = Field(
        True, description="recompute the denoiser and the decoder in the backward pass to save memory"
    )
    workers: int = Field(1, ge=1, description="Ray Train workers")
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores reserved for a worker")
    use_gpu: bool | None = Field(None, description="one GPU a worker; default: when the cluster has enough of them")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    max_failures: int = Field(2, ge=0, description="times that lost workers are started again")
    resume: Literal["all", "weights"] = Field(
        "all",
        description="what a resumed run must find: 'all', or 'weights' to go on without the optimiser's state where "
        "that is of another number of workers (ZeRO 1 to 3) or another ZeRO stage",
    )


class OutputConfig(Section):
    """Checkpoints, logs and samples."""

    storage: str = Field(
        "runs",
        description="folder that holds run folders; on a cluster, one that all nodes share, or s3://BUCKET/FOLDER or "
        "gs://BUCKET/FOLDER",
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="how many of the latest checkpoints stay")
    videos_every: int = Field(25, ge=0, description="steps between videos of fixed prompts in TensorBoard; 0: never")
    archive_every: int = Field(1, ge=0, description="steps between archived training samples; 0: none")

    @field_validator("storage")
    @classmethod
    def _is_known(cls, value: str) -> str:
        scheme, there, place = value.partition("://")
        if there and (scheme not in ("s3", "gs", "file") or not place.strip("/")):
            raise ValueError(
                "must be a folder, such as one that all nodes mount, or s3://BUCKET/... or gs://BUCKET/..."
            )
        return value.rstrip("/") or value


class RunConfig(Section):
    """One run, whole."""

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
        self._guard_fits()
        if self.method.needs_gradient and self.reward.without_gradient:
            raise ValueError(
                f"reward.name = {self.reward.without_gradient!r} gives no gradient, which method {self.method.name!r} "
                "needs; choose another reward, or one of ddpo, dpok, rwr, raft"
            )
        if self.model.finetune == "full" and self.method.needs_base:
            raise ValueError(
                "model.finetune = 'full' keeps no copy of the base model, which "
                f"{'method.kl' if self.method.needs_gradient else f'method {self.method.name!r}'} compares with; "
                f"set model.finetune=lora{' or method.kl=0' if self.method.needs_gradient else ''}"
            )
        if self.data.prompts is not None and self.data.source != "samples":
            raise ValueError(
                f"data.prompts = {self.data.prompts!r} is for data.source=samples; data.source = {self.data.source!r} "
                "has captions of its own: set data.source=samples or leave data.prompts out"
            )
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
        if self.model.frames is not None and self.reward.segments > self.model.frames:
            raise ValueError(
                f"reward.segments = {self.reward.segments} exceeds model.frames = {self.model.frames}; "
                f"allowed: 1 to {self.model.frames}"
            )
        return self

    def _guard_fits(self) -> None:
        every, often = self.guard.every, self.output.checkpoint_every
        if every % often:
            raise ValueError(
                f"guard.every = {every} is not a multiple of output.checkpoint_every = {often}, and the guard looks at "
                f"checkpoints; set output.checkpoint_every={every}, or guard.every={-(-every // often) * often}"
            )
        if every and self.reward.held_out is None:
            raise ValueError(
                f"guard.every = {every} needs a reward to hold the trained one against; set reward.held_out, or "
                "guard.every=0"
            )

    @property
    def eta(self) -> float:
        """DDIM's eta in training."""
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
    def fingerprint(self) -> str:
        """Twelve hex digits over everything that the bits of the result depend on: not its place, nor its length."""
        kept = self.model_dump(
            mode="json",
            exclude={"output": True, "guard": True, "name": True, "train": _FREE_TRAIN_KEYS, "reward": {"timeout"}},
        )
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


_FREE_TRAIN_KEYS = {"steps", "max_seconds", "max_failures", "cpus_per_worker", "use_gpu", "resume"}

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
    """Run descriptions inside the package, by name."""
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
        _override(data, override)
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


def _override(data: dict[str, Any], text: str) -> None:
    key, value = split_override(text, "section.key=value, such as train.steps=100")
    *parents, last = key.split(".")
    here = data
    for parent in parents:
        inner = here.get(parent, {})
        if not isinstance(inner, dict | str | None):
            raise ValueError(f"override {text!r}: {parent} is a value and has no keys of its own")
        here[parent] = {"name": inner} if isinstance(inner, str) else dict(inner or {})
        here = here[parent]
    here[last] = value
