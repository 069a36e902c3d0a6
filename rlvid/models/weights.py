"""Finds, checks and reads the weight files of models and rewards.

No foreign code is run, and every key must fit. ``headers`` reads only names, types and shapes, so that a wrong file is
found before anything heavy starts.
"""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rlvid.files import damaged, stand_in

_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
"""Names of weight files of transformers, diffusers and open_clip, without their endings."""
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CONSTANTS = ("position_ids", "num_batches_tracked", "input_resolution", "context_length", "vocab_size")
"""Ends of the names of constants, the only tensors of whole numbers among weights."""
_TORCH = (b"PK\x03\x04", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19")
"""The first bytes of files of torch.save: a zip archive, or before torch 1.6 a number."""
DAMAGED = (
    SafetensorError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    UnicodeDecodeError,
)  # fmt: skip
"""Errors of the readers of safetensors and pickles where bytes are wrong: an unpickler meets any instruction."""
_SHOWN = 3  # keys that an error names


def weight_files(folder: Path, where: str) -> list[Path]:
    """Returns the weight files of a folder of transformers, diffusers or open_clip, all shards of a model.

    Safetensors come before pickles, full precision comes before ``fp16``.

    Raises:
        ValueError: there are none, or a shard is missing.
    """
    for ending in (".safetensors", ".bin"):
        for variant in ("", ".fp16"):
            for stem in _STEMS:
                if files := _files_of(folder, stem, variant, ending, where):
                    return files
    looked = f"{where}: the folder has no weights; looked for {', '.join(_STEMS)}, each .safetensors or .bin"
    partial = [each.name for each in sorted(folder.rglob("*")) if each.suffix in _UNFINISHED]
    if partial:
        raise ValueError(f"{looked}; there is an unfinished download, {partial[0]}: fetch it again")
    raise ValueError(looked)


def _weight_files_at(path: Path, where: str) -> list[Path]:
    """Returns a file itself, even one that is a broken link, or the weight files in a folder or a link to one."""
    return [path] if path.is_file() or (path.is_symlink() and not path.exists()) else weight_files(path, where)


def _files_of(folder: Path, stem: str, variant: str, ending: str, where: str) -> list[Path]:
    single, index = folder / f"{stem}{variant}{ending}", folder / f"{stem}{ending}.index{variant}.json"
    if single.is_file() or single.is_symlink():
        return [single]
    if index.is_file():
        places = read_json(index, where).get("weight_map")
        names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{where}: {index.name} names no weight files beside it (weight_map); copy it anew")
    elif shards := sorted(folder.glob(f"{stem}{variant}-*-of-*{ending}")):
        count = shards[0].name.rpartition("-of-")[2].removesuffix(ending)
        total = int(count) if count.isdigit() else len(shards)
        names = [f"{stem}{variant}-{place:05d}-of-{count}{ending}" for place in range(1, total + 1)]
    else:
        return []
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{where}: of {len(names)} weight files {len(missing)} are missing ({_listed(missing)}) in {folder}; the "
            "download is not complete: fetch the rest"
        )
    return [folder / name for name in names]


def check_text(file: Path, where: str) -> None:
    """Raises ValueError for what lies in place of a file of any kind: nothing, a Git LFS pointer, a web page."""
    if not file.is_file():
        what = "is a link to a file that is not there" if file.is_symlink() else "is missing"
        raise ValueError(f"{where}: {file.name} {what}; fetch it again")
    if not file.stat().st_size:
        raise ValueError(f"{where}: {file.name} is empty; fetch it again")
    if found := stand_in(file):
        raise ValueError(f"{where}: {file.name} {found}")


def check_texts(folder: Path, where: str) -> None:
    """Raises ValueError where settings or vocabularies (.json, .txt) in a folder are damaged or something else."""
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            read_json(file, where)
        elif file.suffix == ".txt":
            check_text(file, where)


def read_json(file: Path, where: str) -> dict[str, Any]:
    """Returns the table in a JSON file; raises ValueError where there is none."""
    check_text(file, where)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(f"{where}: {file}", error, "copy it anew") from None
    if not isinstance(found, dict):
        raise damaged(f"{where}: {file}", "no table of settings", "copy it anew")
    return found


def headers(path: Path, where: str) -> dict[str, Tensor]:
    """Returns the tensors of a file or a folder on the meta device: names, types and shapes; see ``read_weights``."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files_at(path, where):
        weights |= _read(file, where, "meta")
    return weights


def read_weights(path: Path, where: str) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint file, or of the weight files in a folder.

    Reads ``.safetensors``, and torch files with ``weights_only``: a pickle that holds anything but tensors and plain
    containers is refused. Weights under ``state_dict`` and names that begin with ``module.`` are unwrapped.

    Args:
        path: a file, or a folder; see ``weight_files``.
        where: what errors begin with, such as ``reward.path = 'hps.pt'``.

    Raises:
        ValueError: no weights there; a file that is damaged, wants to run code or is something else; or tensors of
            another type than floating-point numbers.
    """
    weights: dict[str, Tensor] = {}
    for file in _weight_files_at(path, where):
        weights |= _read(file, where, "cpu")
    return weights


def _read(file: Path, where: str, device: str) -> dict[str, Tensor]:
    check_text(file, where)
    tables = file.suffix == ".safetensors"
    if not tables:
        _check_archive(file, where)
    try:
        found = _table(file, where) if tables else torch.load(file, device, weights_only=True)
        if tables and device != "meta":
            found = load_file(file)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        code = f" ({named[1]})" if named else ""
        raise ValueError(
            f"{where}: {file.name} is a pickle that holds more than weights and could run code{code}; it is not "
            "loaded. Save its state_dict as .safetensors where you trust it"
        ) from None
    except DAMAGED as error:
        raise damaged(f"{where}: {file.name}", _first(error), "copy it anew") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{where}: {file.name} holds no table of weights; expected tensors by name, or a state_dict")
    for name, tensor in found.items():
        if tensor.dtype not in _DTYPES.values() and not name.endswith(_CONSTANTS):
            raise _wrong_type(file, where, name, str(tensor.dtype).removeprefix("torch."))
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def _table(file: Path, where: str) -> dict[str, Tensor]:
    with safe_open(file, "pt") as stored:
        parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118  # no dict
        found = {}
        for name, part in parts.items():
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None and not name.endswith(_CONSTANTS):
                raise _wrong_type(file, where, name, part.get_dtype())
            found[name] = torch.empty(part.get_shape(), dtype=dtype or torch.int64, device="meta")
        return found


def _wrong_type(file: Path, where: str, name: str, found: str) -> ValueError:
    return ValueError(
        f"{where}: {file.name} holds {name} as {found}; expected floating-point numbers of 16, 32 or 64 bits, for "
        "quantised weights are not supported"
    )


def _check_archive(file: Path, where: str) -> None:
    """Raises ValueError for what is no file of torch.save, without unpickling anything."""
    with file.open("rb") as stream:
        head = stream.read(16)
    if not head.startswith(_TORCH):
        raise ValueError(f"{where}: {file.name} is no checkpoint of torch, nor .safetensors by its name")
    if not head.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, UnicodeDecodeError) as error:
        raise damaged(f"{where}: {file.name}", error, "copy it anew") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            f"{where}: {file.name} is a TorchScript program (as OpenAI published CLIP), which is not run; give its "
            "weights as a folder of transformers, or as .safetensors"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{where}: {file.name} is a zip archive of {_listed(names)}; unpack it and name what is in it")


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:160]


def check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError when weights have other names or shapes than a model's ``own``; the first few are named."""
    missing, foreign = own.keys() - weights.keys(), weights.keys() - own.keys()
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    faults = [_counted(missing, "missing"), _counted(foreign, "foreign"), _counted(shapes, "of another shape")]
    if any(faults):
        raise ValueError(f"{where}: not the weights of this model: {'; '.join(filter(None, faults))}")


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError for weights that are NaN or infinite; the first few are named."""
    # One pass that keeps nothing: a sum is finite unless a number of it is not, for float64 does not overflow.
    odd = [name for name, tensor in weights.items() if not tensor.sum(dtype=torch.float64).isfinite()]
    if odd:
        raise ValueError(f"{where}: {len(odd)} weights are NaN or infinite ({_listed(sorted(odd))}); copy them anew")


def fill(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Assigns weights to a module, without copies; every key must fit. The module may be on ``meta``.

    Raises:
        ValueError: keys are missing, foreign or of another shape, or numbers are not finite; the first few are named.
    """
    check_fit(module.state_dict(), weights, where)
    check_finite(weights, where)
    module.load_state_dict(weights, assign=True)


def _counted(names: Iterable[str], fault: str) -> str:
    found = sorted(names)
    return f"{len(found)} keys {fault} ({_listed(found)})" if found else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
