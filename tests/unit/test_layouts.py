"""The paper's tables, with runs of several seeds as a row, and every two rows against each other."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from rows import models_of_the_paper, row

from rlvid.evaluate.results.pairwise import Pairwise, pairwise
from rlvid.evaluate.results.rows import Row, pooled
from rlvid.evaluate.tables.groups import write_pairwise
from rlvid.evaluate.tables.paper import paper_table, write_layouts
from rlvid.evaluate.tables.table import Cell
from rlvid.metric_names import metric_of

OTHER = "Draft_LV & 100 %"


def test_the_layouts_of_the_paper(tmp_path: Path) -> None:
    rows = models_of_the_paper()
    table = paper_table("table-a1", rows, "base")
    head = " | in domain, D = 20 | in domain, D = 50 | scenes, D = 20 | scenes, D = 50 |"
    assert table.grid().markdown().splitlines() == [
        "| Model" + head,
        "| --- | ---: | ---: | ---: | ---: |",
        "| base |" + " 0.300 ± 0.100 |" * 4,
        f"| {OTHER} |" + " **0.400 ± 0.100** |" * 4,
    ]
    assert table.gain_grid().markdown().splitlines() == [
        "| Over the base" + head,
        "| --- | ---: | ---: | ---: | ---: |",
        f"| {OTHER} |" + " +0.100 [0.100, 0.100] |" * 4,
    ]
    lines = paper_table("table-a2", rows, "base").grid().markdown().splitlines()
    metrics = ("Reward", "CLIPSIM", "Temporal consistency", "Motion")
    assert lines[0] == "| Model | " + " | ".join(f"all prompts, D = {d}, {m}" for d in (20, 50) for m in metrics) + " |"
    # Equal consistency: neither is best; more motion is not better.
    assert lines[2] == "| base |" + " 0.300 | **0.300** | 0.900 | 0.100 |" * 2
    (first, second) = csv.DictReader(io.StringIO(table.csv()))
    assert float(second["scenes_d50_reward_mean"]) == pytest.approx(0.4)
    assert float(first["in_domain_d20_reward_std"]) == pytest.approx(0.1)
    assert (first["scenes_d20_reward_low"], float(second["scenes_d20_reward_low"])) == ("", pytest.approx(0.1))
    assert len(write_layouts(tmp_path, rows, "base")) == 6
    page = (tmp_path / "table-a2.tex").read_text()
    assert r" & \multicolumn{4}{c}{all prompts, D = 20} & " in page
    assert r"\cmidrule(lr){2-5}\cmidrule(lr){6-9}" in page
    assert r"Draft\_LV \& 100 \% & \textbf{0.400} & 0.200 & 0.900 & 0.100 & " in page
    assert page.count(r"\begin{tabular}") == 2
    broken = [row(r.model, r.set, r.steps, r.index) if (r.set, r.steps) == ("scenes", 50) else r for r in rows]
    assert paper_table("table-a1", broken, "base").grid().rows[0][-1] == Cell("–")
    assert paper_table("table-a1", broken, "base").gain_grid().rows[0][-1] == Cell("–")


def seeds() -> tuple[list[Row], dict[str, list[str]]]:
    """Two methods of two seeds and a third of one; prompts of two sets, whose indices begin at 0 in both."""
    levels = {"base": 0.0, "a0": 0.2, "a1": 0.4, "b0": 0.1, "b1": 0.3, "c": 0.9}
    rows = [
        row(model, name, 20, i, reward=level * (1 + i + 2 * (name == "scenes")), consistency=0.9 - level)
        for model, level in levels.items()
        for name in ("in_domain", "scenes")
        for i in range(2)
    ]
    return rows, {"A (2 seeds)": ["a0", "a1"], "B (2 seeds)": ["b0", "b1"], "C": ["c"]}


def test_a_row_of_a_table_has_the_videos_of_all_seeds(tmp_path: Path) -> None:
    rows, groups = seeds()
    table = paper_table("table-a1", rows, "base", groups)
    assert table.rows == ("base", *groups)
    assert [row[0].text for row in table.grid().rows] == ["base", *groups]
    videos = [0.2, 0.4, 0.4, 0.8]  # of both seeds, in domain
    assert table.grid().rows[1][1].text == f"{np.mean(videos):.3f} ± {np.std(videos, ddof=1):.3f}"
    # A prompt is drawn with its videos of both seeds: the gains of the two prompts are 0.3 and 0.6.
    assert table.gain_grid().rows[0][1].text == "+0.450 [0.300, 0.600]"
    everything = paper_table("table-a2", rows, "base", groups)
    # Pooled, the four prompts stay four: were those of one index taken for one prompt, only 0.6 and 0.9 would be drawn.
    gain = everything.gains["A (2 seeds)", ("all_prompts", 20, "reward")]
    assert gain.difference == pytest.approx(0.75)
    assert (gain.low, gain.high) == (pytest.approx(0.3, abs=0.16), pytest.approx(1.2, abs=0.16))
    assert gain.low < 0.6
    write_layouts(tmp_path, rows, "base", groups)
    assert "a row has the videos of all seeds" in (tmp_path / "table-a1.md").read_text()


def test_one_prompt_set_keeps_its_name_where_it_is_all_there_is() -> None:
    rows = [each for each in models_of_the_paper() if each.set == "scenes"]
    assert pooled(rows) == rows
    assert paper_table("table-a2", rows, "base").places[0][0] == "scenes"


def test_every_two_rows_are_compared_by_prompts_and_by_seeds(tmp_path: Path) -> None:
    rows, groups = seeds()
    found = pairwise(pooled(rows), groups, "base")
    by_pair = {(v.first, v.second): v for v in found if v.metric == "reward"}
    assert set(by_pair) == {
        ("A (2 seeds)", "base"), ("B (2 seeds)", "base"), ("C", "base"), ("A (2 seeds)", "B (2 seeds)"),
        ("C", "A (2 seeds)"), ("C", "B (2 seeds)"),
    }  # fmt: skip
    # Means of a seed over the four prompts, which weigh 1 to 4: 2.5 times its level.
    two = by_pair["A (2 seeds)", "B (2 seeds)"]
    assert two.difference == pytest.approx(0.25)
    variance = 2 * np.var([0.5, 1.0], ddof=1) / 2
    assert two.half_width == pytest.approx(4.303 * math.sqrt(variance), rel=1e-4)  # two degrees of freedom
    assert two.low > 0
    assert not two.significant
    one = by_pair["A (2 seeds)", "base"]
    assert one.half_width == pytest.approx(12.706 * np.std([0.5, 1.0], ddof=1) / math.sqrt(2), rel=1e-4)
    lone = by_pair["C", "base"]
    assert math.isnan(lone.half_width)
    assert not lone.significant  # four prompts are too few
    assert (lone.videos, lone.prompts) == (4, 4)
    other = next(v for v in found if v.metric == "consistency" and {v.first, v.second} == {"A (2 seeds)", "base"})
    assert (other.first, other.difference) == ("base", pytest.approx(0.3))
    write_pairwise(tmp_path, found, groups)
    page = (tmp_path / "versus.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("| A (2 seeds) | base |"))
    assert f"| +0.750 [{one.low:.3f}, {one.high:.3f}] ± {one.half_width:.3f} | -0.300 [-0.300, -0.300] ± " in line
    assert "± half of Welch's" in page
    lines = list(csv.DictReader(io.StringIO((tmp_path / "versus.csv").read_text())))
    assert (len(lines), lines[0]["metric"]) == (12, "reward")


def test_a_video_counts_where_both_rows_have_a_score_of_it() -> None:
    """And what is broken in a third row is no concern of theirs."""
    rows = [row("base", index=i, reward=0.0) for i in range(3)]
    rows += [row("a", index=i, reward=math.nan if i == 2 else 1.0) for i in range(3)]
    rows += [row("b", index=i, reward=3.0 if i == 2 else 0.5) for i in range(3)]
    rows += [row("broken", index=i) for i in range(3)]
    found = {(v.first, v.second): v for v in pairwise(rows, {name: [name] for name in ("a", "b", "broken")}, "base")}
    assert set(found) == {("a", "b"), ("a", "base"), ("b", "base")}
    assert found["a", "b"].difference == pytest.approx(0.5)  # b's best video has no counterpart
    assert found["b", "base"].difference == pytest.approx(4 / 3)
    assert (found["a", "b"].videos, found["b", "base"].videos) == (2, 3)


def test_a_row_says_which_seeds_it_lacks(tmp_path: Path) -> None:
    rows = [row(name, index=i, reward=1.0 + i) for name in ("base", "a0") for i in range(2)]
    rows += [row("a1", index=i) for i in range(2)]
    write_layouts(tmp_path, rows, "base", {"A (2 seeds)": ["a0", "a1"]})
    page = (tmp_path / "table-a1.md").read_text()
    assert "- A (2 seeds): Reward, in domain, D = 20: 1 of 2 seeds have a finite score" in page
    assert (tmp_path / "table-a2.md").read_text().splitlines()[0] == "| Model | in domain, D = 20, Reward |"


def test_what_rounds_to_nothing_has_no_minus() -> None:
    assert metric_of("reward").gain(-0.0004, -0.0003, 0.007) == "+0.000 [0.000, 0.007]"
    assert [metric_of("reward").gain(0.1, math.nan, math.nan), metric_of("reward").gain(math.nan, 0, 0)] == [
        "+0.100",
        "–",
    ]


def test_a_difference_without_a_bound_or_over_few_prompts_is_not_sure() -> None:
    def sure(difference: float, low: float, high: float, half: float, prompts: int = 6) -> bool:
        return Pairwise("a", "b", 20, "reward", 9, prompts, difference, low, high, half).significant

    assert sure(1.0, 0.5, 1.5, 0.7)
    assert sure(-1.0, -2.0, -0.1, math.nan)
    assert not sure(1.0, 0.5, 1.5, 0.7, prompts=5)
    assert not sure(1.0, 0.5, 1.5, 1.1)
    assert not sure(1.0, -0.1, 2.0, 0.5)
    assert not sure(1.0, math.nan, math.nan, math.nan)
