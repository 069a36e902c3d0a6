"""Reading weights that others published: no code of theirs is run, and every key must fit."""

import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_FILES = ("model*.safetensors", "pytorch_model*.bin", "open_clip*.safetensors", "open_clip*.bin")
_SHOWN = 3  # keys that an error names


def read_weights(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, or of the weight files in a folder.

    Reads ``.safetensors``, and torch files with ``weights_only``: a pickle that holds anything but tensors and plain
    containers is refused. Weights under ``state_dict`` and names that begin with ``module.`` are unwrapped.

    Args:
        path: a file, or a folder of transformers or open_clip; safetensors come before pickles.
        where: what errors begin with, such as ``reward.path = 'hps.pt'``.

    Raises:
        ValueError: no weights there, or a file that is damaged or wants to run code.
    """
    files = [path] if path.is_file() else next(filter(None, (sorted(path.glob(each)) for each in _FILES)), [])
    if not files:
        raise ValueError(f"{where}: the folder has no weights; looked for {', '.join(_FILES)}")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= _read(file, where)
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


def _read(file: Path, where: str) -> dict[str, Tensor]:
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{where}: {file.name} is a pickle that holds more than weights and could run code ({_first(error)}); it "
            "is not loaded. Save its state_dict as .safetensors where you trust it"
        ) from None
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{where}: {file.name} is damaged or no checkpoint ({_first(error)}); copy it anew") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{where}: {file.name} holds no table of weights; expected tensors by name, or a state_dict")
    return found


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:160]


def fill(module: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Gives a module the weights, all of them and no others, taking the tensors as they are; it may be on ``meta``.

    Raises:
        ValueError: keys are missing, foreign or of another shape; the first few are named.
    """
    own = module.state_dict()
    missing, foreign = own.keys() - weights.keys(), weights.keys() - own.keys()
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    faults = [_told(missing, "missing"), _told(foreign, "foreign"), _told(shapes, "of another shape")]
    if any(faults):
        raise ValueError(f"{where}: not the weights of this reward: {'; '.join(filter(None, faults))}")
    module.load_state_dict(weights, assign=True)


def _told(names: Iterable[str], fault: str) -> str:
    found = sorted(names)
    more = ", ..." if len(found) > _SHOWN else ""
    return f"{len(found)} keys {fault} ({', '.join(found[:_SHOWN])}{more})" if found else ""


def md5(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()
