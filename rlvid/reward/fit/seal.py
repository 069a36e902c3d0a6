"""The seal of a fitted reward's folder: SHA-256 digests that tell its files from those of another fit."""

import hashlib
import json
from pathlib import Path
from typing import Any

from rlvid.files import known_sha256, sha256, write_atomic
from rlvid.models.weights import read_json

SPEC, HEAD, CONFIG = "reward.json", "head.safetensors", "open_clip_config.json"
_FILES = (
    "model.safetensors", HEAD, CONFIG, "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
)  # fmt: skip
"""Files that scores depend on, ``reward.json`` aside."""
_FREE = ("mean", "deviation", "sha256")
"""Keys of ``reward.json`` that its own SHA-256 leaves out: the unit of the answers is the user's to choose."""


def seal(folder: Path, table: dict[str, Any]) -> None:
    """Writes ``reward.json``, with the SHA-256 of the files that are in the folder.

    Args:
        folder: of the reward.
        table: the other keys of ``reward.json``.
    """
    found = {name: sha256(folder / name) for name in _FILES if (folder / name).is_file()}
    sealed = table | {"sha256": found | {SPEC: _settings_digest(table)}}
    write_atomic(folder / SPEC, json.dumps(sealed, indent=2).encode())


def _settings_digest(table: dict[str, Any]) -> str:
    # Of the keys that the file has: a key that a later version adds changes nothing.
    settings = {key: value for key, value in table.items() if key not in _FREE}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_seal(folder: Path, where: str) -> None:
    """Raises ValueError where a file of the folder is not the one that was sealed; old folders have no seal."""
    table = read_json(folder / SPEC, where)
    sealed = table.get("sha256")
    if sealed is None:
        return
    found = {name: known_sha256(folder / name) for name in _FILES if (folder / name).is_file()}
    found[SPEC] = _settings_digest(table)
    for name in sorted(sealed.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{where}: no {name} there; copy the whole folder")
        if found[name] != sealed.get(name):
            raise ValueError(
                f"{where}: {name} is not as rlvid reward fit wrote it (another SHA-256); copy the whole folder anew, "
                f"or delete sha256 in {SPEC} to take the files as they are"
            )
