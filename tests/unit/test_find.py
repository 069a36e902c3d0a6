"""Clips are found in folders and by manifests; whatever is not used is named with its reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from rlvid.data.find import ClipFile, Skipped, find_clips, read_contents
from rlvid.data.prompts import read_prompts
from rlvid.files import size_and_ends


def test_a_folder_gives_clips_and_names_the_rest(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "a.WEBM", "sub/c.gif", "lonely.mp4", "long.mp4", "latin.mp4"):
        (tmp_path / name).write_bytes(b"x")
    for name, caption in {"b": " a b\n", "a": "an a", "sub/c": "a c", "notes": "hi", "long": "x " * 1001}.items():
        (tmp_path / f"{name}.txt").write_text(caption)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    clips, skipped = find_clips(tmp_path)
    assert [(c.path.relative_to(tmp_path).as_posix(), c.caption) for c in clips] == [
        ("a.WEBM", "an a"),
        ("b.mp4", "a b"),
        ("long.mp4", ("x " * 1001).strip()),
        ("sub/c.gif", "a c"),
    ]
    reasons = {s.path.name: s.reason for s in skipped}
    assert reasons.keys() == {"latin.mp4", "lonely.mp4", "notes.txt"}
    assert "not UTF-8" in reasons["latin.mp4"]
    assert reasons["lonely.mp4"] == "no caption: lonely.txt is missing"
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


def put(folder: Path, *names: str | bytes, caption: bytes = b"a wall") -> None:
    for name in map(os.fsencode, names):
        Path(folder / os.fsdecode(name)).write_bytes(b"x")
        Path(folder / os.fsdecode(name)).with_suffix(".txt").write_bytes(caption)


def test_one_bad_file_never_costs_the_others(tmp_path: Path) -> None:
    put(tmp_path, "good.mp4", b"caf\xe9.mp4", "line\nbreak.mp4")
    bad = {
        "nul": b"a \0 wall", "escape": b"a \x1b[31mwall", "utf16": "a wall".encode("utf-16-le"), "cr": b"a\rwall",
        "turned": "a \u202ewall".encode(), "blank": "\u200b".encode(), "huge": b"x" * (1 << 20 | 1),
    }  # fmt: skip
    for name, caption in bad.items():
        put(tmp_path, f"{name}.mp4", caption=caption)
    (tmp_path / os.fsdecode(b"by-\xff.dat")).touch()
    (tmp_path / os.fsdecode(b"sub-\xff")).mkdir()
    put(tmp_path / os.fsdecode(b"sub-\xff"), "in.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")
    clips, skipped = find_clips(tmp_path)
    assert [(clip.path.name, clip.caption) for clip in clips] == [("good.mp4", "a wall"), ("line\nbreak.mp4", "a wall")]
    reasons = {os.fsencode(each.path.name): each.reason for each in skipped}
    assert reasons.keys() == {
        *(f"{name}.mp4".encode() for name in bad), b"caf\xe9.mp4", b"caf\xe9.txt", b"by-\xff.dat", b"sub-\xff",
        b"gone.mp4", b"pipe.mp4",
    }  # fmt: skip
    assert "U+001B" in reasons[b"escape.mp4"]
    assert all("not UTF-8" in reason for name, reason in reasons.items() if not name.isascii())
    for each in skipped:
        assert str(each).isprintable()
        assert str(each).count(each.path.parent.as_posix()) == 1


def test_bad_rows_are_named_and_the_others_used(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    (tmp_path / "m.csv").write_bytes(
        b'video,caption,n\na.mp4,a wall, bright,1\na.mp4,"a wall, bright",1\na.mp4,dim\na.mp4,nul \0,1\n'
        b'a.mp4,"a wall,\r\nbright",1\n' + b"a" * 5000 + b".mp4,long,1\nhttps://a.org/a.mp4,far,1\n"
    )
    (tmp_path / "m.jsonl").write_text(
        '{"video": "a.mp4", "caption": "a \\ud83d"}\n{"video": "a.mp4", "caption": "a wall, bright"}\n{"video": "a.m\n'
        '{"video": "\\udce9.mp4", "caption": "b"}\n[1]\n{"video": "a\\u0000.mp4", "caption": "b"}\n'
        '{"video": {"path": "a.mp4"}, "caption": "b"}\n{"video": "a.mp4", "caption": ["b"]}\n'
        '{"video": "a.mp4", "video": 1}'
    )
    for name, lines in {"m.csv": [2, 4, 5, 6], "m.jsonl": [1, 3, 5, 7, 8, 9]}.items():
        clips, skipped = find_clips(tmp_path / name)
        assert [(clip.path.name, clip.caption) for clip in clips] == [("a.mp4", "a wall, bright")]
        assert [line for line in range(1, 20) if any(f"{name}:{line}: " in each.reason for each in skipped)] == lines
        assert len(skipped) == len(lines) + 2
        assert all(str(each).isprintable() and str(each).count(str(tmp_path / name)) <= 2 for each in skipped)
    (tmp_path / "m.csv").write_text('video,caption\na.mp4,a wall\na.mp4,"b\n')
    with pytest.raises(ValueError, match=r"m\.csv:3: has a quotation mark"):
        find_clips(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("video,caption\n")
    with pytest.raises(ValueError, match=r"m\.csv: has no rows"):
        find_clips(tmp_path / "m.csv")


def test_a_manifest_may_be_a_folder_of_parts(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "manifest.parquet").mkdir()
    for index, name in enumerate("ab"):
        part = tmp_path / "manifest.parquet" / f"part-{index}.parquet"
        pq.write_table(pa.table({"video": [f"{name}.mp4"], "caption": [name]}), part)
    for source in (tmp_path, tmp_path / "manifest.parquet"):
        assert [(clip.path.name, clip.caption) for clip in find_clips(source)[0]] == [("a.mp4", "a"), ("b.mp4", "b")]
    assert {each.path.name for each in find_clips(tmp_path)[1]} == {"a.txt", "b.txt"}


def test_what_lies_outside_is_read_only_where_asked_for(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    (mine / "sub").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    put(other, "far.mp4", "text.mp4", caption=b"a secret")
    put(other / "deep", "deep.mp4")
    put(mine / "sub", "in.mp4")
    put(mine, "text.mp4", "near.mp4")
    (mine / "far.mp4").symlink_to(other / "far.mp4")
    (mine / "far.txt").write_text("a wall")
    (mine / "text.txt").unlink()
    (mine / "text.txt").symlink_to(other / "text.txt")
    (mine / "deep").symlink_to(other / "deep")
    (other / "deep" / "back").symlink_to(mine)
    (mine / "same").symlink_to(mine / "sub")
    (mine / "twin.mp4").symlink_to("near.mp4")
    (mine / "twin.txt").write_text("a twin")
    clips, skipped = find_clips(mine)
    assert {clip.path.name for clip in clips} == {"near.mp4", "twin.mp4", "in.mp4"}
    reasons = {each.path.name: each.reason for each in skipped}
    assert all("--outside" in reasons[name] for name in ("far.mp4", "text.txt", "deep"))
    assert "text.mp4" in reasons
    clips, _ = find_clips(mine, outside=True)
    assert {clip.path.name for clip in clips} == {"near.mp4", "twin.mp4", "in.mp4", "far.mp4", "text.mp4", "deep.mp4"}
    assert {clip.caption for clip in clips if clip.path.name == "text.mp4"} == {"a secret"}

    names = [
        "../other/far.mp4",
        str(other / "far.mp4"),
        "far.mp4",
        "deep/deep.mp4",
        "sub/../near.mp4",
        str(mine / "near.mp4"),
    ]
    (mine / "manifest.jsonl").write_text("".join(f"{json.dumps({'video': n, 'caption': n})}\n" for n in names))
    for source in (mine, mine / "manifest.jsonl"):
        clips, skipped = find_clips(source)
        assert [clip.caption for clip in clips] == names[4:]
        assert sum("--outside" in each.reason for each in skipped) >= 4
        assert [clip.caption for clip in find_clips(source, outside=True)[0]] == names
    (mine / "manifest.jsonl").rename(other / "m.jsonl")
    (mine / "manifest.jsonl").symlink_to(other / "m.jsonl")
    with pytest.raises(ValueError, match=r"manifest\.jsonl: lies outside"):
        find_clips(mine)


def test_a_line_names_its_file_once() -> None:
    path = Path("clips/a.mp4")
    assert str(Skipped(path, f"{path}: is empty")) == str(Skipped(path, "is empty")) == "clips/a.mp4: is empty"
    assert str(Skipped(path, "\x1b[2J")) == "clips/a.mp4: \\x1b[2J"


def test_contents_are_read_side_by_side_and_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, together = [ClipFile(tmp_path / name, name) for name in "dcba"], Barrier(2, timeout=10)
    for clip in clips:
        clip.path.write_bytes(clip.caption.encode())
    clips[1].path.unlink()
    expected = {clip: json.dumps([clip.caption, *size_and_ends(clip.path)]) for clip in clips if clip != clips[1]}

    def read(path: Path) -> tuple[int, str]:
        together.wait()
        return size_and_ends(path)

    monkeypatch.setattr("rlvid.data.find.size_and_ends", read)
    contents, skipped = read_contents(clips)
    assert [*contents.items()] == [*expected.items()]
    assert skipped == [Skipped(clips[1].path, "cannot be read: No such file or directory")]
