"""What metrics are called in a study's results."""

import json
from pathlib import Path

import pytest
import yaml
from pyarrow import parquet
from studies import begin, one_line, rlvid
from watched import make_evaluation

from rlvid.evaluate.results.rows import METRICS
from rlvid.study.pairs import AXES
from rlvid.study.results import title_of


def results_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **described: object) -> tuple[str, dict[str, str]]:
    """The page of results, and the title of each metric, where evaluation.yaml also says ``described``."""
    file = folder / "evaluation.yaml"
    about = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(about | described), encoding="utf-8")
    assert rlvid(monkeypatch, "results", str(folder)) == 0
    written = json.loads((folder / "study-results.json").read_text(encoding="utf-8"))
    page = (folder / "study-results.md").read_text(encoding="utf-8")
    return page, {each["metric"]: each["title"] for each in written["metrics"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An evaluation with several metrics, and a study of it with an answer."""
    folder = make_evaluation(tmp_path / "evaluation")
    path = folder / "evaluation.parquet"
    table = parquet.read_table(path)
    for metric in ("held_out", "oracle_score", "reward_pick"):
        table = table.append_column(metric, table["reward"])
    parquet.write_table(table, path)
    begin(folder).save(0, "ada", 0, dict.fromkeys(AXES, "left"))
    return folder


def test_rewards_are_named_where_the_evaluation_names_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, titles = results_of(folder, monkeypatch, rewards={"reward": "hpsv2", "held_out": "clip|own"})
    assert titles == {
        "reward": "Reward (hpsv2)", "motion": "Motion", "held_out": "Held-out reward (clip|own)",
        "oracle_score": "Oracle score", "reward_pick": "Reward pick",
    }  # fmt: skip
    assert "| Reward (hpsv2) |" in page
    assert "| Held-out reward (clip\\|own) |" in page
    assert "Reward (hpsv2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "described", [{}, {"rewards": None}, {"rewards": {"reward": None, "held_out": None}}, {"rewards": {}}]
)
def test_without_names_there_are_titles_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, described: dict[str, object]
) -> None:
    page, titles = results_of(folder, monkeypatch, **described)
    assert (titles["reward"], titles["held_out"]) == ("Reward", "Held-out reward")
    assert "| Reward |" in page
    assert not any(key in page for key in ("held_out", "oracle_score", "reward_pick"))


def test_rewards_that_are_no_mapping_are_a_mistake(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results_of(folder, monkeypatch)
    file = folder / "evaluation.yaml"
    file.write_text(file.read_text(encoding="utf-8") + "rewards: [hpsv2]\n", encoding="utf-8")
    capsys.readouterr()
    assert rlvid(monkeypatch, "results", str(folder), "--evaluation", str(folder)) == 2
    one_line(capsys, ["evaluation.yaml is damaged", "rewards"])


def test_every_metric_has_a_title_of_its_own() -> None:
    titles = [title_of(metric, {}) for metric in METRICS]
    assert len(set(titles)) == len(METRICS)
    assert not any("_" in title or "…" in title for title in titles)
    assert title_of("consistency_all_pairs", {}) == "Temporal consistency of all pairs"
    assert title_of("oracle_fidelity", {}) == "Oracle fidelity"
