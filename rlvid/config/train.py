"""Settings of the data, the optimiser, the steps and workers, and the output."""

from typing import Any, Literal

from pydantic import Field, field_validator

from rlvid.config.section import Decay, Section

MADE = ("builtin", "prompts", "samples")
"""Sources that a run makes itself and keeps in its storage; any other is a folder."""
NOT_REAL = ("prompts", "samples")
"""Sources without real clips: prompts alone, and the base model's own samples."""

SHOWN_VIDEOS = 6
"""Videos of fixed prompts in TensorBoard, over all workers."""
FLOOR_VIDEOS = 8
"""Videos of the base model whose motion is the floor of a motion part with ``floor: base``."""


class DataConfig(Section):
    """The source of clips and prompts."""

    source: str | tuple[str, ...] = Field(
        "builtin",
        description="'builtin' (rendered clips), 'prompts' (no clips, for methods that start from noise), 'samples' "
        "(the base model's own clips of the prompts, made once), a folder of encoded clips made by `rlvid encode` "
        "(also s3://BUCKET/FOLDER or gs://BUCKET/FOLDER), or a folder or manifest of videos, which are encoded on the "
        "way; or a list of these, which are mixed",
    )
    weights: tuple[float, ...] | None = Field(
        None,
        description="shares of a list of sources in what is drawn, such as [3, 1]; default: every clip equally often",
    )
    encoders: int = Field(1, ge=1, description="processes that encode videos on the way to training")
    encoder_gpus: float = Field(
        0, ge=0, lt=1, description="part of a worker's GPU that each of them takes; 0 encodes on the CPU"
    )
    cache: bool = Field(True, description="keep what was encoded on the way, for later epochs, starts and runs")
    count: int = Field(
        512,
        ge=1,
        description="number of clips to render or to sample, or of prompts to draw from a built-in set; a folder "
        "and a file of prompts have their own number",
    )
    prompts: str | None = Field(
        None,
        description="for the sources 'prompts' and 'samples': a file of prompts (samples use it round and round), or "
        "'in_domain', 'new_shapes' or 'scenes'; default: in_domain",
    )

    @field_validator("source", mode="before")
    @classmethod
    def _is_named(cls, value: Any) -> Any:
        names = value if isinstance(value, list | tuple) else [value]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError("must be the name of a source, or a list of names")
        if len({*names}) < len(names):
            raise ValueError("names a source twice; name it once, and set data.weights")
        return value

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that are mixed; often it is one."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def named(self) -> str:
        """The sources as a setting shows them."""
        return self.source if isinstance(self.source, str) else f"[{', '.join(self.source)}]"


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(1e-5, gt=0, description="learning rate after warm-up")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's two decay rates")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    warmup: int = Field(10, ge=0, description="steps of linear warm-up")
    clip_norm: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 does not clip")


class TrainConfig(Section):
    """Steps, workers, and restarts after failures."""

    steps: int = Field(20_000, ge=1, description="batches; most methods take one optimiser step on each")
    max_seconds: float | None = Field(
        None, gt=0, description="seconds of steps, without checkpoints and videos; training ends at the nearest step"
    )
    batch_size: int = Field(8, ge=1, description="videos in a step, over all workers")
    group_size: int = Field(1, ge=1, description="videos of one prompt, neighbours in a batch")
    micro_batch: int | None = Field(
        None, ge=1, description="videos in one forward pass of a worker; default: its share"
    )
    rollout_batch: int | None = Field(
        None,
        ge=1,
        description="videos in one forward pass while a method samples what it then trains on (ddpo, dpok, grpo, rwr, "
        "raft): as many as memory holds; default: micro_batch",
    )
    checkpoint_activations: bool = Field(
        True, description="recompute the denoiser and the decoder in the backward pass to save memory"
    )
    workers: int = Field(1, ge=1, description="Ray Train workers")
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores reserved for a worker")
    use_gpu: bool | None = Field(None, description="one GPU a worker; default: when the cluster has enough of them")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    max_failures: int = Field(2, ge=0, description="number of restarts of lost workers")
    grace_period: float = Field(
        20,
        ge=0,
        description="seconds that workers have after an interruption, to finish the step and save a checkpoint; many "
        "schedulers kill a job after 30",
    )
    resume: Literal["all", "weights"] = Field(
        "all",
        description="part of a checkpoint to restore: 'all', or 'weights' to continue without the optimiser's state if "
        "it is of another number of workers (ZeRO 1 to 3) or another ZeRO stage",
    )


class OutputConfig(Section):
    """Checkpoints, logs and samples."""

    storage: str = Field(
        "runs",
        description="folder that holds run folders; on a cluster, one that all nodes share, or s3://BUCKET/FOLDER or "
        "gs://BUCKET/FOLDER",
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="number of latest checkpoints that are kept")
    videos_every: int = Field(25, ge=0, description="steps between videos of fixed prompts in TensorBoard; 0: never")
    archive_every: int = Field(1, ge=0, description="steps between archived training samples; 0: none")
    archive_format: Literal["png", "webp"] = Field(
        "png", description="format of archived frames, both without loss: webp files are smaller, png more widely read"
    )
    archive_part_mb: float = Field(
        128,
        ge=0,
        le=4096,
        description="size of the archive's files once all kept checkpoints are newer; 0 leaves them as written",
    )

    @field_validator("storage")
    @classmethod
    def _is_known(cls, value: str) -> str:
        scheme, there, place = value.partition("://")
        if there and (scheme not in ("s3", "gs", "file") or not place.strip("/")):
            raise ValueError(
                "must be a folder, such as one that all nodes mount, or s3://BUCKET/... or gs://BUCKET/..."
            )
        return value.rstrip("/") or value
