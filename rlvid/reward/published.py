"""Published CLIP models from local files: their structures, names of weights, and versions."""

import hashlib
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPTokenizer

from rlvid.files import damaged
from rlvid.models.part_settings import ODD
from rlvid.models.weights import check_fit, check_texts, fill, headers, read_json, read_weights
from rlvid.reward.aesthetic import HEAD_FILE, AestheticReward, head
from rlvid.reward.clip import ClipReward, Tokenise, build_clip, own_tokenizer, pad_with
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
    return preset(preset_name or default, size if isinstance(size, int) else size[0])


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
        ValueError: the folder's configuration is damaged or of another class, or its two configurations differ.
    """
    theirs, own = (source or Path()) / "config.json", (source or Path()) / "open_clip_config.json"
    if source is None or not (theirs.is_file() or own.is_file()):
        return dict(open_clip.get_model_config(STRUCTURES[name]))
    kind = read_json(theirs, where).get("model_type") if theirs.is_file() else None
    converted = _of_transformers(theirs, where) if kind == "clip" else None
    if not own.is_file():
        if converted is None:
            raise ValueError(f"{where}: its config.json is of a model of type {kind!r}; expected 'clip'")
        return converted
    config = read_json(own, where).get("model_cfg")
    if not isinstance(config, dict) or "embed_dim" not in config:
        raise damaged(f"{where}: {own}", "no model_cfg with embed_dim", "copy it anew")
    for tower, part in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        if not isinstance(config.get(tower), dict):
            raise damaged(f"{where}: {own}", f"no table model_cfg.{tower}", "copy it anew")
        sizes = {key: getattr(part, key) for key in ("layers", "image_size", "context_length") if hasattr(part, key)}
        config[tower] = sizes | config[tower]
    foreign = config["vision_cfg"].get("timm_model_name"), config["text_cfg"].get("hf_model_name")
    if config.get("custom_text") or any(foreign):
        raise ValueError(f"{where}: its open_clip_config.json is of another class than CLIP, and is not supported")
    if converted and converted["quick_gelu"] != config.get("quick_gelu", False):
        raise ValueError(
            f"{where}: config.json and open_clip_config.json name different activations (QuickGELU in one of them); "
            "delete the one that is not of these weights"
        )
    return config


def _of_transformers(file: Path, where: str) -> dict[str, Any]:
    settings = read_json(file, where)
    try:
        config = CLIPConfig.from_dict(settings)
    except ODD as error:
        raise damaged(f"{where}: {file}", error, "copy it anew") from None
    try:
        return open_clip_config(config, where)
    except (ArithmeticError, TypeError) as error:
        raise damaged(f"{where}: {file}", error, "copy it anew") from None


def outline_clip(name: str, source: Path | None, where: str) -> CLIP:
    """Returns a published structure on the meta device, without numbers.

    Raises:
        ValueError: as ``structure``; or it is none that can be built.
    """
    config = structure(name, source, where)
    try:
        with torch.device("meta"):
            return build_clip(config)
    except ODD as error:
        if source is None:
            raise
        own = source / "open_clip_config.json"
        file = own if own.is_file() else source / "config.json"
        raise damaged(f"{where}: {file}", f"no CLIP can be built of it: {error}", "copy it anew") from None


def check_clip(
    name: str, source: Path, weights: dict[str, Tensor], where: str
) -> tuple[CLIP, dict[str, Tensor], CLIPTokenizer | None]:
    """Returns the model on the meta device, the weights under its names, and the folder's own tokenizer.

    Raises:
        ValueError: they do not fit.
    """
    if any(key.startswith("vision_model.") for key in weights):
        weights = open_clip_names(weights)
    clip = outline_clip(name, source, where)
    check_fit(clip.state_dict(), weights, where)
    words = own_tokenizer(source, where)
    if words is None and clip.vocab_size != 49408:
        raise ValueError(f"{where}: the model has a vocabulary of its own and the folder no tokenizer.json for it")
    if words is not None and (last := max(words.get_vocab().values())) >= clip.vocab_size:
        raise ValueError(
            f"{where}: its tokenizer has tokens up to {last}, and the model those below {clip.vocab_size}; copy the "
            "tokenizer of this model"
        )
    return clip, weights, words


def load_clip(name: str, source: Path, where: str) -> tuple[CLIP, Tokenise]:
    """Returns the model of a file or folder, and its tokenizer.

    Raises:
        ValueError: as ``check_files``; or a weight is not finite.
    """
    clip, weights, words = check_clip(name, source, read_weights(source, where), where)
    fill(clip, weights, where)
    length = clip.context_length
    clip.register_buffer("attn_mask", torch.full((length, length), -torch.inf).triu(1), persistent=False)  # was on meta
    return clip, SimpleTokenizer(context_length=length) if words is None else pad_with(words, length)
