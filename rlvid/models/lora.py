"""Low-rank adapters in PEFT's layout, on every attention of a denoiser."""

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_PREFIX = "base_model.model."
"""What PEFT's own wrapper puts before a parameter's name in the files it writes and reads."""


def check_targets(denoiser: nn.Module, targets: list[str]) -> None:
    """Raises ValueError when a target is the name of no linear layer."""
    linears = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise ValueError(
                f"model.lora.targets: no linear layer of the denoiser is called {target!r}; the attentions have "
                "to_q, to_k, to_v and to_out.0"
            )


def inject_lora(denoiser: nn.Module, rank: int, targets: list[str], seed: int) -> list[nn.Parameter]:
    """Freezes ``denoiser`` and adds adapters of scale 1 to the named linear layers, in place.

    A ~ N(0, 1 / r) and B = 0, as InstructVideo has it; A depends on ``seed`` alone.

    Returns:
        The trainable parameters, float32, in the module's order.

    Raises:
        ValueError: no layer has such a name.
    """
    check_targets(denoiser, targets)
    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
    inject_adapter_in_model(config, denoiser)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in denoiser.named_parameters():
        if "lora_" not in name:
            continue
        parameter.data = parameter.data.float()
        if "lora_A" in name and parameter.device.type != "meta":
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)
    return lora_parameters(denoiser)


def lora_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters, in the module's order."""
    return [p for name, p in denoiser.named_parameters() if "lora_" in name]


def lora_scale(denoiser: nn.Module, scale: float) -> None:
    """Multiplies what the adapter adds: 0 is the base model, 1 the fine-tuned one."""
    for module in denoiser.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                module.scaling[name] = scale * module.lora_alpha[name] / module.r[name]


def lora_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU."""
    return {name: t.detach().cpu().contiguous() for name, t in get_peft_model_state_dict(denoiser).items()}


def save_lora(state: dict[str, Tensor], rank: int, targets: list[str], folder: Path) -> None:
    """Writes ``adapter_model.safetensors`` and ``adapter_config.json``, which PEFT loads as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({_PREFIX + name: tensor for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian").save_pretrained(
        str(folder)
    )


def load_lora(denoiser: nn.Module, folder: Path) -> None:
    """Loads a saved adapter into a denoiser that has one of the same shape.

    Raises:
        ValueError: the folder holds no adapter, or one of another layout; the first few names are given.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} holds no adapter (adapter_model.safetensors)")
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    expected = lora_state(denoiser)
    foreign, missing = sorted(state.keys() - expected.keys()), sorted(expected.keys() - state.keys())
    wrong = [n for n in sorted(state.keys() & expected.keys()) if state[n].shape != expected[n].shape]
    if foreign or missing or wrong:
        raise ValueError(
            f"{path} does not fit the model: foreign keys {foreign[:3]}, missing keys {missing[:3]}, "
            f"other shapes {wrong[:3]}"
        )
    set_peft_model_state_dict(denoiser, state)
