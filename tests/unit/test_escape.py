"""Text of others stays text in every table and picture: no link, no column, no formula of a spreadsheet or of LaTeX."""

import csv
import io
import math
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rows import row

from rlvid.escape import csv_text, latex_text, markdown_code, markdown_text
from rlvid.evaluate.results.pairwise import pairwise
from rlvid.evaluate.results.seeds import seed_results
from rlvid.evaluate.results.summary import compare_all, summarise
from rlvid.evaluate.tables.groups import write_pairwise, write_seeds
from rlvid.evaluate.tables.pages import gain_lines, markdown, render_table, write_results
from rlvid.evaluate.tables.paper import write_layouts
from rlvid.evaluate.tradeoff import draw_tradeoff
from rlvid.metric_names import MAIN
from rlvid.plots.curves import draw_rewards
from rlvid.plots.frames import font, shorten, wrap
from rlvid.plots.style import drawing, legend_label
from rlvid.terminal import console
from tuning.comparison import draw, table

HOSTILE = (
    "=HYPERLINK(\"http://x.org\",\"y\")", "+1+cmd|'/c calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1", " =1", "\u200b=1",
    "\uff1d1+1", "a;=1+1", "[x](http://x.org)", "![x](http://x.org/y.png)", "<img src=http://x.org>", "http://x.org",
    "www.x.org", "a | b", "[x]: http://x.org", "`x` *y* _z_ ~~w~~ &lt;", "- x", "1. x", "# x", "> x", "$x_{y$",
    r"\input{x} $\badcommand$", "_hidden", "a\nb", "[/red][bold]",
)  # fmt: skip
"""Labels, names of sets and prompts, as somebody may send them."""


def html(page: str) -> str:
    return str(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(page))


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    shown = html(f"| {markdown_text(text)} |\n|---|\n\n{markdown_text(text)}: z\n\n- {markdown_text(text)}\n\n[x]\n")
    assert set(re.findall(r"<(\w+)", shown)) == {"table", "thead", "tr", "th", "p", "ul", "li"}
    told = re.findall(r"<(?:th|p|li)>(.*?)</", shown)
    wanted = MarkdownIt().renderer.render([], MarkdownIt().options, {}) or " ".join(text.split())
    escaped = wanted.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    assert told == [escaped, f"{escaped}: z", escaped, "[x]"]


def test_what_github_makes_a_link_by_itself_is_broken_up() -> None:
    assert markdown_text("see https://x.org and www.x.org") == r"see https:\//x.org and www\.x.org"


def test_our_own_numbers_and_plain_names_are_not_escaped() -> None:
    for plain in ("+0.123 [0.110, 0.135] ± 0.010", "-0.300", "60% [40%, 80%]", "Draft_LV & 100 %", "toy@40 × 0.5"):
        assert markdown_text(plain) == plain
    assert markdown_text("[0.1, 0.2](http://x.org)") == r"\[0.1, 0.2\](http:\//x.org)"


@pytest.mark.parametrize("text", ["plain", "a`b", "``", "`", "a | b", "x\ny"])
def test_code_ends_where_it_should(text: str) -> None:
    shown = html(f"| {markdown_code(text)} |\n|---|\n")
    (code,) = re.findall("<code>(.*?)</code>", shown)
    assert code == " ".join(text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_spreadsheet_runs_no_text(text: str) -> None:
    line = csv_text([[text, "b"]])
    ((first, second),) = csv.reader(io.StringIO(line, newline=""))
    assert second == "b"
    assert first in (text, f"'{text}")
    assert not re.match(r"\W*[=+@\uff1d]|-[^\d.]|[\t\r\n]", first.removeprefix("\u200b")) or first.startswith("'")
    for separator in ";\t":  # as programs of another language take it
        ((cell, *_),) = csv.reader(io.StringIO(line, newline=""), delimiter=separator)
        assert cell.startswith(first)


def test_numbers_stay_numbers() -> None:
    line = csv_text([[-0.5, 3, "-0.5", "+1e-3", math.nan, None, -math.inf, True]])
    assert line == "-0.5,3,-0.5,+1e-3,,,-inf,True\n"


def test_control_characters_reach_no_table() -> None:
    for text in ("a\x1b[2Jb", "a\x00b", "a\ud800b", "a\u202eb"):
        assert not re.search("[\x00\x1b\ud800\u202e]", markdown_text(text) + latex_text(text))


@pytest.mark.parametrize("name", HOSTILE)
def test_every_table_and_picture_of_an_evaluation_takes_every_name(tmp_path: Path, name: str) -> None:
    rows = [
        row(model, name, 20, i, reward=0.1 * i + gain, held_out=0.2, consistency=0.9, motion=0.1)
        for model, gain in (("base", 0.0), (name, 0.1), ("last", 0.2)) for i in range(2)
    ]  # fmt: skip
    groups = {name: [name], "last": ["last"]}
    summaries, comparisons = summarise(rows), compare_all(rows)
    write_results(tmp_path, rows, facts={name: name})
    write_layouts(tmp_path, rows, "base", groups)
    write_pairwise(tmp_path, pairwise(rows, groups, "base"), groups)
    write_seeds(tmp_path, seed_results(rows, groups, "base"))
    for path in tmp_path.glob("*.md"):
        assert not re.search("<(?:a|img|b|code|em|strong>[^<]*http)", html(path.read_text(encoding="utf-8"))), path
    for path in tmp_path.glob("*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            for cell in (cell for line in csv.reader(file) for cell in line):
                assert not re.match(r"[=+@\t\r\n\uff1d]|-[^\d.]", cell), (path, cell)
    with console.capture():
        console.print(render_table(summaries, comparisons, steps=20))
    assert gain_lines(comparisons, 20)
    assert markdown(rows, summaries)


def test_every_picture_takes_every_name(tmp_path: Path) -> None:
    point = {"step": 0, "seconds": 1, "videos": 1, "mean": dict.fromkeys(MAIN, 0.5), "std": {"reward": 0.1}}
    names = [name for name in HOSTILE if "\uff1d" not in name]  # which the face of type lacks
    draw(point, {name: [[point]] for name in names}, tmp_path / "comparison.png")
    assert len(table(point, {name: [[point]] for name in names}).splitlines()) == 3 + len(names)
    rows = [row(model, name, 20, i, reward=0.1, held_out=0.2) for model in ("base", "a") for name in names
            for i in range(2)]  # fmt: skip
    draw_tradeoff(tmp_path / "tradeoff.png", summarise(rows), {"a": 1.0})
    for name in names:
        for line in (shorten(name, font(16), 400), *wrap(f"{name} {name}", font(16), 200, 2)):
            assert "\n" not in line
    draw_rewards(tmp_path / "curve.png", [1, 2], {r"$\bad$": [0.1, 0.2], "_b": [0.1, 0.2]}, y_label="$")


def test_a_long_text_is_drawn_at_once() -> None:
    assert shorten("x" * 10**6, font(16), 300).endswith("…")
    assert len(wrap("word " * 10**6, font(16), 300, 2)) == 2


def test_a_legend_names_what_begins_with_an_underscore() -> None:
    with drawing(10):
        axes = Figure().add_subplot()
        axes.plot([0], [0], label=legend_label("_hidden"))
        axes.plot([0], [0], label=legend_label("$shown$"))
        _, labels = axes.get_legend_handles_labels()
    assert [label.strip("\u200b") for label in labels] == ["_hidden", "$shown$"]
