"""ModelScopeT2V and its kin: ``UNet3DConditionModel`` with a per-frame autoencoder and a CLIP text encoder.

The built-in model is of the same classes and loads through the same lines.
"""

import json
from importlib import resources
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from rlvid.models.base import Posterior, Prediction, VideoModel

_PARTS = (
    "unet/config.json", "unet/*.safetensors", "vae/config.json", "vae/*.safetensors",
    "text_encoder/config.json", "text_encoder/*.safetensors",
    "tokenizer/tokenizer_config.json", "tokenizer/*[br].json", "scheduler/scheduler_config.json",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UNet3DModel(VideoModel):
    """A text-to-video model made of diffusers' parts.

    Args:
        unet: predicts the noise of latents (B, C, F, h, w).
        vae: encodes and decodes frames one by one.
        text_encoder: its last hidden state conditions the denoiser.
        tokenizer: pads to its ``model_max_length``.
        scheduler: gives the cumulative alphas; must be one of noise prediction.
        frames: F.
        size: height and width in pixels.
        fps: frames a second.
        decode_chunk: most frames that go through the decoder at once; bounds its memory.
    """

    def __init__(
        self,
        unet: UNet3DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        *,
        frames: int,
        size: int,
        fps: int = 8,
        decode_chunk: int = 64,
    ) -> None:
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"scheduler: prediction_type {scheduler.config.prediction_type!r} is not supported; allowed: 'epsilon'"
            )
        self.denoiser: nn.Module = unet
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        for part in (unet, vae, text_encoder):
            part.eval().requires_grad_(False)
        self.abar = scheduler.alphas_cumprod.float()
        self.frames, self.fps, self.decode_chunk = frames, fps, decode_chunk
        self._factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size = size
        self._channels = unet.config.in_channels
        self._negative_1LD: Tensor | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, h, w)."""
        side = self.size // self._factor
        return self._channels, self.frames, side, side

    @property
    def device(self) -> torch.device:
        """Where the autoencoder's weights are."""
        return self.vae.device

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """text_BLD of prompts, cut to the tokenizer's length."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return self.text_encoder(tokens.to(self.device)).last_hidden_state

    @torch.no_grad()
    def encode_frames(self, frames_BFCHW: Tensor) -> Posterior:
        """Posterior of each frame by itself, scaled by the autoencoder's ``scaling_factor``."""
        batch = len(frames_BFCHW)
        pixels = frames_BFCHW.flatten(0, 1).to(self.vae.device, self.vae.dtype) * 2 - 1
        parts = [self.vae.encode(chunk).latent_dist for chunk in pixels.split(self.decode_chunk)]
        scale = self.vae.config.scaling_factor

        def gather(values: list[Tensor]) -> Tensor:
            joined = torch.cat(values)
            joined = joined.to(torch.promote_types(torch.float32, joined.dtype)) * scale
            return joined.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()

        return Posterior(gather([p.mean for p in parts]), gather([p.std for p in parts]))

    def decode_frames(self, latents_BCFhw: Tensor, frames_BS: Tensor) -> Tensor:
        """frames_BSCHW of the chosen frames; the other latents are never decoded."""
        rows_B1 = torch.arange(len(latents_BCFhw), device=latents_BCFhw.device)[:, None]
        chosen_BSChw = latents_BCFhw.transpose(1, 2)[rows_B1, frames_BS.to(latents_BCFhw.device)]
        latents_Nchw = (chosen_BSChw.flatten(0, 1) / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels = torch.cat([self.vae.decode(chunk).sample for chunk in latents_Nchw.split(self.decode_chunk)])
        pixels = pixels.to(torch.promote_types(torch.float32, pixels.dtype))
        return (pixels / 2 + 0.5).unflatten(0, tuple(frames_BS.shape))

    def predict(
        self,
        latents_BCFhw: Tensor,
        timestep: int | Tensor,
        text_BLD: Tensor,
        guidance: float,
        *,
        unconditional_gradient: bool = True,
    ) -> Prediction:
        """Guided noise and clean latents, float32; see ``VideoModel.predict``."""
        batch = len(latents_BCFhw)
        timestep_B = torch.as_tensor(timestep, device=latents_BCFhw.device).expand(batch)
        if guidance == 1.0:
            eps = self._eps(latents_BCFhw, timestep_B, text_BLD)
        else:
            negative_BLD = self._negative(text_BLD)
            if unconditional_gradient:
                both = self._eps(
                    latents_BCFhw.repeat(2, 1, 1, 1, 1), timestep_B.repeat(2), torch.cat([negative_BLD, text_BLD])
                )
                uncond, cond = both.chunk(2)
            else:
                with torch.no_grad():
                    uncond = self._eps(latents_BCFhw, timestep_B, negative_BLD)
                cond = self._eps(latents_BCFhw, timestep_B, text_BLD)
            eps = uncond + guidance * (cond - uncond)
        latents_BCFhw = latents_BCFhw.to(eps.dtype)
        abar = self.abar_at(timestep_B, latents_BCFhw)
        return Prediction((latents_BCFhw - (1 - abar).sqrt() * eps) / abar.sqrt(), eps)

    def _eps(self, latents_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
        dtype = self.vae.dtype
        return self.denoiser(
            latents_BCFhw.to(dtype), timestep_B, encoder_hidden_states=text_BLD.to(dtype), return_dict=False
        )[0].to(torch.promote_types(torch.float32, dtype))

    def _negative(self, text_BLD: Tensor) -> Tensor:
        if self._negative_1LD is None:
            self._negative_1LD = self.encode_prompts([""])
        return self._negative_1LD.expand(len(text_BLD), -1, -1).to(text_BLD)


def builtin_folder() -> Path:
    """Folder of the built-in model inside the package."""
    return Path(str(resources.files("rlvid"))) / "toy" / "weights" / "model"


def model_folder(path: str) -> Path:
    """The folder of ``model.path``, checked to be whole and of the right class.

    Raises:
        ValueError: the folder or one of its parts is missing, or it holds another class of model.
    """
    folder = builtin_folder() if path == "builtin" else Path(path)
    missing = [file for file in _PARTS if not any(folder.glob(file))]
    if missing:
        raise ValueError(
            f"model.path = {path!r}: {folder} lacks {', '.join(missing)}; expected 'builtin' or a folder in diffusers' "
            f"layout with unet, vae, text_encoder, tokenizer and scheduler"
        )
    name = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if name != "UNet3DConditionModel":
        raise ValueError(f"model.path = {path!r}: its denoiser is a {name}; supported: UNet3DConditionModel")
    return folder


def resolved_shape(path: str, frames: int | None = None, size: int | None = None) -> tuple[int, int]:
    """Frames F and size in pixels that ``load_model`` gives, from the configurations alone: no weights are read.

    Raises:
        ValueError: as ``model_folder``, or a size that the autoencoder cannot halve often enough.
    """
    folder = model_folder(path)
    levels = len(json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))["block_out_channels"])
    factor = 2 ** (levels - 1)
    size = size or json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"] * factor
    if size % factor:
        raise ValueError(f"model.size = {size} is not a multiple of {factor}, which the autoencoder needs")
    return frames or (8 if path == "builtin" else 16), size


def denoiser_outline(path: str) -> UNet3DConditionModel:
    """The denoiser without weights, on the meta device: its layers and shapes, in a second or two at full size.

    Raises:
        ValueError: as ``model_folder``.
    """
    config = UNet3DConditionModel.load_config(model_folder(path) / "unet", local_files_only=True)
    with torch.device("meta"):
        return UNet3DConditionModel.from_config(config)


def load_model(
    path: str,
    *,
    frames: int | None = None,
    size: int | None = None,
    precision: str = "float32",
    device: str | torch.device = "cpu",
) -> UNet3DModel:
    """Loads a model from a folder in diffusers' layout, safetensors only; ``builtin`` is the one in the package.

    Raises:
        ValueError: the folder or one of its parts is missing or damaged, or it holds another class of model.
    """
    folder = model_folder(path)
    frames, size = resolved_shape(path, frames, size)
    options = {"torch_dtype": DTYPES[precision], "use_safetensors": True, "local_files_only": True}
    try:
        vae = AutoencoderKL.from_pretrained(folder / "vae", **options).to(device)
        unet = UNet3DConditionModel.from_pretrained(folder / "unet", **options).to(device)
        encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", dtype=DTYPES[precision], use_safetensors=True, local_files_only=True
        ).to(device)
    except SafetensorError as error:
        raise ValueError(
            f"model.path = {path!r}: weights under {folder} are damaged ({error}); copy them anew"
        ) from None
    return UNet3DModel(
        unet,
        vae,
        encoder,
        CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        DDIMScheduler.from_pretrained(folder / "scheduler"),
        frames=frames,
        size=size,
    )
