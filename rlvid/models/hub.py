"""Ids of models on the Hugging Face hub: which ones are supported, and how to download them."""

import re
import shlex
from pathlib import Path

from rlvid.models.weights import read_json

MODELSCOPE = ("ali-vilab/text-to-video-ms-1.7b", "damo-vilab/text-to-video-ms-1.7b")
"""Hub ids of ModelScopeT2V: its present one and the one it had before."""
WAN_STRUCTURES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "random-wan-1.3b",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "random-wan-ti2v-5b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "random-wan-14b",
}
"""Hub ids of Wan's models, and the structure that each has, see ``rlvid.models.folders.STRUCTURES``."""
ONE_TRANSFORMER = "supported: WanPipeline with one transformer, as Wan2.1 T2V and Wan2.2 TI2V-5B have"
_TWO_TRANSFORMERS = f"has a second transformer; {ONE_TRANSFORMER}"
_CONDITIONED = f"is conditioned on images, videos or sound; {ONE_TRANSFORMER}"
_OTHER = (
    f"has other classes; supported: ModelScopeT2V and its kin, and Wan, such as {MODELSCOPE[0]} and "
    f"{next(iter(WAN_STRUCTURES))}"
)
_NOT_SUPPORTED = {
    r"wan.*a14b": _TWO_TRANSFORMERS,
    r"wan.*(?<![a-z])(i2v|flf2v|vace|s2v|animate|camera|control|inp)(?![a-z])": _CONDITIONED,
    r"(?<![a-z])(cogvideo|hunyuanvideo|ltx|mochi|allegro|latte|skyreels|animatediff|stable-video|open-?sora)": _OTHER,
}
"""Patterns of names of models that cannot be trained, and why."""


def fetch_command(hub_id: str) -> str:
    """Returns the shell command that downloads a model's safetensors and configurations into the Hugging Face cache."""
    of_wan = re.search(r"(?<![a-z])wan(?![a-z])", hub_id.rpartition("/")[2].lower())
    weights = "*.safetensors" if of_wan else "*model.safetensors"  # Wan's are in several files
    return f'hf download {shlex.quote(hub_id)} --include "*.json" --include "*.txt" --include "{weights}"'


def not_found(path: str) -> ValueError:
    """Returns the error of a hub id that is not in the cache: what to download, or that nothing trains such a model."""
    for pattern, why in _NOT_SUPPORTED.items():
        if re.search(pattern, path.rpartition("/")[2].lower()):
            return ValueError(
                f"model.path = {path!r} cannot be trained: by its name, it {why}; a folder on this machine is read as "
                "it is, whatever its name"
            )
    if path.startswith("Wan-AI/") and _in_diffusers_layout(path) in WAN_STRUCTURES:
        return _own_layout(path, "it")
    size = " (7 GB)" if path in MODELSCOPE else ""
    return ValueError(
        f"model.path = {path!r} is neither a folder nor in the Hugging Face cache; fetch it{size} with: "
        f"{fetch_command(path)}"
    )


def check_layout(path: str, folder: Path) -> None:
    """Raises ValueError where the folder of ``model.path`` is in the layout of Wan's own code, not in diffusers'."""
    where, config = f"model.path = {path!r}", folder / "config.json"
    if (folder / "high_noise_model").is_dir():
        raise ValueError(f"{where}: {folder} {_TWO_TRANSFORMERS}")
    settings = read_json(config, where) if config.is_file() else {}
    if settings.get("_class_name") != "WanModel" and not any(folder.glob("Wan2*_VAE.pth")):
        return
    if settings.get("model_type", "t2v") not in ("t2v", "ti2v"):
        raise ValueError(f"{where}: {folder} {_CONDITIONED}")
    raise _own_layout(path, folder)


def _in_diffusers_layout(path: str) -> str:
    """Returns the hub id under which a model in the layout of Wan's own code is published in diffusers' layout."""
    return f"Wan-AI/{Path(path).name}-Diffusers"


def _own_layout(path: str, folder: Path | str) -> ValueError:
    published = _in_diffusers_layout(path)
    hub_id = published if published in WAN_STRUCTURES else next(iter(WAN_STRUCTURES))
    return ValueError(
        f"model.path = {path!r}: {folder} is in the layout of Wan's own code; expected diffusers' layout: set "
        f"model.path={hub_id}, and fetch it with: {fetch_command(hub_id)}"
    )
