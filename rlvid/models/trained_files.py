"""Where a checkpoint's folder holds what was trained; no torch, for readers that look at files alone."""

from pathlib import Path

TRAINED_FILES = {"lora": "adapter/adapter_model.safetensors", "full": "unet/diffusion_pytorch_model.safetensors"}
"""``model.finetune`` -> path in a checkpoint's folder."""


def holds_trained(folder: Path) -> bool:
    """Returns whether a checkpoint's folder holds what was trained."""
    return any((folder / file).is_file() for file in TRAINED_FILES.values())


def trained_file(folder: Path) -> Path:
    """Returns the file of a checkpoint's folder that holds what was trained, there or not yet."""
    files = [folder / file for file in TRAINED_FILES.values()]
    return next((file for file in files if file.is_file()), folder / TRAINED_FILES["lora"])
