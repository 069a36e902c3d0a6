"""Settings of the guard, which detects over-optimisation: the trained reward rises while the held-out reward falls."""

from pydantic import Field, field_validator

from rlvid.config.section import Section


class GuardConfig(Section):
    """The guard's fixed prompts and noise; it scores checkpoints beside training and has no influence on the result."""

    every: int = Field(
        0, ge=0, description="steps between evaluations, a multiple of output.checkpoint_every; 0: none (docs/guard.md)"
    )
    prompts: str | None = Field(
        None, description="a built-in set or a file of prompts; default: the first captions of the run's own clips"
    )
    count: int = Field(16, ge=4, le=1000, description="number of prompts, over which noise is estimated")
    videos_per_prompt: int = Field(2, ge=1, le=16, description="videos per prompt; diversity needs two")
    steps: int | None = Field(None, ge=1, le=500, description="DDIM steps of a video; default: sampling.steps")
    stop: bool = Field(False, description="end training when it over-optimises or collapses; else only warn")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs reserved for the guard; a part of one (such as 0.3) is shared with a worker; default: one "
        "when the workers have GPUs, else none",
    )

    @field_validator("gpus")
    @classmethod
    def _one_worker_a_gpu(cls, value: float | None) -> float | None:
        if value is not None and value >= 0.5 and value != int(value):
            raise ValueError("must be a whole number, or below 0.5: else two workers could share a GPU")
        return value
