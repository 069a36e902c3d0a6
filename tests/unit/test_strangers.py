"""An evaluation that somebody sent: whatever is wrong in its folder is one line."""

import json
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from evaluations import KEY, write_evaluation
from helpers import damaged_event
from pyarrow import parquet

from rlvid.evaluate.cache import identity_of, read_part
from rlvid.evaluate.results.about import read_about
from rlvid.evaluate.results.read import read_evaluation, read_results
from rlvid.evaluate.results.untrusted import read_table
from rlvid.evaluate.tables.pages import write_results
from rlvid.evaluate.tables.run_card import worse_prompts
from rlvid.report.write import write_report
from rlvid.runs.guard_log import warnings_of
from rlvid.runs.scalars import read_scalars
from rlvid.study.pairs import choose_pairs
from rlvid.study.videos import Videos
from rlvid.train.metrics import TensorBoard

SETS = {"s": ["a red square", "a blue square"]}


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_evaluation(tmp_path / "ev", sets=SETS, steps=(20,))


def about(folder: Path, **changes: Any) -> None:
    path = folder / "evaluation.yaml"
    content = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not ...}))


def table(path: Path, change: Callable[[list[dict[str, Any]]], Any], schema: pa.Schema | None = None) -> None:
    """Rewrites a Parquet file; None for a schema of its own from the changed rows."""
    found = parquet.read_table(path)
    rows = found.to_pylist()
    changed = change(rows)
    parquet.write_table(pa.Table.from_pylist(rows if changed is None else changed, schema), path)


def one_line(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        action()
    told = str(raised.value)
    assert len(told.splitlines()) == 1
    assert len(told) < 1500
    assert all(word in told for word in words), told


WRONG = {
    "fps of nothing": {"fps": 0}, "fps below": {"fps": -8.0}, "fps NaN": {"fps": math.nan}, "fps text": {"fps": "8"},
    "fps truth": {"fps": True}, "fps infinite": {"fps": math.inf}, "fps missing": {"fps": ...},
    "fps null": {"fps": None},
    "steps text": {"steps": ["20"]}, "steps truth": {"steps": [True]}, "steps huge": {"steps": [10**30]},
    "steps number": {"steps": 20}, "steps none": {"steps": []}, "copies": {"copies": 10**9},
    "copies text": {"copies": "1"},
    "models mapping": {"models": {"name": "base"}}, "models none": {"models": []},
    "models text": {"models": ["base"]},
    "no kind": {"models": [{"name": "base"}]}, "name a list": {"models": [{"name": ["a"], "kind": "base"}]},
    "name a control": {"models": [{"name": "a\x1b[2J", "kind": "base"}]},
    "name a number": {"models": [{"name": 3, "kind": "base"}]},
    "step text": {"models": [{"name": "a", "kind": "run", "step": "3"}]},
    "scale NaN": {"models": [{"name": "a", "kind": "run", "scale": math.nan}]},
    "path NUL": {"models": [{"name": "a", "kind": "run", "path": "a\0b"}]},
    "path long": {"models": [{"name": "a", "kind": "run", "path": "a" * 3000}]},
    "sets a list": {"sets": ["a"]}, "prompts text": {"sets": {"s": "a red square"}},
    "prompt null": {"sets": {"s": [None]}},
    "prompt long": {"sets": {"s": ["x" * 10**5]}}, "metrics": {"metrics": [1]}, "rewards": {"rewards": ["a"]},
    "complete": {"complete": "no"},
}  # fmt: skip
TEXTS = {
    "half": b"models: [{name", "latin": "models: [\xe4]".encode("latin-1"), "list": b"[1, 2]", "nothing": b"",
    "deep": b"[" * 5000, "date": b"created: 2026-99-99", "tag": b"!!python/object/apply:os.system ['true']",
    "surrogate": b'models: [{name: "\\ud800", kind: base}]', "zeros": b"\0" * 100,
}  # fmt: skip


@pytest.mark.parametrize("what", [*WRONG, *TEXTS])
def test_evaluation_yaml_is_checked_by_every_reader(folder: Path, what: str) -> None:
    if what in WRONG:
        about(folder, **WRONG[what])
    else:
        (folder / "evaluation.yaml").write_bytes(TEXTS[what])
    for reader in (read_evaluation, Videos):
        one_line(lambda reader=reader: reader(folder), "evaluation.yaml is damaged")


def test_further_keys_and_models_are_no_harm(folder: Path) -> None:
    about(folder, future={"a": [1, None]}, sets=SETS)
    assert read_about(folder).fps == 8
    assert read_evaluation(folder).about.fps == 8


CELLS: dict[str, tuple[str, Any]] = {
    "index text": ("index", "0"), "index null": ("index", None), "index number": ("index", 0.0),
    "model null": ("model", None), "model number": ("model", 3), "set list": ("set", ["s"]),
    "copy truth": ("copy", True),
    "reward text": ("reward", "0.5"), "reward truth": ("reward", True), "reward list": ("reward", [0.5]),
    "reward huge": ("reward", 1e300), "index beyond": ("index", 99), "index below": ("index", -1),
    "model other": ("model", "../../x"),
}  # fmt: skip


@pytest.mark.parametrize("what", CELLS)
def test_scores_are_checked(folder: Path, what: str) -> None:
    column, value = CELLS[what]
    every = (value is not None and not (isinstance(value, int | str) and column in ("index", "model"))) or what in (
        "index text", "model number",
    )  # fmt: skip
    path = folder / "evaluation.parquet"
    table(path, lambda rows: [row | {column: value} if every or at == 0 else row for at, row in enumerate(rows)])
    one_line(lambda: read_evaluation(folder), "evaluation.parquet", "damaged")


def test_scores_that_are_doubled_lacking_or_empty_are_told(folder: Path) -> None:
    path = folder / "evaluation.parquet"
    whole = path.read_bytes()
    for change in (lambda rows: rows[:-1], lambda rows: [*rows[:-1], rows[0]], lambda rows: rows + rows):
        table(path, change)
        one_line(lambda: read_evaluation(folder), "evaluation.parquet")
        path.write_bytes(whole)
    schema = parquet.read_schema(path)
    parquet.write_table(schema.empty_table(), path)
    one_line(lambda: read_evaluation(folder), "4 videos have no scores")
    assert "no pair of videos" in worse_prompts({}, SETS, "base", ["toy"])
    assert Videos(folder).scores() == {}


def test_the_name_of_a_folder_is_no_column(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "model=other", sets=SETS, steps=(20,))
    assert {name for name, _ in read_evaluation(folder).scores} == {"base", "toy"}


FRAMES: dict[str, tuple[list[Any], str]] = {
    "bomb": ([png(60_000, 60_000)] * 8, "pixels"), "large": ([png(9_000, 9_000)] * 8, "9000 x 9000 pixels"),
    "thin": ([png(1, 4_000)] * 8, "1 x 4000 pixels"), "none": ([png(0, 5)] * 8, "no whole PNG"),
    "cut": ([png(32, 32)] * 8, "no whole PNG"), "no png": ([b"GIF89a" + b"\0" * 99] * 8, "no whole PNG"),
    "empty": ([b""] * 8, "no whole PNG"), "null": ([None, png(32, 32)], "empty cell"),
    "numbers": ([1.5] * 8, "expected frames"),
    "text": (["a"] * 8, "expected frames"),
}  # fmt: skip


@pytest.mark.parametrize("what", FRAMES)
def test_frames_are_checked_by_every_reader(tmp_path: Path, folder: Path, what: str) -> None:
    frames, word = FRAMES[what]
    for part in (folder / "videos").glob("*.parquet"):
        table(part, lambda rows: [row | {"frames": frames} for row in rows])
    part = folder / "videos" / "part-00000.parquet"
    one_line(lambda: write_report([folder], tmp_path / "out"), word)
    one_line(lambda: read_part(part), word)
    assert not (tmp_path / "out").exists()

    def study() -> None:
        videos = Videos(folder)
        (pair, *_) = choose_pairs(videos, [], 1, 0, 0)
        videos.pixels(pair.first, pair.case)

    one_line(study, word)


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf, 1e30])
def test_frames_a_second_of_a_video_are_checked(folder: Path, fps: float) -> None:
    for part in (folder / "videos").glob("*.parquet"):
        table(part, lambda rows: [row | {"fps": fps} for row in rows])
    one_line(lambda: Videos(folder), "fps of")


def test_files_that_lead_elsewhere_are_not_followed(tmp_path: Path, folder: Path) -> None:
    for name in ("evaluation.yaml", "evaluation.parquet", "comparison.parquet", "videos/part-00000.parquet"):
        inner, outer = folder / name, tmp_path / "outside"
        os.replace(inner, outer)
        inner.symlink_to(outer)
        one_line(lambda: write_report([folder], tmp_path / "out"), name, "a link that leads out")
        os.unlink(inner)
        os.replace(outer, inner)
    (tmp_path / "link").symlink_to(folder)  # to the folder itself, as people have on a larger disk
    assert len(read_evaluation(tmp_path / "link").scores) == 4
    part = folder / "videos" / "part-00000.parquet"
    os.unlink(part)
    part.symlink_to("/dev/zero")
    one_line(lambda: Videos(folder), "part-00000.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 50, os.urandom(300)])
def test_what_is_no_parquet_is_told(folder: Path, content: bytes) -> None:
    for name in ("evaluation.parquet", "comparison.parquet"):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(content)
        one_line(lambda: read_evaluation(folder), name, "damaged")
        path.write_bytes(whole)
    part = folder / "videos" / "part-00000.parquet"
    part.write_bytes(content)
    for reader in (Videos, lambda _: read_part(part), lambda _: identity_of(part)):
        one_line(lambda reader=reader: reader(folder), "part-00000.parquet", "damaged")


def test_text_that_is_no_utf_8_and_doubled_columns_are_told(folder: Path) -> None:
    path = folder / "evaluation.parquet"
    found = parquet.read_table(path)
    buffers = pa.array([b"\xff\xfe"] * len(found), pa.binary()).buffers()
    wrong = pa.StringArray.from_buffers(len(found), buffers[1], buffers[2])
    parquet.write_table(found.set_column(0, "model", wrong), path)
    one_line(lambda: read_table(folder, path, KEY), "evaluation.parquet", "damaged")
    parquet.write_table(found.append_column("reward", found["reward"]), path)
    one_line(lambda: read_table(folder, path, KEY, metrics=True), "damaged")


def test_an_identity_never_becomes_the_name_of_a_file_elsewhere(folder: Path) -> None:
    part = folder / "videos" / "part-00000.parquet"
    for wrong in (b"../../../evil", b"\xff\xff", b"0123456789abcdeg", b"", b"x" * 16):
        found = parquet.read_table(part).replace_schema_metadata({b"rlvid.identity": wrong})
        parquet.write_table(found, part)
        assert identity_of(part) == ""


def test_results_in_json_are_checked(tmp_path: Path) -> None:
    from rows import row

    write_results(tmp_path, [row(m, index=i, reward=0.1 * i) for m in ("base", "a") for i in range(2)])
    path = tmp_path / "evaluation.json"
    whole = json.loads(path.read_text())
    assert len(read_results(path)[0]) == 2
    extra = json.loads(path.read_text())
    extra["summaries"][0]["mean"]["reward_new"] = 1.0  # and no deviation, nor in the other model
    path.write_text(json.dumps(extra))
    assert math.isnan(read_results(path)[0][1].mean["reward_new"])
    for change in (
        {"summaries": 3}, {"summaries": [3]}, {"summaries": [{}]}, {"facts": ["a"]}, {"comparisons": {"a": 1}},
        {"summaries": [whole["summaries"][0] | {"mean": {"reward": "0.5"}}]},
        {"summaries": [whole["summaries"][0] | {"count": True}]},
        {"comparisons": [whole["comparisons"][0] | {"pairs": -1}]},
    ):  # fmt: skip
        path.write_text(json.dumps(whole | change))
        one_line(lambda: read_results(path), "evaluation.json is damaged")
    for content in (b"", b"[", b"[" * 10**5, b"\xff", b"[1]", b'{"facts": ' + b"9" * 5000 + b"}"):
        path.write_bytes(content)
        one_line(lambda: read_results(path), "evaluation.json is damaged")


def test_damaged_events_and_looks_of_a_run_are_told(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0)
    for step in range(10):
        board.scalars(step, {"reward/trained": math.nan if step == 3 else float(step)})
    board.close()
    (path,) = tmp_path.glob("events*")
    whole = path.read_bytes()
    wanted = {"reward/trained": {step: float(step) for step in range(10) if step != 3}}
    assert read_scalars(tmp_path, lambda tag: tag.startswith("reward")) == wanted
    path.write_bytes(whole[:-20])
    assert len(read_scalars(tmp_path, lambda tag: True)["reward/trained"]) == 8
    for record in (damaged_event(), damaged_event(1 << 62)):
        path.write_bytes(whole + record)
        one_line(lambda: read_scalars(tmp_path, lambda tag: True), f"{path} is damaged")
    names = ("reward", "held_out", "consistency", "motion", "diversity")
    good = {"step": 0, "time": 0.0, "of": "x", "mean": {}, "values": {name: [0.5, None] for name in names}}
    for wrong in (
        {"step": "0"}, {"values": {"reward": [0.5]}}, {"values": good["values"] | {"reward": ["a", "b"]}},
        {"values": []}, {"values": good["values"] | {"motion": [0.5]}}, {"mean": {"reward": "x"}},
    ):  # fmt: skip
        (tmp_path / "guard.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | wrong) + "\n")
        one_line(lambda: warnings_of(tmp_path), "guard.jsonl is damaged")
    (tmp_path / "guard.jsonl").write_bytes(b"\xff\xfe")
    one_line(lambda: warnings_of(tmp_path), "guard.jsonl is damaged")
