"""Checksums of a model's weights. Those of large files are kept from start to start, in this machine's cache."""

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from rlvid.data.clips import digest
from rlvid.files import known_sha256, size_and_ends, write_atomic
from rlvid.models.folders import model_folder
from rlvid.storage import cache_folder

_LARGE = 2**30
"""Bytes of a file from which on its checksum is kept: a large model's weights take a minute to read."""


def hash_weights(path: str, parts: tuple[str, ...]) -> str:
    """Returns sixteen hex digits over weights and settings of a model's parts."""
    folder, total = model_folder(path), hashlib.sha256()
    for part in parts:
        for file_path in sorted((folder / part).rglob("*")):
            if file_path.suffix in (".safetensors", ".bin", ".json", ".txt"):
                total.update(f"{file_path.relative_to(folder).as_posix()}\n".encode())
                total.update(bytes.fromhex(_sha256(file_path)))
    return total.hexdigest()[:16]


def _sha256(path: Path) -> str:
    """Returns what ``known_sha256`` does; a large file is not read while nothing that the system says of it changes."""
    state = path.stat()
    if state.st_size < _LARGE:
        return known_sha256(path)
    # The time of the inode cannot be set, so that a copy with the times of another file is not taken for it.
    about = [str(path.absolute()), state.st_ino, state.st_mtime_ns, state.st_ctime_ns, *size_and_ends(path)]
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", found := _kept(about).read_text(encoding="utf-8")):
            return found
    found = known_sha256(path)
    with suppress(OSError, ValueError):  # without a cache it is read at each start
        write_atomic(_kept(about), found.encode())
    return found


def _kept(about: list[object]) -> Path:
    return cache_folder() / "checksums" / digest(about)
