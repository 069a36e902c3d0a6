"""Where a checkpoint's folder holds what was trained; no torch, for readers that look at files alone."""

from pathlib import Path

TRAINED_FILES = {"lora": "adapter/adapter_model.safetensors", "full": "unet/diffusion_pytorch_model.safetensors"}
"""``model.finetune`` -> path in a checkpoint's folder, of a 3D U-Net."""
WHOLE_FILES = {"unet": TRAINED_FILES["full"], "transformer": "transformer/diffusion_pytorch_model.safetensors"}
"""Folder of the denoiser in a model's folder -> path of a whole denoiser in a checkpoint's folder."""
_FILES = (TRAINED_FILES["lora"], *WHOLE_FILES.values())


def holds_trained(folder: Path) -> bool:
    """Returns whether a checkpoint's folder holds what was trained."""
    return any((folder / file).is_file() for file in _FILES)


def trained_file(folder: Path) -> Path:
    """Returns the file of a checkpoint's folder that holds what was trained, there or not yet."""
    files = [folder / file for file in _FILES]
    return next((file for file in files if file.is_file()), folder / TRAINED_FILES["lora"])
