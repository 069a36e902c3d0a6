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

    def fit(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr("rlvid.fitting.launch.start_ray", start)
        monkeypatch.setattr(sys, "argv", ["rlvid", "reward", "fit", "votes.jsonl", *arguments])
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
        ({"prompts": 1}, [], ["all pairs have one prompt"]),
    ],
)
def test_votes_that_do_not_fit_the_settings_are_refused(
    refused: Refused, given: dict[str, Any], arguments: list[str], words: list[str]
) -> None:
    votes(**given)
    line = refused(*arguments)
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
