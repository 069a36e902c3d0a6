"""The report of a fit: verdicts of scored rows, what they say in words, and the files beside a reward."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from rlvid.config.fit import BackboneConfig, FitConfig
from rlvid.data.clips import EncodedClips
from rlvid.data.find import Skipped
from rlvid.fitting.judge import Share, Verdict
from rlvid.fitting.pairs import Media, Pair, Vote
from rlvid.fitting.prepare import items, write_pairs
from rlvid.fitting.report import FitReport, judge_scores, show_report, write_report

AXES = ("quality", "motion")
SKIPPED = [Skipped(Path("x.png"), f"x{place}.png: cannot be read\x1b[2J") for place in range(6)]
MADE = {"rlvid": "1", "pairs": "abc"}


def pair(place: int, kind: str, quality: tuple[float, ...], motion: tuple[float, ...] = ()) -> Pair:
    votes = [Vote(axis, each, "", "") for axis, own in zip(AXES, (quality, motion), strict=True) for each in own]
    numbered = tuple(
        replace(vote, annotator=f"voter {number}", where=f"votes:{place}.{number}") for number, vote in enumerate(votes)
    )
    return Pair(f"prompt {place % 4}", Media(Path(f"{place}a.png")), Media(Path(f"{place}b.png")), kind, numbered)


PAIRS = [
    pair(0, "time", (1.0, 1.0, 0.0), (0.0,)),
    pair(1, "shape", (0.0, 0.0)),
    pair(2, "time", (1.0,), (1.0, 1.0)),
    pair(3, "shape", (0.5,), (1.0,)),
    pair(4, "time", (1.0, 1.0)),
    pair(5, "shape", (), (0.0,)),
]
"""Those of prompts 0 and 1 are held out: places 0, 1, 4 and 5."""
DIFFERENCES = [[2.0, 1.0], [-1.0, 9.0], [3.0, 1.0], [1.0, -1.0], [-0.5, 9.0], [9.0, -2.0]]


def rows(folder: Path) -> EncodedClips:
    """The rows of the pairs; their pixels play no part."""
    pixels = {"a": b"a", "b": b"b", "shape": [1, 1, 1, 1], "error": None}
    made = [item | pixels for item in items(PAIRS, AXES, {"prompt 0", "prompt 1"})]
    write_pairs([pa.Table.from_pylist(made)], folder, AXES, 1, 1)
    return EncodedClips.open(folder)


def report(verdicts: list[tuple[Verdict, Share]], **settings: Any) -> FitReport:
    count = len(verdicts)
    made = FitReport(
        AXES[:count], 6, SKIPPED, verdicts, [0.5] * count, [2.0] * count, 12, None, 3.5, FitConfig(kind="video"),
    )  # fmt: skip
    return replace(made, **settings)


def verdict(axis: str = "quality", **changes: Any) -> Verdict:
    found = Share(0.8, 0.7, 0.9, 50)
    made = Verdict(
        axis, found, {}, Share(0.85, 0.8, 0.9, 90), Share(0.75, 0.7, 0.8, 90), 0.5, 0.4, [(50, 0.7, 0.8)], 0.1
    )
    return replace(made, **changes)


def test_verdicts_are_of_held_out_pairs_and_of_the_votes_on_each_axis(tmp_path: Path) -> None:
    scored = dict(enumerate(DIFFERENCES))
    (quality, seen), (motion, also_seen) = judge_scores(rows(tmp_path / "pairs"), AXES, PAIRS, scored)
    assert (quality.axis, quality.accuracy.share, quality.accuracy.pairs) == ("quality", 2 / 3, 3)
    assert {kind: (each.share, each.pairs) for kind, each in quality.kinds.items()} == {
        "shape": (1.0, 1), "time": (0.5, 2),
    }  # fmt: skip
    assert (seen.share, seen.pairs) == (1.0, 1), "a tie has no majority"
    assert quality.voter is not None
    assert (quality.voter.share, quality.voter.pairs) == ((0.5 + 0.5 + 0 + 1 + 1 + 1 + 1) / 7, 7)
    assert (motion.accuracy.share, motion.accuracy.pairs, motion.voter) == (0.5, 2, None)
    assert (also_seen.share, also_seen.pairs) == (0.5, 2)
    expected = [math.log1p(math.exp(1.0)), math.log1p(math.exp(-2.0))]
    assert motion.log_loss == pytest.approx(sum(expected) / 2)


def test_votes_without_a_name_are_no_single_voters(tmp_path: Path) -> None:
    first = replace(PAIRS[0], votes=(replace(PAIRS[0].votes[0], annotator=None), *PAIRS[0].votes[1:]))
    found = judge_scores(rows(tmp_path / "pairs"), AXES, [first, *PAIRS[1:]], dict(enumerate(DIFFERENCES)))
    (quality, _), _ = found
    assert quality.voter is not None
    assert (quality.voter.share, quality.voter.pairs) == (1.0, 4), "of the votes on pairs 1 and 4"
    assert (quality.accuracy.share, quality.accuracy.pairs) == (2 / 3, 3), "the votes count"


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ({"layers": 0, "towers": "text"}, "fitted: the head alone."),
        ({"layers": 2}, "fitted: the last 2 groups of layers."),
        ({"towers": "text"}, "fitted: all weights of its text tower."),
    ],
)
def test_the_card_says_what_was_fitted_and_which_prompts_are_cut(
    tmp_path: Path, backbone: dict[str, Any], words: str
) -> None:
    config = FitConfig(kind="video", backbone=BackboneConfig(**backbone))
    write_report(tmp_path, report([(verdict(), Share(0.9, 0.8, 1.0, 99))], config=config, notes=["1 is cut"]), MADE)
    card = (tmp_path / "README.md").read_text()
    assert f"Begun with the CLIP of builtin; {words}" in card
    assert "- 1 is cut" in card
    assert json.loads((tmp_path / "report.json").read_text())["notes"] == ["1 is cut"]


def test_a_report_is_written_as_strict_json_a_card_and_a_picture(tmp_path: Path) -> None:
    found = judge_scores(rows(tmp_path / "pairs"), AXES, PAIRS, dict(enumerate(DIFFERENCES)))
    nobody = replace(found[1][1], share=math.nan, pairs=0)
    made = report([found[0], (found[1][0], nobody)], base="base", config=FitConfig(kind="video", steps=7))
    write_report(tmp_path, made, MADE)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    told = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert told["made_with"] == MADE
    assert told["pairs"] == 6
    assert [*told["axes"]] == [*AXES]
    assert told["axes"]["quality"]["held_out"]["accuracy"]["share"] == 2 / 3
    assert told["axes"]["quality"]["held_out"]["kinds"]["time"]["pairs"] == 2
    assert told["axes"]["motion"]["fitted"]["share"] is None
    assert told["base"] == {
        "model": "base", "samples": 12, "mean": {"quality": 0.5, "motion": 0.5},
        "deviation": {"quality": 2.0, "motion": 2.0},
    }  # fmt: skip
    assert len(told["left_out"]) == 6
    assert "x0.png: cannot be read" in told["left_out"][0]
    assert FitConfig.model_validate(told["settings"]).steps == 7
    card = (tmp_path / "README.md").read_text()
    assert made.grid().markdown() in card
    assert "6 pairs (quality, motion)" in card
    assert "6 votes or pairs were left out" in card
    assert "12 samples of the model base" in card
    with Image.open(tmp_path / "calibration.png") as picture:
        assert (picture.format, picture.width > 400) == ("PNG", True)
        assert len(picture.convert("L").getcolors() or [0] * 99) > 5, "something is drawn"


@pytest.mark.parametrize(
    ("backbone", "fitted"),
    [
        ({"name": "builtin"}, True),
        ({"name": "builtin", "path": "random"}, False),
        ({"name": "pickscore", "path": "gone"}, True),
        ({"name": "clip", "path": "plain"}, False),
        ({"name": "clip", "path": "earlier"}, True),
    ],
)
def test_the_card_says_that_a_fitted_backbone_may_have_seen_held_out_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: dict[str, str], fitted: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "earlier"):
        Path(name).mkdir()
    Path("earlier/reward.json").write_text("{}")
    made = report([(verdict(), Share(0.9, 0.8, 1.0, 99))], config=FitConfig(backbone=BackboneConfig(**backbone)))
    write_report(tmp_path, made, MADE)
    card = Path("README.md").read_text()
    assert "This fit did not see the held-out prompts." in card
    assert ("Its backbone is itself a fitted reward, and may have seen them." in card) == fitted


def test_the_table_has_a_row_for_each_axis_and_for_kinds_where_there_are_several() -> None:
    kinds = {"shape": Share(1.0, 0.5, 1.0, 3), "time": Share(0.25, 0.1, 0.6, 4)}
    one = verdict("motion", kinds={"time": Share(0.25, 0.1, 0.6, 4)}, voter=None, instead=None)
    made = report([(verdict(kinds=kinds), Share(0.95, 0.9, 1, 99)), (one, Share(math.nan, 0, 1, 0))])
    table = [[str(cell) for cell in row] for row in made.grid().rows]
    assert [row[0] for row in table] == ["quality", "quality: shape", "quality: time", "motion"]
    assert table[0][1:6] == ["50", "80 %", "70 % to 90 %", "85 %", "95 %"]
    assert table[2][1:4] == ["4", "25 %", "10 % to 60 %"]
    assert table[3][4:6] == ["-", "-"]


def test_words_say_a_coin_agreement_and_what_is_known_by_heart() -> None:
    good, seen = Share(0.8, 0.7, 0.85, 50), Share(0.9, 0.8, 1.0, 99)
    alone: dict[str, Any] = {"voter": None, "instead": None}
    (line,) = report([(verdict(accuracy=Share(0.6, 0.5, 0.85, 50), **alone), seen)]).words()
    assert "quality: it is not shown to be better than a coin on 50 held-out pairs" in line
    (line,) = report([(verdict(accuracy=good, **alone), seen)]).words()
    assert "80 % of 50 held-out pairs" in line
    (_, line) = report([(verdict(accuracy=good), seen)]).words()
    assert "a single voter agrees in 85 %, and the reward in 75 %" in line
    lines = report([(verdict(accuracy=good), replace(seen, share=1.0)), (verdict("motion", **alone), seen)]).words()
    assert [each.partition(":")[0] for each in lines] == ["quality", "quality", "quality", "motion"]
    assert all(words in lines[2] for words in ("100 %", "by heart", "backbone.layers"))


def test_a_terminal_shows_the_table_the_words_and_the_first_that_were_left_out() -> None:
    shown = io.StringIO()
    show_report(report([(verdict(), Share(0.9, 0.8, 1.0, 99))]), Console(file=shown, width=200))
    said = shown.getvalue()
    assert all(words in said for words in ("80 %", "70 % to 90 %", "6 votes or pairs were left out", "and 1 more"))
    assert "\x1b" not in said
    assert [f"x{place}.png" in said for place in range(6)] == [True] * 5 + [False]
