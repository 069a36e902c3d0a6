"""Preference pairs: what is read of a manifest or an export, how votes are pooled, and what is left out by name."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlvid.data.pairs import PAIRS
from rlvid.fitting.pairs import Media, Pair
from rlvid.fitting.read import check_enough, read_pairs

NAMES = ("axis", "annotator", "kind", "a_model", "b_model")
FILES = ("x.png", "y.png", "z.png", "w.mp4", "v.mp4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_bytes(b"there")
    return tmp_path


def manifest(folder: Path, rows: Sequence[dict[str, Any]], ending: str = ".jsonl") -> Path:
    path = folder / f"pairs{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        delimiter = "," if ending == ".csv" else "\t"
        lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
        path.write_text("".join(delimiter.join(cells) + "\n" for cells in lines))
    return path


def row(a: str = "x.png", b: str = "y.png", preference: object = 1.0, prompt: object = "a dog", **more: object) -> Any:
    return {"prompt": prompt, "a": a, "b": b, "preference": preference, **more}


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_all_formats_are_read_alike_and_votes_are_pooled(folder: Path, ending: str) -> None:
    rows = [
        row(axis="quality", annotator="ada"),
        row("y.png", "x.png", 1.0, axis="quality", annotator="ben"),  # the other way round: for y
        row(preference=0.5, axis="motion", annotator="ada"),
        row("x.png", "z.png", 0.25, axis="quality", annotator="ada"),
    ]
    pairs, skipped = read_pairs(manifest(folder, rows, ending))
    assert skipped == []
    assert [(pair.a.path.name, pair.b.path.name, len(pair.votes)) for pair in pairs] == [
        ("x.png", "y.png", 3), ("x.png", "z.png", 1),
    ]  # fmt: skip
    assert pairs[0].preference("quality") == 0.5
    assert pairs[0].preference("motion") == 0.5
    assert pairs[1].preference("quality") == 0.25
    assert math.isnan(pairs[1].preference("motion"))


def test_axis_annotator_and_kind_may_be_missing(folder: Path) -> None:
    (pair,), skipped = read_pairs(manifest(folder, [row(), row()]))
    assert (pair.axes, pair.kind, len(pair.votes), skipped) == ({"quality"}, "", 2, [])
    (pair,), skipped = read_pairs(manifest(folder, [row(axis="", annotator="")], ".csv"))
    assert (pair.axes, pair.votes[0].annotator, skipped) == ({"quality"}, None, [])
    (pair,), skipped = read_pairs(manifest(folder, [row(annotator=0), row(annotator=0)]))
    assert (len(pair.votes), len(skipped)) == (1, 1), "0 is a name"
    (pair,), _ = read_pairs(manifest(folder, [row(kind="structure")]))
    assert pair.kind == "structure"
    (pair,), _ = read_pairs(manifest(folder, [row(axis=" the\nmotion", kind=0, a_model="\u200b")]))
    assert (pair.axes, pair.kind, pair.models) == ({"the motion"}, "0", ("", "")), "a line each, or nothing"


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_all_rows_have_an_axis_or_none_has(folder: Path, ending: str) -> None:
    missing = "" if ending in (".csv", ".tsv") else None
    rows = [row(axis=missing), row("x.png", "z.png", axis="motion"), row("y.png", "z.png", axis=missing)]
    (pair,), skipped = read_pairs(manifest(folder, rows, ending))
    assert pair.axes == {"motion"}
    assert ["its axis is empty, and other rows have one" in str(each) for each in skipped] == [True, True]


def test_the_models_of_a_pair_are_those_of_the_first_row_that_names_them(folder: Path) -> None:
    rows = [
        row(annotator="ada"),
        row("y.png", "x.png", annotator="ben", a_model="tuned"),
        row(annotator="cas", a_model="base", b_model="other"),
    ]
    (pair,), _ = read_pairs(manifest(folder, rows))
    assert pair.models == ("base", "tuned"), "turned to the order of the first row"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row("gone.png"), ["pairs.jsonl:2", "a = gone.png", "no such file"]),
        (row("x.txt"), ["a = x.txt", "not a video or image (allowed: .mp4"]),
        (row("https://host/x.png"), ["an address"]),
        (row("../x.png"), ["lies outside"]),
        (row("x.png", "x.png"), ["both sides are", "x.png"]),
        (row("x.png", "./x.png"), ["both sides are", "x.png"]),
        (row("x.png", "w.mp4"), ["one side is an image"]),
        (row(preference=1.5), ["preference = 1.5", "0.5 for a tie"]),
        (row(preference=None), ["preference = None"]),
        (row(preference=math.nan), ["preference = nan"]),
        (row(preference="better"), ["preference = 'better'"]),
        (row(preference=True), ["preference = True"]),
        (row(preference=10**400), ["preference = 1000"]),
        (row(preference=[1]), ["preference = [1]"]),
        (row(prompt=""), ["pairs.jsonl:2"]),
        (row(prompt=None), ["pairs.jsonl:2"]),
        (row(axis=" "), ["its axis is empty"]),
        ({"prompt": "a dog", "a": "x.png", "preference": 1}, ["names no file for b"]),
        *((row(**{"axis": "quality", name: "\ud83d"}), [f"jsonl:2: its {name} has U+D83D, half"]) for name in NAMES),
        *((row(**{"axis": "quality", name: "\x1b[2J"}), [f"its {name} has the control character"]) for name in NAMES),
        *((row(**{"axis": "quality", name: {"k": 1}}), [f"its {name} is {{'k': 1}}; it must be a"]) for name in NAMES),
        (row(axis=True), ["its axis is True"]),
    ],
)
def test_a_vote_that_cannot_be_used_is_left_out_and_named(folder: Path, bad: dict[str, Any], words: list[str]) -> None:
    pairs, (skipped,) = read_pairs(manifest(folder, [row("y.png", "z.png", axis="quality"), bad]))
    assert len(pairs) == 1
    assert "\n" not in str(skipped)
    assert all(word in str(skipped) for word in words), str(skipped)


def test_contradictions_are_left_out_and_each_vote_is_named(folder: Path) -> None:
    rows = [
        row(annotator="ada"), row("y.png", "x.png", annotator="ada"), row(annotator="ben"), row(annotator="ben"),
        row("y.png", "z.png"), row("y.png", "z.png", prompt="a cat"), row("z.png", "y.png", prompt="a cow"),
        row(annotator="ada", preference=0.5),
    ]  # fmt: skip
    (pair,), skipped = read_pairs(manifest(folder, rows))
    assert [(vote.annotator, vote.preference) for vote in pair.votes] == [("ben", 1.0)]
    named = {str(each).removeprefix(f"{folder}/pairs.jsonl:")[0] for each in skipped}
    assert (len(skipped), named) == (len(rows) - 1, {*"1245678"}), "all but the vote that counts"
    found = "\n".join(map(str, skipped))
    assert "jsonl:1 and " in found
    assert "one person gives two answers on quality; neither counts" in found
    assert "jsonl:4: repeats" in found
    assert "the same pair has two prompts" in found


def test_files_that_are_no_pairs_are_refused(folder: Path) -> None:
    for path in (folder / "gone.csv", folder / "x.png"):
        with pytest.raises(ValueError, match="no such file of preference pairs"):
            read_pairs(path)
    for rows, ending, words in (
        ([row(), row("w.mp4", "v.mp4")], ".jsonl", "jsonl:1 names images and .*jsonl:2 videos; give them in two files"),
        ([{"prompt": "a dog", "a": "x.png"}], ".jsonl", "lacks 'b' and 'preference'"),
        ([row("gone.png")], ".jsonl", "no preference pair that can be used; the first reason: .*gone.png"),
        ([row(a=b"x")], ".parquet", "column 'a' is of type binary; it must hold text"),
    ):
        with pytest.raises(ValueError, match=words):
            read_pairs(manifest(folder, rows, ending))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_voters_kinds_and_models_may_be_numbers(folder: Path, ending: str) -> None:
    rows = [row(annotator=7, kind=1, a_model=0), row(annotator=7, kind=1, a_model=0)]
    (pair,), skipped = read_pairs(manifest(folder, rows, ending))
    assert (pair.votes[0].annotator, pair.kind, pair.models) == ("7", "1", ("0", ""))
    assert ["repeats" in str(each) for each in skipped] == [True]
    (pair,), skipped = read_pairs(manifest(folder, [row(annotator=math.nan), row(annotator=math.nan)], ending))
    assert ([vote.annotator for vote in pair.votes], skipped) == ([None, None], [])


def test_a_voter_of_another_type_is_refused_in_a_parquet_file(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'annotator' is of type bool; it must hold numbers or text"):
        read_pairs(manifest(folder, [row(annotator=True)], ".parquet"))


def export(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    case = {"set": "in_domain", "steps": 20, "copy": 0, "fps": 8.0, "a_model": "base", "b_model": "tuned"}
    path = folder / "export.parquet"
    made = [{"a": [b"1"], "b": [b"2"], "axis": "quality", "annotator": "ada", **case, **each} for each in rows]
    parquet.write_table(pa.Table.from_pylist(made, PAIRS), path)
    return path


def test_an_export_is_read_without_its_frames(folder: Path) -> None:
    path = export(
        folder,
        [
            {"prompt": "a dog", "index": 0, "preference": 1.0},
            {"prompt": "a dog", "index": 0, "preference": 0.5, "annotator": "ben"},
            {
                "prompt": "a dog",
                "index": 0,
                "preference": 1.0,
                "annotator": "cas",
                "a_model": "tuned",
                "b_model": "base",
            },
            {"prompt": "a cat", "index": 1, "preference": 0.0, "axis": "alignment"},
            {"prompt": "a cat", "index": 1, "preference": 2.0},
            {"prompt": "a cow", "index": 2, "preference": 1.0, "b_model": "base"},
        ],
    )
    pairs, skipped = read_pairs(path)
    dog = Pair("a dog", Media(path, 0, "a"), Media(path, 0, "b"), "", pairs[0].votes, ("base", "tuned"))
    assert pairs[0] == dog
    assert pairs[0].preference("quality") == 0.5, "cas prefers the other one"
    assert (pairs[1].a, pairs[1].axes) == (Media(path, 3, "a"), {"alignment"})
    assert str(pairs[1].a).endswith("export.parquet: row 4, a")
    assert ["preference = 2.0" in str(skipped[0]), "both sides are of the model" in str(skipped[1])] == [True, True]
    assert len(skipped) == 2
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("set", pa.list_(pa.string()), "it must hold text"),
        ("a_model", pa.struct([("k", pa.string())]), "it must hold text"),
        ("steps", pa.string(), "it must hold numbers"),
        ("preference", pa.bool_(), "it must hold numbers"),
        ("b", pa.list_(pa.int64()), "it must hold lists of bytes"),
    ],
)
def test_an_export_with_a_column_of_another_type_is_refused(
    folder: Path, name: str, kind: pa.DataType, words: str
) -> None:
    path = export(folder, [{"prompt": "a dog", "index": 0, "preference": 1.0}])
    table = parquet.read_table(path)
    place = table.schema.get_field_index(name)
    parquet.write_table(table.set_column(place, name, pa.nulls(1, kind)), path)
    with pytest.raises(ValueError, match=rf"export\.parquet: column '{name}' is of type .*; {words}"):
        read_pairs(path)


def test_an_export_may_be_written_anew_with_wider_types(folder: Path) -> None:
    path = export(folder, [{"prompt": "a dog", "index": 0, "preference": 1.0, "annotator": None}])
    wide = {pa.string(): pa.large_string(), pa.list_(pa.binary()): pa.large_list(pa.large_binary())}
    wide |= {pa.int32(): pa.int64(), pa.float32(): pa.float64()}
    table = parquet.read_table(path)
    table = table.cast(pa.schema([(each.name, wide[each.type]) for each in PAIRS]))
    table = table.set_column(table.schema.get_field_index("annotator"), "annotator", pa.nulls(1))
    place = table.schema.get_field_index("set")
    parquet.write_table(table.set_column(place, "set", table["set"].dictionary_encode()), path)
    (pair,), skipped = read_pairs(path)
    assert (pair.prompt, pair.votes[0].annotator, skipped) == ("a dog", None, [])


def test_all_rows_of_all_exports_have_an_axis_or_none_has(folder: Path) -> None:
    def votes(axis: str | None) -> list[dict[str, Any]]:
        return [{"prompt": "a dog", "index": index, "preference": 1.0, "axis": axis} for index in range(2)]

    place = folder / "rounds.parquet"
    place.mkdir()
    export(folder, votes(None)).rename(place / "round-0.parquet")
    pairs, skipped = read_pairs(place)
    assert ([pair.axes for pair in pairs], skipped) == ([{"quality"}] * 2, [])
    export(folder, votes("motion")).rename(place / "round-1.parquet")
    pairs, skipped = read_pairs(place)
    assert [pair.axes for pair in pairs] == [{"motion"}] * 2
    assert [str(each).endswith("its axis is empty, and other rows have one") for each in skipped] == [True, True]


def test_a_folder_of_exports_is_one_table_whose_files_share_no_pair(folder: Path) -> None:
    place = folder / "rounds.parquet"
    place.mkdir()
    for number, prompt in enumerate(("a dog", "a cat")):
        rows = [{"prompt": prompt, "index": index, "preference": 1.0} for index in range(number + 1)]
        export(folder, rows).rename(place / f"round-{number}.parquet")
    pairs, skipped = read_pairs(place)
    found = [(pair.prompt, pair.a) for pair in pairs]
    assert found == [
        ("a dog", Media(place / "round-0.parquet", 0, "a")),
        ("a cat", Media(place / "round-1.parquet", 0, "a")),
        ("a cat", Media(place / "round-1.parquet", 1, "a")),
    ]
    assert skipped == []
    whole = (place / "round-1.parquet").read_bytes()
    (place / "round-1.parquet").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"round-1\.parquet: is not a Parquet file, or a damaged one"):
        read_pairs(place)


def test_an_axis_with_too_few_pairs_is_refused(folder: Path) -> None:
    pairs, _ = read_pairs(manifest(folder, [row(axis="quality"), row("x.png", "z.png", axis="quality"), row(axis="m")]))
    check_enough(pairs, ["quality"], 2, "votes")
    with pytest.raises(ValueError, match=r"votes: the axis 'm' has 1 pairs .* 2 are needed \(axes: m, quality\)"):
        check_enough(pairs, ["quality", "m"], 2, "votes")
