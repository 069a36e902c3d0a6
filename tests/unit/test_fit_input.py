"""What `rlvid reward fit` refuses once it has seen the files: in one line, before Ray starts, and it leaves nothing."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlvid.cli import main

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Gives the one line of a refused fit to votes.jsonl, in a folder of images and videos that nobody opens."""
    for place in range(8):
        for ending in ("png", "mp4"):
            (tmp_path / f"{place}.{ending}").write_bytes(b"not opened")
    monkeypatch.chdir(tmp_path)

    def start(*arguments: Any) -> None:
        raise AssertionError("Ray starts")

    def fit(*arguments: str, table: str = "votes.jsonl") -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr("rlvid.fitting.launch.start_ray", start)
        monkeypatch.setattr(sys, "argv", ["rlvid", "reward", "fit", table, *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2, line
        assert line.startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return line

    return fit


def votes(count: int = 8, ending: str = "png", axes: tuple[str, ...] = ("quality",), prompts: int = 4) -> None:
    """Writes votes.jsonl."""
    rows = [
        {
            "prompt": f"a dog {place % prompts}", "a": f"{place}.{ending}", "b": f"{(place + 1) % 8}.{ending}",
            "preference": place % 2, "axis": axis,
        }
        for place in range(count)
        for axis in axes
    ]  # fmt: skip
    Path("votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("given", "arguments", "words"),
    [
        ({}, ["kind=video"], ["votes.jsonl: names images", "kind=image"]),
        ({"axes": ("motion", "quality")}, [], ["the axes motion, quality", "axes=[quality]", "kind=video"]),
        ({"axes": ("motion", "style")}, [], ["the axes motion, style", "axes=[motion]"]),
        ({}, ["axes=[motion]"], ["the axis 'motion' has 0 pairs", "4 are needed", "(axes: quality)"]),
        ({"count": 3, "ending": "mp4"}, ["kind=video"], ["the axis 'quality' has 3 pairs", "4 are needed"]),
        ({"prompts": 1}, [], ["votes.jsonl: all pairs have one prompt"]),
        ({}, [f"seed={2**31}"], ["seed"]),
        ({}, ["backbone.name=hpsv2", "backbone.path=~nobody-of-this-name/x.pt"], ["backbone.path", "home directory"]),
    ],
)
def test_votes_that_do_not_fit_the_settings_are_refused(
    refused: Refused, given: dict[str, Any], arguments: list[str], words: list[str]
) -> None:
    votes(**given)
    line = refused(*arguments)
    assert all(word in line for word in words), line


def write(rows: list[dict[str, Any]]) -> None:
    Path("votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(place: int, **others: Any) -> dict[str, Any]:
    return {
        "prompt": f"a dog {place % 4}", "a": f"{place % 8}.mp4", "b": f"{(place + 1) % 8}.mp4", "preference": place % 2,
    } | others  # fmt: skip


def test_a_table_that_cannot_be_read_is_named(refused: Refused) -> None:
    assert "PAIRS ~nobody-of-this-name/votes.csv" in refused(table="~nobody-of-this-name/votes.csv")


def test_what_was_left_out_is_said_where_too_little_is_left(refused: Refused) -> None:
    write([row(place) for place in range(3)] + [row(place, a=f"gone-{place}.mp4") for place in range(9)])
    line = refused("kind=video")
    assert "the axis 'quality' has 3 pairs" in line
    assert "; 9 votes were left out, the first: " in line
    assert "gone-0.mp4" in line
    write([row(4 * place) for place in range(2)] + [row(1, a=f"gone-{place}.mp4") for place in range(9)])
    assert "9 votes were left out" in refused("kind=video")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [row(place, axis="quality") for place in range(8)]
            + [row(0, a=f"{place}.mp4", b=f"{place + 2}.mp4", axis="text") for place in range(4)],
            ["the axis 'text' has 0 pairs", "prompts"],
        ),
        (
            [row(place, a_model="base" if place == 3 else "tuned", b_model="tuned") for place in range(8)],
            ["base = 'base': the pairs show 1 samples"],
        ),
        (  # one sample, in two pairs
            [row(4 * place, a="0.mp4", b=f"{place + 1}.mp4", a_model="base", b_model="tuned") for place in range(2)]
            + [row(place, a_model="x", b_model="tuned") for place in range(1, 8)],
            ["base = 'base': the pairs show 1 samples", "different ones"],
        ),
    ],
)
def test_a_split_or_unit_that_the_table_rules_out_is_refused(
    refused: Refused, rows: list[dict[str, Any]], words: list[str]
) -> None:
    write(rows)
    line = refused("kind=video")
    assert all(word in line for word in words), line


def test_a_backbone_that_is_no_model_is_refused(refused: Refused) -> None:
    votes()
    Path("clip.pt").write_bytes(b"no weights")
    line = refused("backbone.name=hpsv2", "backbone.path=clip.pt")
    assert "backbone.path = 'clip.pt'" in line
    assert "no checkpoint" in line


def test_nothing_that_is_there_is_written_over(refused: Refused) -> None:
    votes()
    for folder in ("mine", "other.unfinished"):
        Path(folder).mkdir()
        Path(folder, "letter.txt").write_text("dear")
    assert "mine: is there already" in refused("--out", "mine")
    assert "votes.jsonl: is there already" in refused("--out", "votes.jsonl")
    assert "other.unfinished: is in the way" in refused("--out", "other")
    Path("mine/report.json").write_text("{")
    assert "mine/report.json" in refused("--out", "mine")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("taken", "taken.unfinished is a file"),
        ("votes.jsonl/deep/reward", "votes.jsonl is a file"),
        ("a\0b", "no NUL character"),
        ("a" * 250, "File name too long"),
        ("~nobody-of-this-name/reward", "home directory"),
    ],
)
def test_a_place_where_no_folder_can_be_is_refused(refused: Refused, out: str, words: str) -> None:
    votes()
    Path("taken.unfinished").write_text("dear")
    line = refused("--out", out)
    assert line.startswith("error: --out ")
    assert words in line
    assert "; " in line, "a way out"
