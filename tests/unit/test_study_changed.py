"""Evaluations that have changed under a study, or in which videos have no frames."""

from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from studies import begin, client, fields, one_line, rlvid
from watched import frames, make_evaluation, write_videos

from rlvid.evaluate.cache import write_part
from rlvid.evaluate.results.about import Case
from rlvid.study.pairs import AXES
from rlvid.study.store import Store
from rlvid.study.videos import Videos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_evaluation(tmp_path / "evaluation", ("base", "tuned", "best"), steps=(20, 50))


def take_frames(folder: Path, part: int, *rows: int) -> None:
    """Some videos of a model become as `rlvid evaluate` keeps those with a pixel that is no number."""
    path = folder / "videos" / f"part-{part:05d}.parquet"
    videos = parquet.read_table(path).to_pylist()
    write_videos(path, [video | {"frames": []} if row in rows else video for row, video in enumerate(videos)])


def move_aside(folder: Path, steps: tuple[int, ...]) -> None:
    """As evaluating with other numbers of steps does: the parts lie aside, and others take their places."""
    others = folder / "videos" / ".others"
    others.mkdir()
    for part in sorted((folder / "videos").glob("part-*")):
        part.rename(others / part.name)
    make_evaluation(folder, ("base", "tuned", "best"), steps=steps)


# ------------------------------------------------------------------------------------------ without frames


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends where it would serve."""
    monkeypatch.setattr("rlvid.study.serve.run", lambda *_: None)


@pytest.mark.usefixtures("no_server")
def test_where_a_model_has_no_frames_nothing_is_asked_and_the_command_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_frames(folder, 1, 0, 3)
    take_frames(folder, 2, 3)
    assert rlvid(monkeypatch, "serve", str(folder), "--port", "0", "--checks", "3") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert said == [
        "left out     2 of 6 prompts, whose videos have no frames because a pixel was not finite: "
        "tuned lacks 2, best lacks 1"
    ]
    asked = Store(folder / "study.sqlite").study().pairs
    videos = Videos(folder)
    assert len(asked) == 4 * 3 + 3  # four places, three pairs of models, three checks
    assert all(videos.has_frames(name, pair.case) for pair in asked for name in ("base", "tuned", "best"))


@pytest.mark.usefixtures("no_server")
def test_only_models_that_are_compared_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_frames(folder, 1, 0, 3)
    take_frames(folder, 2, *range(6))
    assert rlvid(monkeypatch, "serve", str(folder), "--port", "0") == 2
    one_line(capsys, ["for none of 6 prompts", "tuned lacks 2, best lacks 6", "--models"])
    assert not (folder / "study.sqlite").exists()
    assert rlvid(monkeypatch, "serve", str(folder), "--port", "0", "--models", "base,tuned") == 0
    assert ": tuned lacks 2\n" in capsys.readouterr().out
    assert len(Store(folder / "study.sqlite").study().pairs) == 4


def test_what_evaluate_keeps_of_a_video_that_is_not_finite_counts_as_without_frames(folder: Path) -> None:
    path = folder / "videos" / "part-00001.parquet"
    rows = [{key: row[key] for key in row if key != "frames"} for row in parquet.read_table(path).to_pylist()]
    frames_BFCHW = torch.rand(len(rows), 2, 3, 8, 8)
    frames_BFCHW[4, 1, 0, 3, 3] = torch.nan
    write_part(path, rows, frames_BFCHW, "identity")
    videos = Videos(folder)
    lacking = [case for case in videos.cases if not videos.has_frames("tuned", case)]
    assert lacking == [Case(*(rows[4][key] for key in ("set", "steps", "index", "copy")))]


def test_frames_are_counted_where_a_file_has_no_statistics(folder: Path) -> None:
    take_frames(folder, 1, 1)
    path = folder / "videos" / "part-00001.parquet"
    parquet.write_table(parquet.read_table(path), path, write_statistics=False)
    videos = Videos(folder)
    assert [videos.has_frames("tuned", case) for case in sorted(videos.cases)].count(False) == 1


# ----------------------------------------------------------------------------------------- changed or gone


def test_a_video_that_is_gone_is_said_on_a_page_and_answers_are_safe(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = begin(folder)
    pages = client(store)
    hidden = fields(pages.get("/judge?annotator=ada").text)
    move_aside(folder, steps=(21, 51))
    assert pages.post("/answer", data=hidden | dict.fromkeys(AXES, "left")).status_code == 503  # saved, none to follow
    assert store.answered("ada") == {int(hidden["pair"])}
    told = " ".join(capsys.readouterr().err.split())
    assert "not those that people saw; evaluate with the settings of then (models base, tuned, best; sets" in told
    assert "sets in_domain; D = 20, 50" in told
    for part in (folder / "videos").glob("part-*"):
        part.unlink()
    for address in ("/judge?annotator=ada", "/video?annotator=ada&pair=1"):
        gone = pages.get(address)
        assert gone.status_code == 503
        assert "The evaluation has changed" in gone.text
        assert "Answers so far are safe" in " ".join(gone.text.split())
        assert not any(model in gone.text for model in ("base", "tuned", "best")), "the study is blind"
        assert "cannot be read" in capsys.readouterr().err
    make_evaluation(folder, ("base", "tuned", "best"), steps=(20, 50))  # as it was
    assert "Pair 2 of 4" in pages.get("/judge?annotator=ada").text
    assert pages.get("/video?annotator=ada&pair=1").status_code == 200


def test_damage_and_a_file_of_answers_that_is_gone_are_said_on_a_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begin(folder)
    pages = client(store)
    damaged = [frame[:60] for frame in frames(1, 0, 20)]
    with monkeypatch.context() as spoilt:
        spoilt.setattr(Videos, "frames", lambda *_: damaged)
        assert pages.get("/video?annotator=ada&pair=0").status_code == 503
    store.path.unlink()
    gone = pages.get("/judge?annotator=ada")
    assert gone.status_code == 507
    assert "Out of order" in gone.text


def test_export_and_serve_say_with_which_settings_to_evaluate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = begin(folder), str(tmp_path / "pairs.parquet")
    store.save(0, "ada", 0, dict.fromkeys(AXES, "left"))
    move_aside(folder, steps=(30,))
    then = "models base, tuned, best; sets in_domain; D = 20, 50"
    assert rlvid(monkeypatch, "export", str(folder), "--out", out) == 2
    one_line(capsys, [f"evaluate with the settings of then ({then}), or name another copy with --evaluation"])
    assert rlvid(monkeypatch, "serve", str(folder), "--port", "0", "--pairs", "4") == 2
    one_line(capsys, ["belongs to another study", then, "D = 30", "name a new file with --out, or evaluate and ask as"])
    copy = make_evaluation(tmp_path / "copy", ("base", "tuned", "best"), steps=(20, 50))
    assert rlvid(monkeypatch, "export", str(folder), "--out", out, "--evaluation", str(copy)) == 0
    take_frames(copy, 0, *range(6))
    take_frames(copy, 1, *range(6))
    assert rlvid(monkeypatch, "export", str(folder), "--out", out, "--evaluation", str(copy)) == 2
    one_line(capsys, ["not those that people saw", then])
