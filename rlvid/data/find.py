"""Finds clips: video files with their captions, in a folder or by a manifest."""

import os
from dataclasses import dataclass
from pathlib import Path

from rlvid.data.prompts import check_prompt
from rlvid.data.tables import TABLES, read_rows

EXTENSIONS = (".mp4", ".webm", ".avi", ".mov", ".mkv", ".gif")


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


def find_clips(source: str | Path) -> tuple[list[ClipFile], list[Skipped]]:
    """Videos with their captions, in the order of their paths, and everything that is not used.

    Args:
        source: a folder, searched with its sub-folders, where ``a.mp4`` has its caption in ``a.txt``; or a folder with
            a manifest (``manifest.csv``, ``.jsonl`` or ``.parquet``); or a manifest. A manifest has the columns
            ``video`` (path relative to the manifest) and ``caption``, and alone says what is used, in which order; a
            row that lacks either, or names no video file, is skipped.

    Raises:
        ValueError: no such folder or file, several manifests, or a manifest that is damaged or lacks a column.
    """
    source = Path(source)
    if source.is_file():
        return _from_manifest(source)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder of videos, nor a manifest ({', '.join(TABLES)})")
    files = sorted(path for path in source.rglob("*") if path.is_file())
    manifests = [path for path in files if path.parent == source and path.stem == "manifest" and path.suffix in TABLES]
    if len(manifests) > 1:
        raise ValueError(f"{source}: has several manifests ({', '.join(p.name for p in manifests)}); keep one")
    if manifests:
        clips, skipped = _from_manifest(manifests[0])
        named = {clip.path for clip in clips} | {each.path for each in skipped} | {manifests[0]}
        return clips, skipped + [Skipped(p, f"not in {manifests[0].name}") for p in files if p not in named]
    return _from_side_cars(files)


def _from_side_cars(files: list[Path]) -> tuple[list[ClipFile], list[Skipped]]:
    clips, skipped = [], []
    videos = [path for path in files if path.suffix.lower() in EXTENSIONS]
    side_cars = {path.with_suffix(".txt") for path in videos}
    for path in files:
        side_car = path.with_suffix(".txt")
        if path in side_cars:
            continue
        if path.suffix.lower() not in EXTENSIONS:
            skipped.append(Skipped(path, f"not a video (allowed: {', '.join(EXTENSIONS)}) nor the caption of one"))
        elif not side_car.is_file():
            skipped.append(Skipped(path, f"no caption: {side_car.name} is missing"))
        else:
            try:
                caption = check_prompt(side_car.read_text(encoding="utf-8-sig"), str(side_car))
                clips.append(ClipFile(path, caption))
            except UnicodeDecodeError:
                skipped.append(Skipped(path, f"no caption: {side_car.name} is not UTF-8 text"))
            except ValueError as error:
                skipped.append(Skipped(path, f"no caption: {error}"))
    return clips, skipped


def _from_manifest(manifest: Path) -> tuple[list[ClipFile], list[Skipped]]:
    clips, skipped = [], []
    for where, row in read_rows(manifest, ("video", "caption"), gaps=True):
        name = row["video"]
        if not isinstance(name, str) or not name.strip():
            skipped.append(Skipped(manifest, f"{where}: names no video"))
            continue
        path = Path(os.path.normpath(manifest.parent / name.strip()))
        try:
            if path.suffix.lower() not in EXTENSIONS:
                raise ValueError(f"not a video (allowed: {', '.join(EXTENSIONS)})")
            if not path.is_file():
                raise ValueError("no such file")
            if row["caption"] is None:
                raise ValueError(f"{where}: has no caption")
            clips.append(ClipFile(path, check_prompt(row["caption"], where)))
        except ValueError as error:
            skipped.append(Skipped(path, str(error)))
    return clips, skipped
