"""The folders of a model's parts: in the package, in diffusers' layout, or in the local Hugging Face cache.

Nothing is downloaded: an error names missing files, and the command that downloads them.
"""

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rlvid.config.model import BUILT_IN
from rlvid.models import hub
from rlvid.models.hub import MODELSCOPE, ONE_TRANSFORMER, check_layout, fetch_command, not_found
from rlvid.models.part_settings import check_counts, check_unet_fit, check_wan_fit
from rlvid.models.weights import check_texts, read_json

RANDOM = "random"
"""The ``model.path`` of ModelScopeT2V's structure with random weights."""
STRUCTURES = {
    RANDOM: "modelscope",
    "random-wan-1.3b": "structures/wan-1.3b",
    "random-wan-ti2v-5b": "structures/wan-ti2v-5b",
    "random-wan-14b": "structures/wan-14b",
}
"""The values of ``model.path`` for random weights, and the folders of their configurations beside this file."""
OUTLINES = ("random-wan-ti2v-5b", "random-wan-14b")
"""Those of them that are outlined on the meta device alone: random weights of that size would serve nobody."""


@dataclass(frozen=True)
class Family:
    """Models of the same classes, by the files that a folder in diffusers' layout has.

    Attributes:
        denoiser: folder of the network that is trained.
        classes: part -> its role in messages, and its class.
        encoders: types of text encoders; the first one where a file names none.
        files: patterns, each of a file that must be there.
        pipeline: the class in ``model_index.json``, where that matters.
    """

    denoiser: str
    classes: dict[str, tuple[str, str]]
    encoders: tuple[str, ...]
    files: tuple[str, ...]
    pipeline: str | None = None

    @property
    def networks(self) -> tuple[str, str, str]:
        """Folders of the parts that have weights."""
        return self.denoiser, "vae", "text_encoder"


def _files(denoiser: str, tokenizer: str) -> tuple[str, ...]:
    return (
        f"{denoiser}/config.json", f"{denoiser}/*.safetensors", "vae/config.json", "vae/*.safetensors",
        "text_encoder/config.json", "text_encoder/*.safetensors", "tokenizer/tokenizer_config.json", tokenizer,
        "scheduler/scheduler_config.json",
    )  # fmt: skip


UNET3D = Family(
    "unet",
    {"unet": ("denoiser", "UNet3DConditionModel"), "vae": ("autoencoder", "AutoencoderKL")},
    ("clip_text_model", "clip"),
    _files("unet", "tokenizer/*[br].json"),
)
"""ModelScopeT2V and its kin."""
WAN = Family(
    "transformer",
    {"transformer": ("denoiser", "WanTransformer3DModel"), "vae": ("autoencoder", "AutoencoderKLWan")},
    ("umt5",),
    _files("transformer", "tokenizer/tokenizer.json"),
    pipeline="WanPipeline",
)
"""Wan2.1 and Wan2.2 with one transformer."""

_CONFIGS = ("vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
_EXPECTED = (
    f"expected 'builtin', 'builtin-wan', '{RANDOM}', a hub id such as '{MODELSCOPE[0]}', or a folder in diffusers' "
    "layout with unet or transformer, vae, text_encoder, tokenizer and scheduler"
)


def builtin_folder(path: str = "builtin") -> Path:
    """Returns the folder of a model of the built-in world inside the package."""
    return Path(str(resources.files("rlvid"))) / "toy" / "weights" / {"builtin": "model", "builtin-wan": "wan"}[path]


def random_structure(path: str) -> str | None:
    """Returns the ``model.path`` of random weights of a published model's structure; None for another model."""
    return RANDOM if path in MODELSCOPE else hub.WAN_STRUCTURES.get(path)


def modelscope_folder() -> Path:
    """Returns the folder of ModelScopeT2V's published configuration inside the package; it has no weights."""
    return _packaged(RANDOM)


def _packaged(path: str) -> Path:
    return Path(str(resources.files("rlvid"))) / "models" / STRUCTURES[path]


def family(path: str) -> Family:
    """Returns the family of ``model.path``, from the names in its folder.

    Raises:
        ValueError: the folder is missing, or holds neither family.
    """
    return _family_of(path, _folder(path))


def is_text_apart(path: str) -> bool:
    """Returns whether the text encoder of ``model.path`` is too large to stand beside the denoiser.

    A 3D U-Net's encoder is small, and so is that of ``builtin-wan``; random weights of Wan have none: embeddings are
    drawn.
    """
    return path not in (*BUILT_IN, *STRUCTURES) and family(path) is WAN


def _folder(path: str) -> Path:
    """Returns the folder of configurations, be weights in it or not."""
    folder = _packaged(path) if path in STRUCTURES else _found(path)
    known = random_structure(path)
    if known is not None and not (folder and any((folder / each.denoiser).is_dir() for each in (UNET3D, WAN))):
        return _packaged(known)
    if folder is None:
        raise not_found(path)
    return folder


def _family_of(path: str, folder: Path) -> Family:
    index = folder / "model_index.json"
    pipeline = read_json(index, f"model.path = {path!r}").get("_class_name") if index.is_file() else None
    unet, transformer = ((folder / each.denoiser).is_dir() for each in (UNET3D, WAN))
    if pipeline == WAN.pipeline or (transformer and not unet):
        return WAN
    if unet:
        return UNET3D
    if not folder.is_dir():
        raise ValueError(f"model.path = {path!r}: there is no such folder, nor a model of that name; {_EXPECTED}")
    check_layout(path, folder)
    raise ValueError(f"model.path = {path!r}: {folder} has neither unet nor transformer; {_remedy(path)}")


def model_folder(path: str) -> Path:
    """Returns the folder of ``model.path``, after a check of its parts and classes; without weights for random ones.

    Raises:
        ValueError: the folder or one of its parts is missing, or it holds another class of model; or nothing loads such
            a model.
    """
    if path in OUTLINES:
        raise ValueError(
            f"model.path = {path!r} is a structure without weights; allowed here: 'random', 'random-wan-1.3b', or the "
            "folder of a model"
        )
    if path in STRUCTURES:
        return _packaged(path)
    folder = _found(path)
    if folder is None:
        raise not_found(path)
    of = _family_of(path, folder)
    _check_classes(path, folder, of)
    missing = [file for file in of.files if not any(folder.glob(file)) and not any(folder.glob(_pickle(file)))]
    if missing:
        raise ValueError(f"model.path = {path!r}: {folder} lacks {', '.join(missing)}; {_remedy(path)}")
    for part in (*of.networks, "tokenizer", "scheduler"):
        check_texts(folder / part, f"model.path = {path!r}: {part}")
    return folder


def structure_folder(path: str) -> Path:
    """Returns a folder whose configurations describe the model of ``model.path``, be its weights here or not.

    ModelScopeT2V or Wan that is not in the Hugging Face cache is described by the configuration inside the package.

    Raises:
        ValueError: configurations are missing, or of another class of model.
    """
    folder = _folder(path)
    of = _family_of(path, folder)
    _check_classes(path, folder, of)
    missing = [file for file in (f"{of.denoiser}/config.json", *_CONFIGS) if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"model.path = {path!r}: {folder} lacks {', '.join(missing)}; {_remedy(path)}")
    return folder


def movable(path: str) -> str:
    """``model.path`` as a process in another working folder understands it."""
    return str(Path(path).resolve()) if path not in (*BUILT_IN, *STRUCTURES) and Path(path).exists() else path


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """Returns the content of a part's ``config.json``; raises ValueError when it is damaged."""
    return read_json(folder / part / "config.json", part)


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not path.startswith(".")


def _found(path: str) -> Path | None:
    """Returns the folder of a path; None for a hub id of which the cache holds nothing."""
    if path in BUILT_IN:
        return builtin_folder(path)
    if Path(path).exists() or not _is_hub_id(path):
        return Path(path)
    ids = (path, *(MODELSCOPE if path in MODELSCOPE else ()))
    for name in (f"{UNET3D.denoiser}/config.json", f"{WAN.denoiser}/config.json", "model_index.json", "config.json"):
        for hub_id in ids:
            if found := cached_folder(hub_id, name):
                return found.parent if "/" in name else found
    return None


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


def _check_classes(path: str, folder: Path, of: Family) -> None:
    """Checks the classes of the parts that are there."""
    where = f"model.path = {path!r}"
    if of.pipeline is not None and (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json", where)
        if index.get("_class_name") != of.pipeline:
            raise ValueError(f"{where}: model_index.json is of a {index.get('_class_name')}; {ONE_TRANSFORMER}")
        if any(index.get("transformer_2") or ()):
            raise ValueError(f"{where}: it has a second transformer (transformer_2); {ONE_TRANSFORMER}")
    if (folder / "transformer_2").exists():
        raise ValueError(f"{where}: it has a second transformer (transformer_2); {ONE_TRANSFORMER}")
    files = {part: folder / part / "config.json" for part in of.networks}
    found = {part: read_json(file, f"{where}: {part}") for part, file in files.items() if file.is_file()}
    for part, (role, expected) in of.classes.items():
        name = found.get(part, {"_class_name": expected}).get("_class_name")
        if name != expected:
            raise ValueError(f"{where}: its {role} is a {name}; supported: {expected}")
    kind = found.get("text_encoder", {}).get("model_type", of.encoders[0])
    if kind not in of.encoders:
        raise ValueError(f"{where}: its text encoder is of type {kind!r}; supported: {of.encoders[0]!r}")
    for part, settings in found.items():
        check_counts(part, settings, f"{where}: {part}: {files[part]}")
    if of is WAN and "transformer" in found and "vae" in found:
        transformer, channels = found["transformer"], found["vae"].get("z_dim", 16)
        if transformer.get("image_dim") is not None or transformer.get("in_channels", 16) != channels:
            raise ValueError(
                f"{where}: its denoiser is conditioned on images (image_dim, in_channels); {ONE_TRANSFORMER}"
            )
    if len(found) == len(files):
        (check_wan_fit if of is WAN else check_unet_fit)(found, where)
