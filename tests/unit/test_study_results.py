"""What `rlvid study results` and `export` say, and every mistake as one line."""

import gc
import json
import math
import socket
import sqlite3
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from markdown_it import MarkdownIt
from pyarrow import parquet
from studies import one_line, rlvid
from watched import PROMPTS, frames, make_evaluation, write_videos

from rlvid.stats import wilson
from rlvid.study.pairs import choose_pairs, second_on_left
from rlvid.study.results import Results, summarise
from rlvid.study.store import Side, Store
from rlvid.study.tables import markdown
from rlvid.study.videos import Videos


def side_of(store: Store, annotator: str, pair: int, chosen: str) -> Side:
    """The side on which somebody sees a pair's video."""
    if chosen == "tie":
        return "tie"
    return "left" if (chosen == "second") == second_on_left(store.study().seed, annotator, pair) else "right"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two people on 6 pairs and a check: what they chose is in `said`."""
    folder = make_evaluation(tmp_path / "evaluation", steps=(20, 50))
    videos = Videos(folder)
    store = Store.begin(folder / "study.sqlite", folder, 0, videos.models, choose_pairs(videos, [], 6, 1, 0))
    said = {
        "ada": (["second"] * 4 + ["tie", "first"], ["second"] * 6, "first"),
        "ben": (["second"] * 3 + ["first", "tie", "tie"], ["second"] * 5 + ["first"], "second"),
    }
    real = [pair.number for pair in store.study().pairs if not pair.check]
    (check,) = {pair.number for pair in store.study().pairs} - {*real}
    for name, (quality, alignment, seen) in said.items():
        for pair, *choices in [*zip(real, quality, alignment, strict=True), (check, seen, "tie")]:
            sides = [side_of(store, name, pair, choice) for choice in choices]
            store.save(0, name, pair, dict(zip(("quality", "alignment"), sides, strict=True)))
    return store


def results(store: Store) -> Results:
    return summarise(store.study(), store.answers(), Videos(store.study().evaluation).scores())


def test_wins_ties_and_losses(store: Store) -> None:
    quality, alignment = results(store).duels
    assert (quality.first, quality.second) == ("base", "tuned")
    assert (quality.wins, quality.ties, quality.losses) == (2, 3, 7)
    assert (alignment.wins, alignment.ties, alignment.losses) == (1, 0, 11)
    # 9 answers that were no tie, about 5 pairs: pair 5 was a tie for both
    assert (quality.preferred.count, quality.preferred.pairs) == (9, 5)
    assert quality.preferred.share == pytest.approx(2 / 9)
    assert (quality.preferred.low, quality.preferred.high) == wilson(2 / 9, 5)


def test_ranking(store: Store) -> None:
    best, other = results(store).standings[:2]
    assert (best.model, other.model) == ("tuned", "base")
    # two models: the log of the odds, ties as half wins
    assert best.strength - other.strength == pytest.approx(math.log((7 + 1.5) / (2 + 1.5)))
    assert best.won == pytest.approx(8.5 / 12)


def test_agreement_of_people(store: Store) -> None:
    quality, alignment = results(store).concord
    assert (quality.pairs, quality.equal) == (6, pytest.approx(4 / 6))
    # 12 answers: 7 second, 2 first, 3 tie; 2 of 6 pairs differ, each by two of the 12: 1 - 11 x 4 / (12 x 12 - 62)
    assert quality.alpha == pytest.approx(1 - 11 * 4 / (144 - 49 - 4 - 9))
    assert alignment.equal == pytest.approx(5 / 6)


def test_agreement_with_metrics(store: Store) -> None:
    found = {(each.axis, each.metric): each.agrees for each in results(store).metrics}
    assert set(found) == {(axis, metric) for axis in ("quality", "alignment") for metric in ("reward", "motion")}
    assert found["quality", "reward"].share == pytest.approx(7 / 9)  # reward prefers the tuned model, always
    assert found["quality", "motion"].share == pytest.approx(2 / 9)
    assert found["alignment", "reward"].share == pytest.approx(11 / 12)
    assert (found["alignment", "reward"].low, found["alignment", "reward"].high) == wilson(11 / 12, 6)


def test_a_metric_without_scores_or_with_equal_ones_says_nothing(store: Store) -> None:
    path = store.study().evaluation / "evaluation.parquet"
    table = parquet.read_table(path)
    equal = pa.array([0.5] * len(table))
    missing = pa.array([math.nan] * len(table))
    parquet.write_table(table.append_column("equal", equal).append_column("missing", missing), path)
    found = {each.metric: each.agrees for each in results(store).metrics}
    assert (found["equal"].count, found["equal"].low, found["equal"].high) == (0, 0, 1)
    assert "missing" not in found


def test_checks_count_for_people_alone(store: Store) -> None:
    ada, ben = results(store).people
    assert (ada.name, ada.pairs, ada.passed, ada.checks) == ("ada", 6, 1, 1)
    assert (ben.pairs, ben.passed, ben.checks) == (6, 0, 1)


def test_the_command_prints_and_writes_results(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rlvid(monkeypatch, "results", str(store.path)) == 0
    printed = capsys.readouterr().out
    page = store.path.with_name("study-results.md").read_text(encoding="utf-8")
    written = json.loads(store.path.with_name("study-results.json").read_text(encoding="utf-8"))
    for text in (printed, page):
        assert all(word in text for word in ("Base", "Tuned", "video-text alignment", "0 of 1", "22 % [4 %, 64 %]"))
    assert written["duels"][0]["preferred"]["share"] == pytest.approx(2 / 9)
    assert rlvid(monkeypatch, "results", str(store.path.parent), "--without", "ben") == 0
    written = json.loads(store.path.with_name("study-results.json").read_text(encoding="utf-8"))
    assert [person["name"] for person in written["people"]] == ["ada"]
    assert written["concord"][0]["alpha"] is None


def test_names_stay_text_in_the_tables(store: Store) -> None:
    name = "<img src=x> ![a](http://x.org/y) | b"
    store.save(0, name, store.study().pairs[0].number, {"quality": "tie", "alignment": "tie"})
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown(results(store)))
    assert "<img" not in page
    assert "<a " not in page
    assert "<td>&lt;img src=x&gt; ![a](http://x.org/y) | b</td>" in page


def test_models_that_nobody_has_compared_yet_come_last(store: Store) -> None:
    study = store.study()
    checks = {pair.number for pair in study.pairs if pair.check}
    answer = next(each for each in store.answers() if each.pair not in checks)
    pairs = [*study.pairs, replace(study.pairs[0], number=99, first="third", second="base")]
    wider = replace(study, pairs=pairs, models={"third": "Third", **study.models})
    standings = summarise(wider, [answer], {}).standings
    assert [each.model for each in standings][2] == "third"
    assert math.isnan(standings[2].won)


def test_results_need_no_evaluation_but_say_what_they_lack(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store.study().evaluation.joinpath("evaluation.parquet").unlink()
    assert rlvid(monkeypatch, "results", str(store.path)) == 0
    assert "no evaluation.parquet there" in " ".join(capsys.readouterr().out.split())


def test_preference_pairs(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "pairs.parquet"
    assert rlvid(monkeypatch, "export", str(store.path), "--out", str(out)) == 0
    rows = parquet.read_table(out).to_pylist()
    assert len(rows) == 24
    assert [row["preference"] for row in rows].count(0.5) == 24 - (9 + 12)
    orders = {}
    for row in rows:
        models = [["base", "tuned"].index(row[key]) for key in ("a_model", "b_model")]
        assert sorted(models) == [0, 1]
        a, b = (frames(model, row["index"], row["steps"]) for model in models)
        assert (row["a"], row["b"]) == (a, b)
        assert orders.setdefault((row["index"], row["steps"]), models) == models, "a pair has one order"
        assert row["prompt"] == PROMPTS["in_domain"][row["index"]]
    chosen = {1.0: "a_model", 0.0: "b_model"}
    decided = [row for row in rows if row["preference"] != 0.5]
    tuned = [(row["annotator"], row["axis"]) for row in decided if row[chosen[row["preference"]]] == "tuned"]
    assert {each: tuned.count(each) for each in set(tuned)} == {
        ("ada", "quality"): 4, ("ben", "quality"): 3, ("ada", "alignment"): 6, ("ben", "alignment"): 5,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name != "evaluation"] == ["pairs.parquet"]


def test_other_videos_than_people_saw_are_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_evaluation(tmp_path / "other", ("tuned", "base"), steps=(20, 50))
    for verb in (["results"], ["export", "--out", str(tmp_path / "pairs.parquet")]):
        assert rlvid(monkeypatch, *verb, str(store.path), "--evaluation", str(other)) == 2
        assert "not those that people saw" in capsys.readouterr().err
    assert not (tmp_path / "pairs.parquet").exists()
    for part in (store.study().evaluation / "videos").iterdir():
        part.unlink()
    assert rlvid(monkeypatch, "export", str(store.path), "--out", str(tmp_path / "pairs.parquet")) == 2
    capsys.readouterr()
    assert rlvid(monkeypatch, "results", str(store.path)) == 0  # what people said is still there
    told = " ".join(capsys.readouterr().out.split())
    assert "nothing on agreement with metrics" in told
    assert "its videos are missing" in told
    assert json.loads(store.path.with_name("study-results.json").read_text(encoding="utf-8"))["metrics"] == []
    moved = make_evaluation(tmp_path / "moved", steps=(20, 50))  # the same videos elsewhere are fine
    assert rlvid(monkeypatch, "results", str(store.path), "--evaluation", str(moved)) == 0


def _rows(**other: object) -> list[dict[str, object]]:
    return [_row(index=index, prompt=prompt) | other for index, prompt in enumerate(PROMPTS["in_domain"])]


def _row(**other: object) -> dict[str, object]:
    usual = {"model": "tuned", "set": "in_domain", "steps": 20, "index": 0, "copy": 0, "fps": 8.0}
    return usual | {"prompt": PROMPTS["in_domain"][0], "frames": frames(1, 0, 20)} | other


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        ({"models": ("base",)}, [], ["a study compares two models or more", "base"]),
        ({}, ["--models", "base,other"], ["--models 'other'", "there: base, tuned"]),
        ({}, ["--models", "base"], ["a study compares two models or more", "asked: 1"]),
        ({}, ["--models", "base,base"], ["--models 'base,base'", "each once"]),
        ({}, ["--annotators", "Ada,,Ben"], ["--annotators 'Ada,,Ben'", "separated by commas"]),
        ({}, ["--out", "/nowhere/study.sqlite"], ["no folder /nowhere"]),
        ({}, ["--host", "999.1.1.1"], ["--host 999.1.1.1"]),
        ({"sets": {"in_domain": ["a square", " "]}}, [], ["set 'in_domain': prompt 2 is empty"]),
        ({"sets": {"in_domain": ["a disc", "a ball", "a disc"]}}, [], ["'a disc' is in set in_domain twice"]),
        ({"rows": [_row()]}, [], ["2 videos of model 'tuned' are missing", "prompt 2", "rlvid evaluate makes them"]),
        ({"rows": [_row(), _row()]}, [], ["'tuned', set 'in_domain'", "is there twice"]),
        ({"rows": [_row(prompt="another")]}, [], ["'another'", repr(PROMPTS["in_domain"][0])]),
        ({"rows": _rows(frames=[])}, [], ["for none of 3 prompts", "tuned lacks 3", "compare others with --models"]),
        ({"rows": _rows(frames=frames(1, 0, 20)[:5])}, [], ["5 frames of 32 x 32", "8 frames", "one shape"]),
        ({"rows": _rows(frames=frames(1, 0, 20, size=48))}, [], ["8 frames of 48 x 48", "one shape"]),
        ({"rows": _rows(frames=frames(1, 0, 20)[:1] + frames(1, 0, 20, size=48)[:1])}, [], ["several sizes"]),
        ({"rows": _rows(frames=[frames(1, 0, 20)[0][:60]])}, [], ["no whole PNG", "delete that file"]),
        ({"rows": _rows(fps=4.0)}, [], ["at 4 a second", "at 8 a second"]),
    ],
)  # fmt: skip
def test_mistakes_before_a_study_areone_line(
    made: dict[str, object], options: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = made.pop("rows", None)
    folder = make_evaluation(tmp_path / "evaluation", **made)  # type: ignore[arg-type]
    if rows is not None:
        write_videos(folder / "videos" / "part-00001.parquet", rows)  # type: ignore[arg-type]
    assert rlvid(monkeypatch, "serve", str(folder), "--port", "0", *options) == 2
    one_line(capsys, words)
    assert not (folder / "study.sqlite").exists()


def test_folders_without_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake(*words: str) -> None:
        assert rlvid(monkeypatch, "serve", str(tmp_path)) == 2
        one_line(capsys, [*words])

    mistake("no evaluation there")
    (tmp_path / "evaluation.yaml").write_text("models: 3", encoding="utf-8")
    mistake("evaluation.yaml is damaged", "models")
    about = {"sets": {"s": ["a"]}, "steps": [20], "metrics": ["reward"], "fps": 8.0}
    about["models"] = [{"name": name, "kind": "run"} for name in ("a", "b")]
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(about), encoding="utf-8")
    mistake("its videos are missing")
    (tmp_path / "videos").mkdir()
    part = tmp_path / "videos" / "part-00000.parquet"
    part.write_bytes(b"PAR1 cut off")
    mistake(str(part), "damaged")
    parquet.write_table(pa.table({"model": ["base"]}), part)
    mistake("no column", "set")
    write_videos(part, [])
    mistake("files of videos are empty")


def test_a_port_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_evaluation(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert rlvid(monkeypatch, "serve", str(folder), "--port", port) == 2
    one_line(capsys, [f"port {port} of 127.0.0.1 is in use", "--port"])
    assert not (folder / "study.sqlite").exists()


def test_a_study_that_cannot_begin_gives_its_port_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_evaluation(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gc.disable()  # it is given back, and not only found lying about
    try:
        assert rlvid(monkeypatch, "serve", str(folder), "--port", str(port), "--out", "/nowhere/study.sqlite") == 2
        with socket.socket() as again:
            again.bind(("127.0.0.1", port))
    finally:
        gc.enable()
    one_line(capsys, ["no folder /nowhere"])


def test_mistakes_after_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_evaluation(tmp_path)
    assert rlvid(monkeypatch, "results", str(tmp_path)) == 2
    one_line(capsys, ["study.sqlite: no such study"])
    videos = Videos(folder)
    Store.begin(folder / "study.sqlite", folder, 0, videos.models, choose_pairs(videos, [], 2, 0, 0))
    assert rlvid(monkeypatch, "results", str(tmp_path)) == 2
    one_line(capsys, ["nobody has answered anything yet"])
    with sqlite3.connect(tmp_path / "study.sqlite") as database:
        database.execute("UPDATE study SET value = '9' WHERE key = 'format'")
    database.close()
    assert rlvid(monkeypatch, "export", str(tmp_path), "--out", str(tmp_path / "x" / "pairs.parquet")) == 2
    one_line(capsys, ["--out", "there is no folder"])
    assert rlvid(monkeypatch, "export", str(tmp_path), "--out", str(tmp_path / "pairs.parquet")) == 2
    one_line(capsys, ["format 9"])
