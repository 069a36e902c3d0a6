"""A model's structure without its weights: on the meta device for counting, or with random weights for dry runs."""

import gzip
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlvid.models.folders import read_config
from rlvid.models.part_settings import build

_BLOCK = 1_048_583
"""Numbers that are drawn and then repeated over the weights; prime, so that no two rows of a matrix are alike."""


class NoDraws(TorchFunctionMode):
    """Leaves out the draws of layers' first weights: on the meta device they take most of the time, for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Gives torch.nn.init's functions their tensor back, and runs every other."""
        named = kwargs or {}
        return named["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **named)


def outline(folder: Path) -> tuple[UNet3DConditionModel, AutoencoderKL, CLIPTextModel]:
    """Denoiser, autoencoder and text encoder on the meta device, float32: layers and shapes, no numbers."""
    unet = outline_part(folder, "unet", UNet3DConditionModel.from_config)
    vae = outline_part(folder, "vae", AutoencoderKL.from_config)
    return unet.eval(), vae.eval(), outline_part(folder, "text_encoder", _clip_text).eval()


def outline_part(folder: Path, part: str, make: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns a part on the meta device, made of the settings in its ``config.json``.

    Raises:
        ValueError: the settings are damaged: nothing can be made of them.
    """
    settings = read_config(folder, part)
    with NoDraws():
        return build(make, settings, folder / part / "config.json")


def _clip_text(settings: dict[str, Any]) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**settings.get("text_config", settings)))  # the file may be of a whole CLIP


def random_parts(folder: Path, dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> dict[str, Any]:
    """Returns the parts of ``UNet3DModel`` with random weights, a function of the structure and ``seed`` alone.

    Args:
        folder: configurations in diffusers' layout, such as ``rlvid.models.folders.modelscope_folder()``.
        dtype: of the weights.
        device: of the weights.
        seed: of the weights.

    Returns:
        Arguments of ``UNet3DModel`` by name; the tokenizer is CLIP's.
    """
    unet, vae, encoder = outline(folder)
    for index, part in enumerate((unet, vae, encoder)):
        fill(nn.Module.to(part, dtype).to_empty(device=device), seed + index)
        fill_constants(part)
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": encoder,
        "tokenizer": clip_tokenizer(),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"),
    }


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Draws all weights: norms are the identity, biases zero, the rest normal with torch's variance 1 / (3 fan-in).

    That includes the last convolution of every temporal layer, which diffusers starts at zero: no gradient would flow
    through it. One block of numbers is drawn and repeated, for normal draws take half a minute at full size.
    """
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))
    start = 0
    for layer in module.modules():
        norm = isinstance(layer, nn.GroupNorm | nn.LayerNorm)
        for name, weight in layer.named_parameters(recurse=False):
            if weight.dim() < 2:
                weight.fill_(float(norm and name == "weight"))
                continue
            _repeat(weight.view(-1), block.to(weight), start, (3 * math.prod(weight.shape[1:])) ** -0.5)
            start = (start + weight.numel()) % _BLOCK


def fill_constants(module: nn.Module) -> None:
    """Fills in the constants that no file holds: the positions of tokens."""
    for layer in module.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            assert name == "position_ids", f"{type(layer).__name__}.{name} is unknown"
            places = torch.arange(buffer.shape[-1], device="cpu" if buffer.is_meta else buffer.device)
            setattr(layer, name, places.expand(buffer.shape).clone())


def _repeat(flat: Tensor, block: Tensor, start: int, scale: float) -> None:
    done = 0
    while done < len(flat):
        part = block[start : start + len(flat) - done]
        torch.mul(part, scale, out=flat[done : done + len(part)])
        done, start = done + len(part), 0


@lru_cache(maxsize=1)
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer as ModelScopeT2V is published with it, from the vocabulary that open_clip carries.

    The padding token is "!" (0), as ModelScopeT2V's special_tokens_map.json has it.
    """
    from open_clip.tokenizer import default_bpe  # imports timm and torchvision, which nothing else here needs

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable + [256 + n for n in range(256 - len(printable))]]
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), start, end]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token=end,
        bos_token=start,
        eos_token=end,
        pad_token="!",
        model_max_length=77,
    )
