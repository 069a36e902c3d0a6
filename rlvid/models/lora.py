"""Low-rank adapters in PEFT's layout, on every attention of a denoiser or on other linear layers.

PEFT takes seconds to import, so only the functions that need it do. A check of targets does not.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlvid.models.weights import check_finite, check_fit, headers, read_weights

ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""The prefix of parameters' names in PEFT's files."""

_ATTENTION = r"to_q|to_k|to_v|to_out\.0"
TARGET_SETS = {
    "attention": rf".*\.({_ATTENTION})",
    "attention+ff": rf".*\.({_ATTENTION}|ffn?\.net\.0\.proj|ffn?\.net\.2)",
    "temporal": rf"(.*\.)?(temp_attentions|transformer_in)\..*\.({_ATTENTION})",
}
"""Named sets of targets, as patterns of whole names: 264, 330 and 136 linear layers of ModelScopeT2V.

Of Wan2.1 1.3B the first two name 240 and 300; its attention is over space and time at once.
"""

IN_ALL = frozenset({"to_q", "to_k", "to_v", "to_out.0", *TARGET_SETS})
"""Targets that the built-in model has, as every ``UNet3DConditionModel`` has."""


def _pattern(target: str) -> str:
    return TARGET_SETS.get(target) or rf"(.*\.)?{re.escape(target)}"


def peft_targets(targets: list[str]) -> list[str] | str:
    """Returns the targets for PEFT: ends of names, or one pattern if a named set is among them."""
    if not TARGET_SETS.keys() & set(targets):
        return targets
    return "|".join(_pattern(target) for target in targets)


def check_targets(denoiser: nn.Module, targets: list[str]) -> None:
    """Raises ValueError when a target is the name of no linear layer, and of no set."""
    linears = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if any(re.fullmatch(_pattern(target), name) for name in linears):
            continue
        if target == "temporal":
            raise ValueError(
                "model.lora.targets: 'temporal' is for 3D U-Nets, whose attention between frames is by itself; this "
                "denoiser attends over space and time at once: use 'attention'"
            )
        raise ValueError(
            f"model.lora.targets: no linear layer of the denoiser is called {target!r}; the attentions have "
            f"to_q, to_k, to_v and to_out.0, and there are the sets {', '.join(TARGET_SETS)}"
        )


def _config(rank: int, targets: list[str], scale: float = 1.0) -> dict[str, Any]:
    """Returns settings of PEFT's ``LoraConfig`` that every version knows, because older ones refuse unknown ones."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": rank if scale == 1 else scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": peft_targets(targets),
        "init_lora_weights": "gaussian",
    }


def inject_lora(
    denoiser: nn.Module, rank: int, targets: list[str], seed: int, scale: float = 1.0
) -> list[nn.Parameter]:
    """Freezes ``denoiser`` and adds adapters to the named linear layers, in place; their share is multiplied by scale.

    A ~ N(0, 1 / r) and B = 0, as InstructVideo has it; A depends on ``seed`` alone.

    Returns:
        The trainable parameters, float32, in the module's order.

    Raises:
        ValueError: no layer has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_targets(denoiser, targets)
    denoiser.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**_config(rank, targets, scale)), denoiser)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in denoiser.named_parameters():
        if "lora_" not in name:
            continue
        parameter.data = parameter.data.float()
        if "lora_A" in name and parameter.device.type != "meta":
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)
    return lora_parameters(denoiser)


def lora_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """Returns the adapter's parameters, in the module's order."""
    return [p for name, p in denoiser.named_parameters() if "lora_" in name]


def lora_scale(denoiser: nn.Module, scale: float) -> None:
    """Multiplies what the adapter adds: 0 is the base model, 1 the fine-tuned one."""
    from peft.tuners.lora import LoraLayer

    for module in denoiser.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                module.scaling[name] = scale * module.lora_alpha[name] / module.r[name]


def lora_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter's tensors under PEFT's names, on the CPU."""
    from peft.utils import get_peft_model_state_dict

    return {name: t.detach().cpu().contiguous() for name, t in get_peft_model_state_dict(denoiser).items()}


def save_lora(state: dict[str, Tensor], rank: int, targets: list[str], folder: Path, scale: float = 1.0) -> None:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``, which PEFT loads as they are.

    ``scale`` is PEFT's alpha / r: what it multiplies the adapter's share with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({_PREFIX + name: tensor for name, tensor in state.items()}, folder / ADAPTER_FILE)
    settings = json.dumps(_config(rank, targets, scale), indent=2)
    (folder / "adapter_config.json").write_text(settings + "\n", encoding="utf-8")


def _adapter_file(folder: Path) -> Path:
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no adapter ({ADAPTER_FILE})")
    return path


def read_lora(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors that ``save_lora`` wrote.

    Raises:
        ValueError: the folder holds no adapter, or its file is damaged or holds numbers that are not finite.
    """
    path = _adapter_file(folder)
    state = read_weights(path, str(folder))
    check_finite(state, str(path))
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def check_lora(denoiser: nn.Module, folder: Path) -> None:
    """Checks that a saved adapter fits a denoiser with an adapter, also on the meta device; reads no numbers.

    Raises:
        ValueError: as ``load_lora``, but for numbers that are not finite.
    """
    from peft.utils import get_peft_model_state_dict

    state = headers(_adapter_file(folder), str(folder))
    own = {_PREFIX + name: tensor for name, tensor in get_peft_model_state_dict(denoiser).items()}
    check_fit(own, state, str(folder / ADAPTER_FILE))


def load_lora(denoiser: nn.Module, folder: Path) -> None:
    """Loads a saved adapter into a denoiser that has one of the same shape.

    Raises:
        ValueError: the folder holds no adapter, or one of another layout; the first few names are given.
    """
    from peft.utils import set_peft_model_state_dict

    state = read_lora(folder)
    check_fit(lora_state(denoiser), state, str(folder / ADAPTER_FILE))
    set_peft_model_state_dict(denoiser, state)


@torch.no_grad()
def merge_lora(denoiser: nn.Module, state: dict[str, Tensor], scale: float = 1.0) -> None:
    """Adds an adapter to the weights of a denoiser that has none: W + scale B A, rounded once to W's precision.

    Raises:
        ValueError: the adapter is of another model: a layer or a shape is missing.
    """
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    odd = [key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    odd += [key for key in state if ".lora_B." in key and key.replace(".lora_B.", ".lora_A.") not in state]
    if odd:
        raise ValueError(f"the adapter does not fit the model: {len(odd)} keys are foreign ({', '.join(odd[:3])})")
    for key, down_rI in state.items():
        if ".lora_A." not in key:
            continue
        name, up_Or = key.partition(".lora_A.")[0], state.get(key.replace(".lora_A.", ".lora_B."))
        layer = layers.get(name)
        if layer is None or up_Or is None or layer.weight.shape != (len(up_Or), down_rI.shape[1]):
            raise ValueError(f"the adapter does not fit the model: there is no linear layer {name} of its shape")
        weight = layer.weight.to(torch.promote_types(torch.float32, layer.weight.dtype))
        added_OI = up_Or.to(weight) @ down_rI.to(weight)
        layer.weight.copy_(weight + scale * added_OI)
