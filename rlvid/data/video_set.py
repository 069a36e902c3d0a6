"""Videos as a source of training: a list of files that the feed encodes on the way; no Ray."""

import json
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from rlvid.config import RunConfig
from rlvid.config.model import ModelConfig
from rlvid.config.train import MADE
from rlvid.data.clips import digest
from rlvid.data.encode import model_fingerprint
from rlvid.data.find import ClipFile, find_clips, hash_contents, key_of, read_contents
from rlvid.data.kept import kept_folder
from rlvid.data.listing import write_listing
from rlvid.data.tables import table_files
from rlvid.data.videos import VideoError, read_video
from rlvid.models.video_shape import resolved_shape
from rlvid.storage import Mirror, is_uri

LISTED = pa.schema([("index", pa.int64()), ("caption", pa.string()), ("source", pa.string()), ("key", pa.string())])
"""The rows of a list of videos."""
_TRIED = 8
"""Videos of a source, from all over it, that are read before a start, until one can be."""
_SHOWN = 10
"""Skipped files that are printed."""


def is_videos(source: str) -> bool:
    """Returns whether a source is a folder or a manifest of videos, and not one of encoded clips."""
    if is_uri(source) or source in MADE:
        return False
    path = Path(source).expanduser()
    if path.is_dir():
        return not any(path.glob("part-*.parquet")) and not _is_of_clips(path / "meta.json")
    return path.is_file() and bool(table_files(path))


def _is_of_clips(path: Path) -> bool:
    """Returns whether a file says what a folder of encoded clips holds; other tools have files of that name."""
    with suppress(OSError, ValueError):
        meta = json.loads(path.read_bytes())
        return isinstance(meta, dict) and {"fingerprint", "clips"} <= meta.keys()
    return False


def check_videos(source: str, model: ModelConfig) -> None:
    """Checks that a source has videos, and that one of the first can be read.

    Raises:
        ValueError: it has none, or none of the first can be read.
    """
    clips, skipped = find_clips(_absolute(source))
    shape, faults = resolved_shape(model), list[str]()
    for clip in clips[:: max(1, len(clips) // _TRIED)][:_TRIED]:
        try:
            read_video(clip.path, frames=shape.frames, size=(shape.height, shape.width), fps=shape.fps)
        except VideoError as error:
            faults.append(str(error))
        else:
            return
    tried = f"none of the {len(faults)} videos that were tried can be read" if faults else "there is no video in it"
    why = "; ".join([*faults, *map(str, skipped)][:3]) or "the folder is empty"
    raise ValueError(
        f"data.source = {source!r}: {tried} ({why}); a clip is a video with its caption in a .txt beside it, or named "
        "with its caption in a manifest"
    )


def listed_videos(source: str, config: RunConfig, console: Console) -> str:
    """Lists the videos of a source in the run's storage; returns the list's folder, or its URI.

    Raises:
        ValueError: no videos, or the list cannot be written.
    """
    clips, skipped = find_clips(_absolute(source))
    contents, unreadable = read_contents(clips)
    skipped += unreadable
    for each in skipped[:_SHOWN]:
        console.print(f"skipped {each}", highlight=False, markup=False)
    if len(skipped) > _SHOWN:
        console.print(f"skipped {len(skipped) - _SHOWN} more files of {source}", highlight=False, markup=False)
    if not contents:
        check_videos(source, config.model)
    of_model = model_fingerprint(config.model)
    fingerprint = digest({"videos": hash_contents(contents), "model": of_model})
    name = digest([[str(clip.path) for clip in contents], fingerprint])[:8]  # files that moved are listed anew
    mirror = Mirror(config.output.storage, f"clips/videos-{len(contents)}-{name}")

    def write(out: Path) -> None:
        _write(contents, {"fingerprint": fingerprint, "model_fingerprint": of_model}, out)

    kept_folder(mirror, write, "videos", console)
    return mirror.place


def _absolute(source: str) -> Path:
    return Path(source).expanduser().resolve()


def _write(contents: dict[ClipFile, str], fingerprints: dict[str, str], out: Path) -> None:
    rows = (
        {"caption": clip.caption, "source": str(clip.path), "key": key_of(identity)}
        for clip, identity in contents.items()
    )
    write_listing(rows, "videos", LISTED, lambda: fingerprints, out)
