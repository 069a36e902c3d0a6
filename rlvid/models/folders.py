"""The folders of a model's parts: in the package, in diffusers' layout, or in the local Hugging Face cache.

Nothing is downloaded: an error names missing files, and the command that downloads them.
"""

import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rlvid.models.weights import check_texts, read_json

RANDOM = "random"
"""The ``model.path`` of ModelScopeT2V's structure with random weights."""
MODELSCOPE = ("ali-vilab/text-to-video-ms-1.7b", "damo-vilab/text-to-video-ms-1.7b")
"""Hub ids of ModelScopeT2V: its present one and the one it had before."""
NETWORKS = ("unet", "vae", "text_encoder")
"""Folders of the parts that have weights."""

_CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
_PARTS = (
    "unet/config.json", "unet/*.safetensors", "vae/config.json", "vae/*.safetensors",
    "text_encoder/config.json", "text_encoder/*.safetensors",
    "tokenizer/tokenizer_config.json", "tokenizer/*[br].json", "scheduler/scheduler_config.json",
)  # fmt: skip
_FOLDERS = (*NETWORKS, "tokenizer", "scheduler")
_CLASSES = {"unet": ("denoiser", "UNet3DConditionModel"), "vae": ("autoencoder", "AutoencoderKL")}
_ENCODERS = ("clip_text_model", "clip")
_EXPECTED = (
    f"expected 'builtin', '{RANDOM}', a hub id such as '{MODELSCOPE[0]}', or a folder in diffusers' layout with unet, "
    "vae, text_encoder, tokenizer and scheduler"
)


def builtin_folder() -> Path:
    """Returns the folder of the built-in model inside the package."""
    return Path(str(resources.files("rlvid"))) / "toy" / "weights" / "model"


def modelscope_folder() -> Path:
    """Returns the folder of ModelScopeT2V's published configuration inside the package; it has no weights."""
    return Path(str(resources.files("rlvid"))) / "models" / "modelscope"


def fetch_command(hub_id: str) -> str:
    """Returns the shell command that downloads a model's safetensors and configurations into the Hugging Face cache."""
    return f'hf download {shlex.quote(hub_id)} --include "*.json" --include "*.txt" --include "*model.safetensors"'


def model_folder(path: str) -> Path:
    """Returns the folder of ``model.path``, after a check of its parts and classes; without weights for ``random``.

    Raises:
        ValueError: the folder or one of its parts is missing, or it holds another class of model.
    """
    if path == RANDOM:
        return modelscope_folder()
    folder = _found(path)
    if folder is None:
        raise ValueError(
            f"model.path = {path!r} is neither a folder nor in the Hugging Face cache; fetch it (7 GB) with: "
            f"{fetch_command(path)}"
        )
    missing = [file for file in _PARTS if not any(folder.glob(file)) and not any(folder.glob(_pickle(file)))]
    if missing:
        raise ValueError(f"model.path = {path!r}: {folder} lacks {', '.join(missing)}; {_remedy(path)}")
    for part in _FOLDERS:
        check_texts(folder / part, f"model.path = {path!r}: {part}")
    _check_classes(path, folder)
    return folder


def structure_folder(path: str) -> Path:
    """Returns a folder whose configurations describe the model of ``model.path``, be its weights here or not.

    ModelScopeT2V that is not in the Hugging Face cache is described by the configuration inside the package.

    Raises:
        ValueError: configurations are missing, or of another class of model.
    """
    folder = modelscope_folder() if path == RANDOM else _found(path)
    if folder is None or (path in MODELSCOPE and not (folder / _CONFIGS[0]).is_file()):
        return modelscope_folder() if path in MODELSCOPE else model_folder(path)
    missing = [file for file in _CONFIGS if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"model.path = {path!r}: {folder} lacks {', '.join(missing)}; {_remedy(path)}")
    _check_classes(path, folder)
    return folder


def resolved_shape(path: str, frames: int | None = None, size: int | None = None) -> tuple[int, int]:
    """Returns the frames F and size in pixels of ``load_model``'s model, from its configurations; reads no weights.

    Raises:
        ValueError: as ``structure_folder``, or a size that the autoencoder cannot halve often enough.
    """
    folder = structure_folder(path)
    factor = 2 ** (len(read_config(folder, "vae")["block_out_channels"]) - 1)
    size = size or read_config(folder, "unet")["sample_size"] * factor
    if size % factor:
        raise ValueError(f"model.size = {size} is not a multiple of {factor}, which the autoencoder needs")
    return frames or (8 if path == "builtin" else 16), size


def movable(path: str) -> str:
    """``model.path`` as a process in another working folder understands it."""
    return str(Path(path).resolve()) if path not in ("builtin", RANDOM) and Path(path).exists() else path


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """Returns the content of a part's ``config.json``; raises ValueError when it is damaged."""
    return read_json(folder / part / "config.json", part)


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not path.startswith(".")


def _found(path: str) -> Path | None:
    """Returns the folder of a path; None for a hub id of which the cache holds nothing."""
    if path == "builtin":
        return builtin_folder()
    if Path(path).exists() or not _is_hub_id(path):
        return Path(path)
    ids = (path, *(MODELSCOPE if path in MODELSCOPE else ()))
    found = next(filter(None, (cached_folder(hub_id, "unet/config.json") for hub_id in ids)), None)
    return found and found.parent


def cached_folder(hub_id: str, file: str) -> Path | None:
    """Returns the folder of a repository's file in the local cache; None if it is not there, or for no hub id."""
    found = try_to_load_from_cache(hub_id, file) if _is_hub_id(hub_id) else None
    return Path(found).parent if isinstance(found, str) else None


def _pickle(file: str) -> str:
    return file.replace(".safetensors", ".bin")


def _remedy(path: str) -> str:
    if _is_hub_id(path) and not Path(path).exists():
        return f"fetch the rest with: {fetch_command(path)} (of a part that is published as .bin alone, take that)"
    return _EXPECTED


def _check_classes(path: str, folder: Path) -> None:
    for part, (role, expected) in _CLASSES.items():
        name = read_config(folder, part).get("_class_name")
        if name != expected:
            raise ValueError(f"model.path = {path!r}: its {role} is a {name}; supported: {expected}")
    kind = read_config(folder, "text_encoder").get("model_type", _ENCODERS[0])
    if kind not in _ENCODERS:
        raise ValueError(f"model.path = {path!r}: its text encoder is of type {kind!r}; supported: {_ENCODERS[0]!r}")
