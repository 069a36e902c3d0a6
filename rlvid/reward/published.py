"""Published CLIP models from local files: their structures, names of weights, and versions."""

import hashlib
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPTokenizer

from rlvid.files import damaged
from rlvid.models.weights import check_fit, check_texts, fill, headers, read_json, read_weights
from rlvid.reward.aesthetic import HEAD_FILE, AestheticReward, head
from rlvid.reward.clip import ClipReward, Tokenise, build_clip, pad_with
from rlvid.reward.huggingface import open_clip_config, open_clip_names
from rlvid.reward.preprocess import Preprocess, preset

STRUCTURES = {
    "hpsv2": "ViT-H-14",
    "hpsv2.1": "ViT-H-14",
    "pickscore": "ViT-H-14",
    "clip": "ViT-L-14-quickgelu",
    "aesthetic": "ViT-L-14-quickgelu",
}
"""open_clip's name of each reward's structure; another one may come with a folder for ``clip``."""

HPS_FILES = {
    "hpsv2": ("HPS_v2_compressed.pt", "fd9180de357abf01fdb4eaad64631db4"),
    "hpsv2.1": ("HPS_v2.1_compressed.pt", "4067542e34ba2553a738c5ac6c1d75c0"),
}
"""Name and MD5 digest of the public files; the weights' structure does not tell the versions apart."""


def load_clip_reward(
    name: str,
    path: str,
    device: str | torch.device = "cpu",
    *,
    where: str,
    precision: str = "float32",
    preprocess: str | None = None,
    chunk: int = 8,
    recompute: bool = True,
) -> ClipReward | AestheticReward:
    """Loads a reward of ``STRUCTURES`` from its published weights.

    Args:
        name: which reward.
        path: see ``check_files``; ``random`` gives the full structure with open_clip's initial weights.
        device: where it computes.
        where: what errors begin with.
        precision: of the weights.
        preprocess: name of a preset; default: the reward's own.
        chunk: most images at once.
        recompute: see ``rlvid.reward.clip.in_chunks``.

    Raises:
        ValueError: weights of another model, or what ``check_files`` raises.
    """
    source = check_files(name, path, where)
    clip, tokenise = load_random(name) if source is None else load_clip(name, source, where)
    scale = float(clip.logit_scale.detach().float().exp()) if name == "pickscore" else 1.0
    clip = clip.to(device, getattr(torch, precision))
    prepare = preprocess_of(name, clip.visual.image_size, preprocess)
    if name == "aesthetic":
        weight_D, bias = head(source and source / HEAD_FILE, clip.visual.output_dim, where)
        return AestheticReward(clip.visual, weight_D.to(device), bias.to(device), prepare, chunk, recompute=recompute)
    return ClipReward(clip, tokenise, prepare, chunk, recompute=recompute, scale=scale)


def preprocess_of(name: str, size: int | tuple[int, int], preset_name: str | None = None) -> Preprocess:
    """Returns the preprocessing of a reward's own code, or that of a named preset, at the size that its CLIP sees."""
    default = "hpsv2" if name.startswith("hpsv2") else "pickscore" if name == "pickscore" else "clip"
    return preset(preset_name or default, size[0] if isinstance(size, tuple) else size)


def own_tokenizer(source: Path | None) -> CLIPTokenizer | None:
    """Returns the tokenizer in a model's folder; None where there is none, and OpenAI's is meant."""
    if source is None or not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    return CLIPTokenizer.from_pretrained(source, local_files_only=True)


def check_files(name: str, path: str, where: str) -> Path | None:
    """Checks a reward's files without reading numbers; returns the path, or None for ``random``.

    Raises:
        ValueError: as ``find_files``; or weights are of another model, or of the other version of HPS.
    """
    source = find_files(name, path, where)
    if source is not None:
        check_clip(name, source, headers(source, where), where)
        if name == "aesthetic":
            headers(source / HEAD_FILE, where)
        if name in HPS_FILES and source.is_file():
            _check_version(name, source, where)
    return source


def find_files(name: str, path: str, where: str) -> Path | None:
    """Returns the path of a reward's weights and settings, or None for ``random``; opens no weights.

    HPSv2, HPSv2.1 and PickScore may be one file, whose structure is known. A folder is one of transformers
    (``config.json`` of a ``CLIPModel``) or of open_clip (``open_clip_config.json``); the aesthetic one also holds
    LAION's head, ``sac+logos+ava1-l14-linearMSE.pth``.

    Raises:
        ValueError: nothing is there, it lacks a part, or its settings are damaged.
    """
    if path == "random":
        return None
    source = Path(path).expanduser()
    if not source.exists():
        raise ValueError(f"{where}: no such file or folder; docs/rewards.md says where the public one is")
    if source.is_dir():
        if not any((source / each).is_file() for each in ("config.json", "open_clip_config.json")):
            raise ValueError(f"{where}: the folder has neither config.json (transformers) nor open_clip_config.json")
        if name == "aesthetic" and not (source / HEAD_FILE).is_file():
            raise ValueError(f"{where}: the folder lacks LAION's head, {HEAD_FILE}")
        check_texts(source, where)
    elif name in ("clip", "aesthetic"):
        raise ValueError(
            f"{where}: is a file, which does not say the model's structure; give the folder with its config.json"
        )
    return source


def _check_version(name: str, file: Path, where: str) -> None:
    """Raises ValueError for the other version's public file; a file of the right name is taken at its word."""
    public = {entry[0]: version for version, entry in HPS_FILES.items()}
    version = public.get(file.name)
    if version is None:
        digest = md5(file)
        version = next((each for each, entry in HPS_FILES.items() if entry[1] == digest), name)
    if version != name:
        raise ValueError(f"{where}: is the public file of {version}, not of {name}; set the reward's name to {version}")


def md5(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def load_random(name: str, seed: int = 0) -> tuple[CLIP, Tokenise]:
    """Returns a published structure with open_clip's initial weights of a seed, and its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_clip(open_clip.get_model_config(STRUCTURES[name])), SimpleTokenizer()


def structure(name: str, source: Path | None, where: str) -> dict[str, Any]:
    """Returns open_clip's configuration of a published model: its folder's own, else the one that ``STRUCTURES`` names.

    The activation must be the one of the training: with the other one scores are wrong by about 1e-3, and nothing else
    shows it. So the folder's word counts, and two words that differ are refused.

    Raises:
        ValueError: the folder's configuration is of another class, or its two configurations differ.
    """
    theirs, own = (source or Path()) / "config.json", (source or Path()) / "open_clip_config.json"
    if source is None or not (theirs.is_file() or own.is_file()):
        return dict(open_clip.get_model_config(STRUCTURES[name]))
    kind = read_json(theirs, where).get("model_type") if theirs.is_file() else None
    converted = open_clip_config(CLIPConfig.from_dict(read_json(theirs, where)), where) if kind == "clip" else None
    if not own.is_file():
        if converted is None:
            raise ValueError(f"{where}: its config.json is of a model of type {kind!r}; expected 'clip'")
        return converted
    config: dict[str, Any] = read_json(own, where).get("model_cfg", {})
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise damaged(f"{where}: {own}", "no model_cfg", "copy it anew")
    if config.get("custom_text") or "timm_model_name" in config["vision_cfg"]:
        raise ValueError(f"{where}: its open_clip_config.json is of another class than CLIP, and is not supported")
    if converted and converted["quick_gelu"] != config.get("quick_gelu", False):
        raise ValueError(
            f"{where}: config.json and open_clip_config.json name different activations (QuickGELU in one of them); "
            "delete the one that is not of these weights"
        )
    return config


def check_clip(name: str, source: Path, weights: dict[str, Tensor], where: str) -> tuple[CLIP, dict[str, Tensor]]:
    """Returns the model on the meta device, and the weights under its names.

    Raises:
        ValueError: they do not fit.
    """
    if any(key.startswith("vision_model.") for key in weights):
        weights = open_clip_names(weights)
    with torch.device("meta"):
        clip = build_clip(structure(name, source, where))
    check_fit(clip.state_dict(), weights, where)
    return clip, weights


def load_clip(name: str, source: Path, where: str) -> tuple[CLIP, Tokenise]:
    """Returns the model of a file or folder, and its tokenizer.

    Raises:
        ValueError: as ``check_files``; or a weight is not finite.
    """
    clip, weights = check_clip(name, source, read_weights(source, where), where)
    fill(clip, weights, where)
    length = clip.context_length
    clip.register_buffer("attn_mask", torch.full((length, length), -torch.inf).triu(1), persistent=False)  # was on meta
    return clip, _tokeniser(source, structure(name, source, where), where)


def _tokeniser(source: Path, config: dict[str, Any], where: str) -> Tokenise:
    """Returns the folder's own tokenizer, or else open_clip's, which is OpenAI's."""
    length = config["text_cfg"].get("context_length", 77)
    if (own := own_tokenizer(source)) is not None:
        return pad_with(own, length)
    if config["text_cfg"].get("vocab_size", 49408) != 49408:
        raise ValueError(f"{where}: the model has a vocabulary of its own and the folder no tokenizer.json for it")
    return SimpleTokenizer(context_length=length)
