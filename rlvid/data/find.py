"""Finds clips: video files with their captions, in a folder or by a manifest.

A clip that cannot be used is skipped and named; the others are used. A clip and its caption lie in the folder of the
source. Files elsewhere (through links, ``..`` or absolute paths) are read only with ``outside``, because a folder from
somebody else may point at private files.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rlvid.data.prompts import check_prompt
from rlvid.data.tables import TABLES, read_rows, read_text, table_files
from rlvid.files import size_and_ends
from rlvid.text import is_utf8, printable

EXTENSIONS = (".mp4", ".webm", ".avi", ".mov", ".mkv", ".gif")
_MAX_CAPTION_BYTES = 1 << 20
_READERS = 16
"""Threads that read files side by side: shared storage answers each after milliseconds, and all are read at a start."""


@dataclass(frozen=True)
class ClipFile:
    """A video file and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        """Returns one line that names the file once, safe to print."""
        named = self.reason.startswith(str(self.path))
        return printable(self.reason if named else f"{self.path}: {self.reason}")


def find_clips(source: str | Path, *, outside: bool = False) -> tuple[list[ClipFile], list[Skipped]]:
    """Returns videos with their captions, in the order of their paths, and everything that is not used.

    Args:
        source: a folder, searched with its sub-folders, where ``a.mp4`` has its caption in ``a.txt``; or a folder with
            a manifest (``manifest.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``, a file or a folder of parts); or a
            manifest. A manifest has the columns ``video`` (path relative to the manifest) and ``caption``, and alone
            says what is used, in which order; a row that lacks either, names no video file or repeats another row, is
            skipped.
        outside: also use clips and captions outside the folder.

    Raises:
        ValueError: no such folder or file, several manifests, or a manifest that ``read_rows`` refuses.
    """
    source = Path(source)
    if source.is_file() or table_files(source):
        return _from_manifest(source, outside)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder of videos, nor a manifest ({', '.join(TABLES)})")
    files, skipped = _files(source, outside)
    manifests = sorted(path for path in source.glob("manifest.*") if table_files(path))
    if len(manifests) > 1:
        raise ValueError(f"{source}: has several manifests ({', '.join(p.name for p in manifests)}); keep one")
    if not manifests:
        clips, more = _from_side_cars(files)
        return clips, skipped + more
    manifest = manifests[0]
    if not (outside or _inside(manifest, source)):
        raise ValueError(f"{manifest}: {_leads_outside(source)}")
    clips, unused = _from_manifest(manifest, outside)
    named = {clip.path for clip in clips} | {each.path for each in unused}
    strays = [path for path in files if path not in named and manifest not in (path, *path.parents)]
    return clips, unused + skipped + [Skipped(path, f"not in {manifest.name}") for path in strays]


def read_contents(clips: list[ClipFile]) -> tuple[dict[ClipFile, str], list[Skipped]]:
    """Returns an identity of each clip, the same for a copy, and the clips whose files cannot be read.

    It is the caption, the size and a hash over both ends of the file.
    """
    contents: dict[ClipFile, str] = {}
    skipped = []
    with ThreadPoolExecutor(_READERS) as pool:
        for clip, found in zip(clips, pool.map(_content, clips), strict=True):
            if isinstance(found, OSError):
                skipped.append(Skipped(clip.path, f"cannot be read: {found.strerror}"))
            else:
                contents[clip] = found
    return contents, skipped


def _content(clip: ClipFile) -> str | OSError:
    try:
        return json.dumps([clip.caption, *size_and_ends(clip.path)])
    except OSError as error:
        return error


def key_of(identity: str) -> str:
    """Returns sixteen hex digits over the identity of a clip."""
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def hash_contents(contents: dict[ClipFile, str]) -> str:
    """Returns sixteen hex digits over clips in their order."""
    return hashlib.sha256("".join(contents.values()).encode()).hexdigest()[:16]


def _files(source: Path, outside: bool) -> tuple[list[Path], list[Skipped]]:
    """Returns all files of a folder and its sub-folders in the order of their paths, and what cannot be one."""
    files: list[Path] = []
    skipped: list[Skipped] = []
    seen, waiting = {os.path.realpath(source)}, [source]
    while waiting:
        folder = waiting.pop()
        try:
            names = os.listdir(folder)
        except OSError as error:
            skipped.append(Skipped(folder, f"cannot be read: {error.strerror}"))
            continue
        for path in (folder / name for name in names):
            if not is_utf8(path.name):
                skipped.append(Skipped(path, "its name is not UTF-8; rename it"))
            elif path.is_symlink() and not path.exists():
                skipped.append(Skipped(path, "a link that leads nowhere"))
            elif path.is_symlink() and not (outside or _inside(path, source)):
                skipped.append(Skipped(path, _leads_outside(source)))
            elif path.is_dir() and (real := os.path.realpath(path)) not in seen:
                if path.is_symlink() and _inside(path, source):
                    continue  # what it leads to is found at its own place
                seen.add(real)
                waiting.append(path)
            elif path.is_file():
                files.append(path)
            elif not path.is_dir():
                skipped.append(Skipped(path, "neither a file nor a folder"))
    return sorted(files), sorted(skipped, key=lambda each: each.path)


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _leads_outside(folder: Path) -> str:
    return f"lies outside {folder}, by a link, .. or its path; add --outside to read it"


def _from_side_cars(files: list[Path]) -> tuple[list[ClipFile], list[Skipped]]:
    clips, skipped = [], []
    videos = [path for path in files if path.suffix.lower() in EXTENSIONS]
    side_cars = {path.with_suffix(".txt") for path in videos}
    found = set(files)
    for path in files:
        side_car = path.with_suffix(".txt")
        if path in side_cars:
            continue
        if path.suffix.lower() not in EXTENSIONS:
            skipped.append(Skipped(path, f"not a video (allowed: {', '.join(EXTENSIONS)}) nor the caption of one"))
        elif side_car not in found:
            missing = "cannot be used, see there" if os.path.lexists(side_car) else "is missing"
            skipped.append(Skipped(path, f"no caption: {side_car.name} {missing}"))
        else:
            try:
                clips.append(ClipFile(path, _caption(side_car)))
            except ValueError as error:
                skipped.append(Skipped(path, f"no caption: {str(error).replace(str(side_car), side_car.name)}"))
    return clips, skipped


def _caption(side_car: Path) -> str:
    if side_car.stat().st_size > _MAX_CAPTION_BYTES:
        raise ValueError(f"{side_car}: is larger than 1 MiB, so it is no caption")
    return check_prompt(read_text(side_car), str(side_car))


def _from_manifest(manifest: Path, outside: bool) -> tuple[list[ClipFile], list[Skipped]]:
    skipped = []
    clips: dict[ClipFile, str] = {}  # and the rows that name them
    for part in table_files(manifest):
        if part != manifest and not (outside or _inside(part, manifest)):
            raise ValueError(f"{part}: {_leads_outside(manifest)}")
    for row in read_rows(manifest, ("video", "caption"), gaps=True):
        name = row.values.get("video")
        if row.fault is not None:
            skipped.append(Skipped(manifest, f"{row.where}: {row.fault}"))
            continue
        if not isinstance(name, str) or not name.strip():
            shown = "" if name is None or isinstance(name, str) else f": {repr(name)[:40]} is no text"
            skipped.append(Skipped(manifest, f"{row.where}: names no video{shown}"))
            continue
        path = Path(os.path.normpath(manifest.parent / name.strip()))
        try:
            check_file(path, name, manifest.parent, outside)
            if row.values["caption"] is None:
                raise ValueError(f"{row.where}: has no caption")
            clip = ClipFile(path, check_prompt(row.values["caption"], row.where))
            if clip in clips:
                raise ValueError(f"{row.where}: repeats {clips[clip]}, the same video and caption")
            clips[clip] = row.where
        except ValueError as error:
            skipped.append(Skipped(path, str(error)))
    if not clips and not skipped:
        raise ValueError(f"{manifest}: has no rows; a row names a video and its caption")
    return list(clips), skipped


def check_file(
    path: Path, name: str, folder: Path, outside: bool, endings: tuple[str, ...] = EXTENSIONS, kind: str = "video"
) -> None:
    """Checks that a file that a manifest names can be read.

    Args:
        path: of the file.
        name: its name in the manifest.
        folder: of the manifest.
        outside: whether it may lie elsewhere.
        endings: allowed endings of its name.
        kind: of file, for the message.

    Raises:
        ValueError: it cannot; the message does not name the file.
    """
    if not is_utf8(name) or "\0" in name:
        raise ValueError("its name is not UTF-8, or holds NUL")
    if path.suffix.lower() not in endings:
        raise ValueError(f"not {'an' if kind[0] in 'aeiou' else 'a'} {kind} (allowed: {', '.join(endings)})")
    if "://" in name:
        raise ValueError("an address; download the file, and name it by its path")
    if not (outside or _inside(path, folder)):
        raise ValueError(_leads_outside(folder))
    try:
        there = path.is_file()
    except OSError as error:
        raise ValueError(str(error.strerror)) from error
    if not there:
        raise ValueError("no such file")
