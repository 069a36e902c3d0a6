"""Where a checkpoint's folder holds what was trained; no torch, for readers that look at files alone."""

from pathlib import Path

ADAPTER_FILE = "adapter/adapter_model.safetensors"
"""Path of an adapter in a checkpoint's folder."""
WHOLE_FILES = {folder: f"{folder}/diffusion_pytorch_model.safetensors" for folder in ("unet", "transformer")}
"""Folder of the denoiser in a model's folder -> path of a whole denoiser in a checkpoint's folder."""
_FILES = (ADAPTER_FILE, *WHOLE_FILES.values())


def holds_trained(folder: Path) -> bool:
    """Returns whether a checkpoint's folder holds what was trained."""
    return any((folder / file).is_file() for file in _FILES)


def trained_file(folder: Path) -> Path:
    """Returns the file of a checkpoint's folder that holds what was trained, there or not yet."""
    files = [folder / file for file in _FILES]
    return next((file for file in files if file.is_file()), folder / ADAPTER_FILE)
