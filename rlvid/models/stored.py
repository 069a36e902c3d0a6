"""The parts of a model on disk, in a layout that older and newer libraries read.

A text encoder's weights have their published names (``text_model.``), and a tokenizer has its vocabulary in
``vocab.json`` and ``merges.txt`` beside ``tokenizer.json``. Libraries change their formats. So an untrained part is
copied byte for byte, and a new part is written by ``save_text_encoder`` or ``save_tokenizer``.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer

from rlvid.models.flow_shift import scheduler_class, scheduler_file
from rlvid.models.folders import RANDOM, UNET3D, model_folder
from rlvid.models.untrained import fill_constants, outline
from rlvid.models.weights import check_fit, fill, headers, read_json, read_weights, weight_files

CLASSES = {
    "unet": ["diffusers", "UNet3DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
"""Library and class of each part, as ``model_index.json`` has them."""
WAN_CLASSES = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
}
"""The same of Wan, as published; see ``wan_classes``."""
OLDEST = {"transformers": "4.44", "diffusers": "0.30", "peft": "0.12"}
"""Oldest versions that read the layout, and give the same pixels (tests/parity/exported.py)."""
_PREFIX = "text_model."

_RENAMED = {
    "unet": (),
    # of diffusers before 0.14
    "vae": (
        (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
        (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
        (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
        (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    ),
    # of transformers before 5.6, in which published models are
    "text_encoder": ((rf"^{re.escape(_PREFIX)}", ""),),
}


def check_unet3d(path: str) -> None:
    """Checks that the weights of a 3D U-Net's parts are all there and fit their structure; reads no numbers.

    Raises:
        ValueError: as ``model_folder``; or weights are missing, damaged, of another structure, or no weights.
    """
    folder = model_folder(path)
    if path != RANDOM:
        for name, part in zip(UNET3D.networks, outline(folder), strict=True):
            where = _where(path, name)
            check_fit(part.state_dict(), _own_names(name, headers(folder / name, where)), where)


def stored_parts(path: str, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Returns the parts of ``UNet3DModel`` with their stored weights, by its arguments' names.

    Raises:
        ValueError: as ``check_unet3d``, or weights are NaN or infinite.
    """
    folder, parts = model_folder(path), dict[str, Any]()
    for name, part in zip(UNET3D.networks, outline(folder), strict=True):
        where = _where(path, name)
        fill(part, _own_names(name, read_weights(folder / name, where)), where)
        fill_constants(part)
        parts[name] = nn.Module.to(part, device, dtype)  # diffusers' own warns of nothing
    parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    parts["scheduler"] = DDIMScheduler.from_pretrained(folder / "scheduler")
    return parts


def _where(path: str, name: str) -> str:
    return f"model.path = {path!r}: {name}"


def _own_names(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights under the names of the installed libraries, without the constants that older files hold."""
    found = {}
    for key, tensor in weights.items():
        if key.endswith(".position_ids"):
            continue
        for pattern, replacement in _RENAMED[part]:
            key = re.sub(pattern, replacement, key)
        found[key] = tensor
    return found


def copy_part(source: Path, folder: Path, network: bool) -> None:
    """Copies a part of a model, byte for byte: its settings, and of a network the weights that rlvid reads.

    Weights of half precision that are alone there lose ``.fp16`` in their names, so that others find them.

    Raises:
        ValueError: as ``weight_files``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".txt") and ".index." not in file.name:
            shutil.copyfile(file, folder / file.name)
    places: dict[str, str] = {}
    for file in weight_files(source, str(source)) if network else ():
        name = file.name.replace(".fp16", "")
        shutil.copyfile(file, folder / name)
        places |= dict.fromkeys(headers(file, str(source)), name)
    if len(names := sorted(set(places.values()))) > 1:
        stem, ending = names[0].partition("-")[0], Path(names[0]).suffix
        index = json.dumps({"metadata": {}, "weight_map": places}, indent=2, sort_keys=True)
        (folder / f"{stem}{ending}.index.json").write_text(index + "\n", encoding="utf-8")


def wan_classes(folder: Path) -> dict[str, list[str]]:
    """Returns ``WAN_CLASSES`` with the scheduler's class by its own file, and the tokenizer's as rlvid loads it."""
    scheduler = scheduler_class(read_json(scheduler_file(folder), "scheduler"))
    found = type(AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)).__name__
    # The names of transformers 4, which 5 knows too: without Fast, 4 would read files of another kind.
    fast = "PreTrainedTokenizerFast" if found == "TokenizersBackend" else f"{found.removesuffix('Fast')}Fast"
    tokenizer = fast if hasattr(transformers, fast) else found
    return WAN_CLASSES | {"tokenizer": ["transformers", tokenizer], "scheduler": ["diffusers", scheduler]}


def save_text_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Writes a text encoder's settings, and its weights under their published names."""
    encoder.config.architectures = [type(encoder).__name__]
    encoder.config.save_pretrained(folder)
    weights = {_PREFIX + name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes a tokenizer as one file, and as the vocabulary and merges that transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def oldest_transformers(folder: Path) -> str:
    """Returns the oldest version of transformers that reads the text encoder and tokenizer of a model's folder."""
    encoder = folder / "text_encoder"
    if not all(name.startswith(_PREFIX) for name in headers(encoder, str(encoder))):
        return "5.6"
    slow = all((folder / "tokenizer" / name).is_file() for name in ("vocab.json", "merges.txt"))
    return OLDEST["transformers"] if slow else "5.0"
