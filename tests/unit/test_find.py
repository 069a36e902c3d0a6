"""Clips are found in folders and by manifests; whatever is not used is named with its reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from rlvid.data.find import find_clips
from rlvid.data.prompts import read_prompts


def test_a_folder_gives_clips_and_names_the_rest(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "a.WEBM", "sub/c.gif", "lonely.mp4", "long.mp4", "latin.mp4"):
        (tmp_path / name).write_bytes(b"x")
    for name, caption in {"b": " a b\n", "a": "an a", "sub/c": "a c", "notes": "hi", "long": "x" * 1001}.items():
        (tmp_path / f"{name}.txt").write_text(caption)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    clips, skipped = find_clips(tmp_path)
    assert [(c.path.relative_to(tmp_path).as_posix(), c.caption) for c in clips] == [
        ("a.WEBM", "an a"),
        ("b.mp4", "a b"),
        ("sub/c.gif", "a c"),
    ]
    reasons = {s.path.name: s.reason for s in skipped}
    assert reasons.keys() == {"latin.mp4", "lonely.mp4", "long.mp4", "notes.txt"}
    assert "not UTF-8" in reasons["latin.mp4"]
    assert reasons["lonely.mp4"] == "no caption: lonely.txt is missing"
    assert "1,001 characters" in reasons["long.mp4"]
    assert "not a video" in reasons["notes.txt"]


def manifest_csv(path: Path, table: pa.Table) -> None:
    pa.csv.write_csv(table, path)


def manifest_jsonl(path: Path, table: pa.Table) -> None:
    path.write_text("\n".join(map(json.dumps, table.to_pylist())))


@pytest.mark.parametrize(
    ("suffix", "write"),
    [("csv", manifest_csv), ("jsonl", manifest_jsonl), ("parquet", lambda path, table: pq.write_table(table, path))],
)
def test_a_manifest_says_what_is_used(tmp_path: Path, suffix: str, write: Callable[[Path, pa.Table], None]) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("clips/2.mp4", "clips/1.mp4", "other.mp4"):
        (tmp_path / name).write_bytes(b"x")
    videos = ["clips/2.mp4", "./clips/1.mp4", "gone.mp4", "clips/2.txt", "other.mp4"]
    table = pa.table({"video": videos, "caption": ["two", "one", "gone", "text", " "], "more": [1, 2, 3, 4, 5]})
    manifest = tmp_path / f"manifest.{suffix}"
    write(manifest, table)
    for source in (tmp_path, manifest):
        clips, skipped = find_clips(source)
        assert [(c.path, c.caption) for c in clips] == [
            (tmp_path / "clips/2.mp4", "two"),
            (tmp_path / "clips/1.mp4", "one"),
        ]
        assert {s.path.name for s in skipped} == {"gone.mp4", "2.txt", "other.mp4"}
    (tmp_path / "stray.mp4").write_bytes(b"x")
    assert find_clips(tmp_path)[1][-1].reason == f"not in manifest.{suffix}"
    write(manifest, table.rename_columns(["file", "caption", "more"]))
    with pytest.raises(ValueError, match="lacks 'video'; columns found: file, caption, more"):
        find_clips(tmp_path)


def test_rows_without_video_or_caption_are_skipped_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    rows = [
        {"video": "a.mp4"},
        {"caption": "no video"},
        {"video": "a.mp4", "caption": "an a"},
        {"video": 3, "caption": "b"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "m.csv").write_text("caption,video\nonly a caption\nan a,a.mp4\n,a.mp4\n")
    for name, expected in {
        "m.jsonl": ["m.jsonl:1: has no caption", "m.jsonl:2: names no video", "m.jsonl:4: names no video"],
        "m.csv": ["m.csv:2: names no video", "m.csv:4: the prompt is empty"],
    }.items():
        clips, skipped = find_clips(tmp_path / name)
        assert [(clip.path.name, clip.caption) for clip in clips] == [("a.mp4", "an a")]
        assert len(skipped) == len(expected)
        assert all(words in each.reason for words, each in zip(expected, skipped, strict=True))
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: lacks 'prompt'"):  # in a file of prompts every row counts
        read_prompts(tmp_path / "p.jsonl")


def test_a_source_must_exist_and_have_one_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder of videos"):
        find_clips(tmp_path / "none")
    (tmp_path / "manifest.csv").touch()
    (tmp_path / "manifest.jsonl").touch()
    with pytest.raises(ValueError, match=r"several manifests .manifest\.csv, manifest\.jsonl."):
        find_clips(tmp_path)
