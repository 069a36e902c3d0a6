"""Settings of the text-to-video model, its adapter and the chain."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlvid.config.reward_names import Precision
from rlvid.config.section import Section, Share

BUILT_IN = ("builtin", "builtin-wan")
"""The models of the built-in world, by ``model.path``."""
LOSS_SCALE: dict[str, float] = {"float32": 1.0, "bfloat16": 1.0, "float16": 2.0**14}
"""The factor of losses before a backward pass, by ``model.precision``; the results are divided by it afterwards.

Under frozen float16 weights, gradients below 6e-8 would vanish on their way; powers of two round nothing.
"""


class LoraConfig(Section):
    """The low-rank adapter that learns."""

    rank: int = Field(4, ge=1, le=1024, description="rank r of the adapter")
    alpha: float | None = Field(
        None, gt=0, description="the adapter's share is multiplied by alpha / r; null: alpha = r, a factor of 1"
    )
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="which linear layers get an adapter: ends of their names, or the sets 'attention' (those four), "
        "'attention+ff' (and the feed-forward layers) and 'temporal' (attention between frames alone, of 3D U-Nets)",
    )

    levels: tuple[Share, Share] | None = Field(
        None,
        description="noise levels at which the adapter acts, [low, high), where high = 1 includes 1: 0 is clean, 1 is "
        "noise, and a level is timestep / 1000. Elsewhere the denoiser is the base model. null: at all levels",
    )

    @property
    def scale(self) -> float:
        """The factor alpha / r of the adapter's share."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @field_validator("levels")
    @classmethod
    def _levels_are_a_range(cls, levels: tuple[float, float] | None) -> tuple[float, float] | None:
        if levels is not None and levels[0] >= levels[1]:
            raise ValueError("the first level must be smaller than the second; allowed: 0 to 1, such as [0, 0.5]")
        return levels

    @field_validator("targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ModelConfig(Section):
    """The text-to-video model."""

    path: str = Field(
        "builtin",
        description="'builtin' or 'builtin-wan' (the models of the built-in world), a folder in diffusers' layout "
        "(unet or transformer, vae, text_encoder, ...), a hub id that is in the Hugging Face cache, or random weights "
        "for dry runs: 'random' is ModelScopeT2V's structure, and 'random-wan-1.3b' Wan2.1's",
    )
    frames: int | None = Field(
        None,
        ge=2,
        description="frames F of a video, 4 n + 1 of them for Wan; default: 8 for 'builtin', 9 for 'builtin-wan' (and "
        "for copies of them), 81 or 121 for Wan, else 16",
    )
    size: int | None = Field(None, ge=8, description="height and width in pixels; default: the model's own")
    height: int | None = Field(None, ge=8, description="height in pixels, instead of size; default: the model's own")
    width: int | None = Field(None, ge=8, description="width in pixels, instead of size; default: the model's own")
    shift: float | None = Field(
        None,
        gt=0,
        description="shift of a flow model's noise levels in sampling and training: above 1 towards noise; default: "
        "the model's own",
    )
    precision: Precision = Field(
        "float32", description="precision of frozen weights and computation; trained weights are always float32"
    )
    decode_chunk: int = Field(
        64,
        ge=1,
        description="largest number of frames in the autoencoder of a 3D U-Net at once; fewer need less memory",
    )
    decode_window: int | None = Field(
        None,
        ge=1,
        description="chunks of a causal autoencoder (Wan) that the gradient of a scored frame flows through at least: "
        "fewer take less time and memory and leave out a part of it; TensorBoard shows the rest as "
        "decode/gradient_share. null: all, the exact gradient",
    )
    decode_offload: bool = Field(
        False,
        description="keep the caches of a causal autoencoder (Wan) in the CPU's memory until the backward pass: less "
        "GPU memory for each chunk, the same gradient, and slower",
    )
    decode_share: bool = Field(
        True,
        exclude_if=lambda on: on,
        description="with decode_window, measure every 25 steps how much of the gradient it keeps "
        "(decode/gradient_share); meanwhile the CPU's memory holds the caches of all chunks of a video. false: never",
    )
    decode_cache_precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        exclude_if=lambda precision: precision == "float32",
        description="precision of a causal autoencoder's caches: bfloat16 halves their memory and rounds the gradient "
        "(of builtin-wan by less than a hundredth); the frames stay the same",
    )
    finetune: Literal["lora", "full"] = Field("lora", description="trained part: an adapter, or the whole denoiser")
    lora: LoraConfig = Field(LoraConfig(), description="the adapter (finetune: lora)")

    @model_validator(mode="after")
    def _sides_are_set_once(self) -> "ModelConfig":
        for name in ("height", "width"):
            if self.size is not None and (side := getattr(self, name)) is not None:
                raise ValueError(
                    f"size = {self.size} sets both sides, and {name} = {side} one of them; leave one of the two out"
                )
        return self

    @model_validator(mode="after")
    def _adapter_is_there(self) -> "ModelConfig":
        if self.finetune == "full" and self.lora.alpha is not None:
            raise ValueError(
                f"lora.alpha = {self.lora.alpha:g}: finetune = 'full' trains no adapter; leave lora.alpha out, or set "
                "finetune=lora"
            )
        if self.finetune == "full" and self.lora.levels is not None:
            raise ValueError(
                f"lora.levels = {list(self.lora.levels)}: finetune = 'full' trains no adapter; leave lora.levels "
                "out, or set finetune=lora"
            )
        return self


class SamplingConfig(Section):
    """The chain: DDIM's, or Euler's steps for a flow model."""

    steps: int = Field(20, ge=1, le=500, description="D, steps of the whole chain")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance g; 1 is without guidance, in one branch")
    guidance_interval: tuple[Share, Share] | None = Field(
        None,
        description="noise levels at which the chains of training are guided, (low, high], as sigma / (alpha + sigma); "
        "elsewhere the conditional branch alone is computed, in steps with gradient too. Evaluation and generation are "
        "guided at all levels. null: all levels",
    )
    negative_prompt: str = Field("", description="prompt of the unconditional branch of guidance")
    eta: float | None = Field(
        None,
        ge=0,
        le=1,
        description="strength of the noise that steps add in training (DDIM's eta): 0 is deterministic, 1 ancestral; "
        "default: 1 for alignprop, ddpo, dpok and grpo, else 0. Evaluation samples with 0",
    )
    kernel: Literal["ddim", "cps", "flow-sde"] = Field(
        "ddim",
        description="the noise that eta adds: DDIM's, that of coefficient-preserving sampling (cps), or of Flow-GRPO "
        "(flow-sde, for flow models alone, with an eta below 1: 0.6 serves 10 steps and more)",
    )
    final_level: Literal["exact", "paper"] = Field(
        "exact",
        description="where the last step ends: at alpha-bar = 1, or at alpha-bar_0 as the paper's code does (not for "
        "flow models)",
    )
    prefix_steps: int | None = Field(
        None,
        ge=1,
        description="number of steps before those with gradient, evenly chosen from the chain's; null: all. For "
        "methods that back-propagate the reward, with eta = 0",
    )
    reuse: int = Field(
        1,
        ge=1,
        description="n: of the steps without gradient, the denoiser is called at the first two and at every n-th; a "
        "line through its last two outputs gives the others. 1: at all. For the methods of prefix_steps",
    )

    def negative_texts(self, guidance: float | None = None) -> list[str]:
        """Returns the negative prompt, if there is one and a branch reads it; ``guidance`` replaces the setting."""
        used = self.guidance if guidance is None else guidance
        return [self.negative_prompt] if self.negative_prompt and used != 1 else []

    @model_validator(mode="after")
    def _interval_limits_guidance(self) -> "SamplingConfig":
        interval = self.guidance_interval
        if interval is None:
            return self
        if interval[0] >= interval[1]:
            raise ValueError(
                f"guidance_interval = {list(interval)}: the first level must be smaller than the second; allowed: 0 to "
                "1, such as [0.2, 0.8]"
            )
        if self.guidance == 1:
            raise ValueError(
                f"guidance_interval = {list(interval)}: guidance = 1 is without guidance at all levels; set another "
                "guidance, such as 3, or leave guidance_interval out"
            )
        return self
