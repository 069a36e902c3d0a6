"""Settings of the text-to-video model, its adapter and the DDIM chain."""

from typing import Any, Literal

from pydantic import Field, field_validator

from rlvid.config.reward import Precision
from rlvid.config.section import Section


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
    size: int | None = Field(None, ge=8, description="height and width in pixels; default: the model's own")
    precision: Precision = Field(
        "float32", description="precision of frozen weights and computation; trained weights are always float32"
    )
    decode_chunk: int = Field(
        64, ge=1, description="largest number of frames in the autoencoder at once; fewer need less memory"
    )
    finetune: Literal["lora", "full"] = Field("lora", description="trained part: an adapter, or the whole denoiser")
    lora: LoraConfig = Field(LoraConfig(), description="the adapter (finetune: lora)")


class SamplingConfig(Section):
    """The DDIM chain."""

    steps: int = Field(20, ge=1, le=500, description="D, steps of the whole DDIM chain")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance g; 1 is without guidance, in one branch")
    eta: float | None = Field(
        None,
        ge=0,
        le=1,
        description="DDIM's eta in training: 0 is deterministic, 1 ancestral; default: 1 for alignprop, ddpo, dpok and "
        "grpo, else 0. Evaluation samples with 0",
    )
    final_level: Literal["exact", "paper"] = Field(
        "exact", description="where the last step ends: at alpha-bar = 1, or at alpha-bar_0 as the paper's code does"
    )
