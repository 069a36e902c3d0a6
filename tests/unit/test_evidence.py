"""From runs to evidence by the commands alone: evaluate over seeds, report, and a study of the same videos."""

from collections.abc import Callable
from pathlib import Path

import pytest
from evaluated_runs import another
from helpers import save_run
from pyarrow import parquet

from rlvid.study.pairs import choose_pairs
from rlvid.study.store import Store
from rlvid.study.videos import Videos


@pytest.mark.slow
def test_runs_become_tables_a_page_and_preferences(tmp_path: Path, rlvid: Callable[..., str]) -> None:
    run, _ = save_run(tmp_path)
    runs = [run, another(run, "run1", seed=1), another(run, "ddpo", method={"name": "ddpo"})]
    (tmp_path / "own.txt").write_text("".join(f"a dog number {number}\n" for number in range(6)))
    (tmp_path / "few.txt").write_text("a red circle\n")
    out = tmp_path / "evidence"
    sets = f"{tmp_path / 'own.txt'},{tmp_path / 'few.txt'}"
    told = rlvid("evaluate", *runs, "--group-seeds", "--sets", sets, "--steps", "2,3", "--out", out)
    assert "4 models (base, run, run1, ddpo), 56 videos" in told
    page = (out / "table-a1.md").read_text().splitlines()
    assert page[0] == "| Model | own, D = 2 | own, D = 3 | few, D = 2 | few, D = 3 |"
    assert [line.split(" | ")[0].strip("| ") for line in page[2:5]] == ["base", "instructvideo (2 seeds)", "ddpo"]
    assert "| instructvideo (2 seeds) | ddpo |" in (out / "versus.md").read_text()
    assert (out / "seeds.md").is_file()

    again = rlvid("evaluate", runs[0], "--sets", sets, "--steps", "2,3", "--out", out)
    assert "28 of 28 videos" in again
    assert not any((out / name).exists() for name in ("seeds.md", "versus.md"))
    rlvid("evaluate", *runs, "--group-seeds", "--sets", sets, "--steps", "2,3", "--out", out)

    told = rlvid("report", out, "--moving", "0")
    assert "56 videos" in told
    report = (out / "report" / "index.html").read_text()
    assert "instructvideo (2 seeds)" in report
    assert str(tmp_path) not in report

    videos = Videos(out)
    store = Store.begin(out / "study.sqlite", out, 0, videos.models, choose_pairs(videos, ["run", "ddpo"], 5, 0, 0))
    for pair in store.study().pairs:
        store.save(0, "ada", pair.number, {"quality": "left", "alignment": "tie"})
    told = rlvid("study", "results", out)
    assert "CLIPSIM" in told or "clipsim" in told
    rlvid("study", "export", out, "--out", tmp_path / "pairs.parquet")
    assert parquet.read_table(tmp_path / "pairs.parquet").num_rows == 5 * 2  # both axes, ties too
