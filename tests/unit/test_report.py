"""A report is whole, shows what the evaluation holds and nothing else, and says in one line what it cannot show."""

import errno
import io
import json
import math
import os
import re
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
import yaml
from evaluations import METRICS, SETS, frames, score, write_evaluation
from helpers import save_run
from pages import Page
from PIL import Image
from pyarrow import parquet

from rlvid.cli import main
from rlvid.evaluate.results.about import Case
from rlvid.evaluate.results.read import read_evaluation
from rlvid.metric_names import metric_of
from rlvid.plots.curves import _bar
from rlvid.plots.frames import side_by_side, write_moving
from rlvid.report import write as writing
from rlvid.report.drawings import _interval
from rlvid.report.inputs import join, read_inputs
from rlvid.report.select import select_cases
from rlvid.report.sprites import sprite
from rlvid.report.summary import summarise_models, table
from rlvid.report.write import write_report


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("evaluated") / "ev")


@pytest.fixture(scope="module")
def made(evaluation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([evaluation], tmp_path_factory.mktemp("made") / "report", moving=2).folder


def test_everything_that_the_page_names_is_there_and_nothing_is_elsewhere(made: Path) -> None:
    page = Page(made / "index.html")
    assert page.loaded
    assert all(":" not in each and not each.startswith("/") for each in page.loaded)
    assert [each for each in page.loaded if not (made / each).is_file()] == []
    assert "http" not in (made / "report.js").read_text() + (made / "report.css").read_text()
    assert sorted(p.name for p in made.parent.iterdir()) == ["report"]


@pytest.mark.slow
def test_a_metric_of_another_version_is_shown_by_its_own_name(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "ev")
    about = yaml.safe_load((folder / "evaluation.yaml").read_text())
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(about | {"metrics": [*METRICS, "dynamics"]}))
    table = parquet.read_table(folder / "evaluation.parquet")
    values = pa.array([0.25] * len(table), pa.float32())
    parquet.write_table(table.append_column("dynamics", values), folder / "evaluation.parquet")
    evaluation = read_evaluation(folder)
    assert evaluation.has("dynamics")
    assert {row.score("dynamics") for row in evaluation.rows} == {0.25}
    page = Page(write_report([folder], tmp_path / "report", moving=0).folder / "index.html")
    assert "dynamics" in page.text


def test_foreign_text_stays_text(made: Path) -> None:
    page = Page(made / "index.html")
    assert "b" not in page.tags
    assert "stripes <b>drifting</b> & turning" in page.text


def test_sprites_hold_the_frames_and_the_script_the_scores(evaluation: Path, made: Path) -> None:
    cases = read_evaluation(evaluation).cases
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', (made / "index.html").read_text(), re.S)[1])
    assert (data["frames"], data["columns"], data["size"], data["fps"]) == (8, 3, [32, 32], 8.0)
    assert [m["key"] for m in data["metrics"]] == METRICS[:-1], "a metric without a number is not shown"
    for number_, case in enumerate(cases):
        for place in range(2):
            with Image.open(made / "videos" / f"{number_:05d}-{place:02d}.png") as image:
                sheet = np.asarray(image)
            film = frames(1000 * place + number_)
            for at in range(8):
                y, x = 32 * (at // 3), 32 * (at % 3)
                assert (sheet[y : y + 32, x : x + 32] == film[at]).all()
            expected = [score(place, case.index, m, number_) for m in range(5)]
            assert data["cases"][number_][place] == pytest.approx(expected, abs=1e-4)


def test_large_frames_become_webp_and_stay_close() -> None:
    film = frames(3, size=160)
    data, suffix, columns = sprite(film)
    assert (suffix, columns) == (".webp", 3)
    with Image.open(io.BytesIO(data)) as image:
        first = np.asarray(image.convert("RGB"))[:160, :160].astype(int)
    assert np.abs(first - film[0]).mean() < 4


def test_extremes_are_the_extremes(evaluation: Path) -> None:
    data = read_evaluation(evaluation)
    gains = {case: data.gain("toy", case, "held_out") for case in data.cases}
    choice = select_cases(data, 4, data.models)
    assert gains[choice.featured[0][1].case] == max(gains.values())
    assert gains[choice.featured[1][1].case] == min(gains.values())
    firsts = [case for case, model in choice.moving if model is None]
    assert firsts == [Case("in_domain", 20, 0, 0), Case("scenes", 20, 0, 0)]
    ends = [gains[case] for case, model in choice.moving if model is not None]
    assert sorted(ends) == pytest.approx([-0.05, -0.05, 0.1])  # of the two highest one is the first prompt of its set
    assert all(gains[case] < 0 for case, _ in choice.worst)
    assert select_cases(data, 0, data.models).moving == []
    assert choice.fixed["scenes"] == [Case("scenes", 20, 0, 0), Case("scenes", 20, 1, 0)]


MANY = {name: [f"prompt {number}" for number in range(7)] for name in ("in_domain", "scenes")}


def test_words_and_tables_say_what_the_numbers_say(tmp_path: Path) -> None:
    data = read_evaluation(write_evaluation(tmp_path / "ev", sets=MANY))
    (told,) = summarise_models(data)
    assert told.headline == "Held-out reward: no change beyond chance in 4 comparisons."
    assert "reward 0.330 to 0.380 (rose: +0.050" in told.lines[0]
    assert told.lines[0].endswith("Of 7 videos 4 are better by the held-out reward and 3 worse.")
    rows = table(data, 20)
    told_rows = [(summary.set, model.name, summary.count) for model, summary, _ in rows]
    assert told_rows[:2] == [("in_domain", "base", 7), ("in_domain", "toy", 7)]
    base, tuned = rows[0][2][0], rows[1][2][0]
    assert (base.text, base.bold, base.gain) == ("0.330 ± 0.022", False, "")
    assert (tuned.text, tuned.bold, tuned.way) == ("0.380 ± 0.022", True, 1)
    assert not any(cell.bold for cell in rows[1][2][4:]), "more motion is not better"
    changes = [metric_of("reward").change(x).replace("-", "−") for x in (0.1, -0.1, -0.0001, math.nan)]
    assert changes == ["+0.100", "−0.100", "0.000", "–"]


def test_few_prompts_are_never_beyond_chance(tmp_path: Path) -> None:
    sets = {"five": [f"prompt {number}" for number in range(5)], "six": [f"prompt {number}" for number in range(6)]}
    data = read_evaluation(write_evaluation(tmp_path / "ev", sets=sets, steps=(20,), copies=2))
    found = {name: data.differences["toy", name, 20, "reward"] for name in sets}
    assert all(each.low > 0 for each in found.values())
    assert {name: (each.pairs, each.prompts, each.way) for name, each in found.items()} == {
        "five": (10, 5, 0), "six": (12, 6, 1),
    }  # fmt: skip
    (told,) = summarise_models(data)
    assert "(no change beyond chance: +0.050" in told.lines[0]
    assert "rose" not in told.lines[0]
    assert "(rose: +0.050" in told.lines[1]


def test_a_rising_reward_beside_a_falling_held_out_one_is_called_by_its_name(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "ev", sets=MANY)
    rows = parquet.read_table(folder / "comparison.parquet").to_pylist()
    for row in rows:
        if row["metric"] == "held_out":
            row.update(difference=-0.2, low=-0.3, high=-0.1)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "comparison.parquet")
    (told,) = summarise_models(read_evaluation(folder))
    assert told.headline == "Held-out reward fell beyond chance in all 4 comparisons."
    assert len(told.cautions) == 4
    assert "over-optimisation" in told.cautions[0]


def test_moving_files_hold_all_models_side_by_side(made: Path) -> None:
    files = sorted((made / "moving").iterdir())
    assert [path.suffix for path in files] == [".gif", ".mp4", ".webp"] * 4
    for path in files:
        if path.suffix == ".mp4":
            with av.open(path) as container:
                assert sum(1 for _ in container.decode(video=0)) == 8
        else:
            with Image.open(path) as image:
                assert image.n_frames == 8


def test_the_gif_of_large_videos_is_shrunk_and_the_other_moving_files_are_not(tmp_path: Path) -> None:
    films = {name: np.random.default_rng(0).integers(256, size=(2, 32, 520, 3), dtype=np.uint8) for name in "ab"}
    mp4, webp, gif = write_moving(tmp_path / "large", "a prompt", films, 8)
    with Image.open(gif) as image:
        assert (image.n_frames, image.width) == (2, 16 + 2 * (256 + 16))
    with Image.open(webp) as image, av.open(mp4) as container:
        assert image.width == container.streams.video[0].width == 16 + 2 * (520 + 16)


def test_a_video_that_is_no_number_is_crossed_out_and_told(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "ev", steps=(20,))
    for part in sorted((folder / "videos").glob("*.parquet")):
        rows = parquet.read_table(part)
        kept = [[] if row["model"] == "toy" and row["index"] == 0 else row["frames"] for row in rows.to_pylist()]
        column = pa.array(kept, pa.list_(pa.binary()))
        parquet.write_table(rows.set_column(rows.column_names.index("frames"), "frames", column), part)
    made = write_report([folder], tmp_path / "out", moving=2)
    assert made.notes[-1] == "InstructVideo: 2 of its videos, crossed out here, had pixels that were no numbers."
    assert made.notes[-1] in Page(made.folder / "index.html").text
    with Image.open(made.folder / "videos" / "00000-01.png") as image:
        cross = np.asarray(image)[:32, :32]
    assert (cross[15, 15] == 0x66).all()
    assert (cross[16, 4] == 255).all()
    for part in (folder / "videos").glob("*.parquet"):
        rows = parquet.read_table(part)
        none = pa.array([[]] * len(rows), pa.list_(pa.binary()))
        parquet.write_table(rows.set_column(rows.column_names.index("frames"), "frames", none), part)
    with pytest.raises(ValueError, match="no video has a frame whose pixels are numbers"):
        write_report([folder], tmp_path / "out")


def test_side_by_side_shows_every_pixel_of_every_model() -> None:
    films = {"base": frames(1), "a model of a very long name": frames(2)}
    made = side_by_side("a prompt", films)
    assert len(made) == 8
    assert not any(side % 2 for side in made.shape[1:3])
    for place, film in enumerate(films.values()):
        left = 16 + place * (192 + 16)
        tops = [
            y for y in range(made.shape[1] - 191)
            if all((made[f, y : y + 192, left : left + 192] == film[f].repeat(6, 0).repeat(6, 1)).all() for f in (0, 5))
        ]  # fmt: skip
        assert len(tops) == 1
    with pytest.raises(ValueError, match="expected one shape"):
        side_by_side("a prompt", {"a": frames(1), "b": frames(2, size=16)})


def test_evaluations_of_the_same_prompts_are_joined_and_others_refused(tmp_path: Path, evaluation: Path) -> None:
    other = write_evaluation(tmp_path / "other")
    joined = join([read_evaluation(evaluation), read_evaluation(other)])
    assert [model.name for model in joined.models] == ["base", "toy", "toy (other)"]
    made = write_report([evaluation, other], tmp_path / "out", moving=0)
    assert made.videos == 30
    about = yaml.safe_load((other / "evaluation.yaml").read_text()) | {"size": 64}
    (other / "evaluation.yaml").write_text(yaml.safe_dump(about))
    with pytest.raises(ValueError, match=r"differ in size \(32 and 64\)"):
        read_inputs([evaluation, other])


def test_copies_repeated_prompts_and_a_lost_run_are_told(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "ev", sets={"s": ["the same", "the same"]}, steps=(20,), copies=2)
    made = write_report([folder], moving=0)
    assert made.folder == folder / "report"
    assert any("1 of 2 prompts are repeated" in note for note in made.notes)
    assert any("run's folder (toy) is not there" in note for note in made.notes)
    text = Page(made.folder / "index.html").text
    assert "copy 2 of 2" in text
    assert "prompt 2, repeated" in text


def test_evaluations_by_different_rewards_are_not_joined(tmp_path: Path, evaluation: Path) -> None:
    other = write_evaluation(tmp_path / "other")
    table_ = parquet.read_table(other / "evaluation.parquet")
    place = table_.column_names.index("reward")
    shifted = pa.array([value + 0.01 for value in table_.column("reward").to_pylist()])
    parquet.write_table(table_.set_column(place, "reward", shifted), other / "evaluation.parquet")
    with pytest.raises(ValueError, match=r"give the base's videos other scores \(reward\)"):
        read_inputs([evaluation, other])


def test_sets_whose_names_are_alike_or_mean_something_in_an_address_have_pictures_of_their_own(tmp_path: Path) -> None:
    sets = {"a b": ["one", "two"], "a-b": ["three"], "../100 %#?": ["four"]}
    made = write_report([write_evaluation(tmp_path / "ev", sets=sets, steps=(20,))], tmp_path / "out", moving=2)
    page = Page(made.folder / "index.html")
    assert [each for each in page.loaded if not (made.folder / each).is_file()] == []
    assert all(re.fullmatch(r"[\w./-]+", each) for each in page.loaded)
    assert len(list((made.folder / "pictures").glob("comparison-[123]-*.png"))) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ev", "out"]


def test_a_frames_number_is_not_read_aloud_while_it_plays(made: Path) -> None:
    outputs = re.findall(r"<output[^>]*>", (made / "index.html").read_text())
    assert len(outputs) == 12
    assert all('aria-live="off"' in each for each in outputs)


@pytest.mark.slow
def test_a_report_is_replaced_and_nothing_else_is(tmp_path: Path, evaluation: Path) -> None:
    out = tmp_path / "out"
    first = write_report([evaluation], out, moving=2)
    again = write_report([evaluation], out, moving=0)
    assert again.size < first.size
    assert not list((out / "moving").iterdir())
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no report"):
        write_report([evaluation], taken)
    assert [p.name for p in taken.iterdir()] == ["thesis.tex"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds notes\.txt"):
        write_report([evaluation], out, moving=0)
    assert (out / "notes.txt").read_text() == "mine"
    (taken / "thesis.tex").rename(taken / "index.html")
    (taken / "index.html").write_text("<p>How I like rlvid report")
    with pytest.raises(ValueError, match="exists and is no report"):
        write_report([evaluation], taken)
    assert [p.name for p in taken.iterdir()] == ["index.html"]


def test_a_full_disk_leaves_the_old_report_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation, out = write_evaluation(tmp_path / "ev", sets={"s": ["one", "two"]}, steps=(20,)), tmp_path / "out"
    write_report([evaluation], out, moving=0)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "_drawings", full)
    with pytest.raises(OSError, match="could not be written \\(No space left on device\\)"):
        write_report([evaluation], out, moving=0)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ev", "out"]


def spoil(folder: Path, kind: str) -> None:
    about = yaml.safe_load((folder / "evaluation.yaml").read_text())
    if kind == "empty prompt":
        about["sets"]["scenes"][1] = "  "
    if kind == "no models":
        del about["models"]
    if kind == "same name":
        about["models"][1]["name"] = "base"
    if kind == "unfinished":
        about["complete"] = False
    (folder / "evaluation.yaml").write_text(": [" if kind == "yaml" else yaml.safe_dump(about))
    if kind == "no scores":
        (folder / "evaluation.parquet").unlink()
    if kind == "cut":
        (folder / "comparison.parquet").write_bytes((folder / "comparison.parquet").read_bytes()[:100])
    if kind in ("frame", "prompt"):
        path = folder / "videos" / "part-00000.parquet"
        rows = parquet.read_table(path)
        made = rows.to_pylist()
        if kind == "frame":
            made[1]["frames"][2] = made[1]["frames"][2][:60]
        else:
            made[0]["prompt"] = "another"
        parquet.write_table(pa.Table.from_pylist(made, rows.schema), path)
    if kind == "part":
        (folder / "videos" / "part-00001.parquet").write_bytes(b"PAR1 nothing")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty prompt", ["set 'scenes': prompt 2 is empty"]),
        ("no models", ["evaluation.yaml is damaged", "models"]),
        ("unfinished", ["is not finished", "run `rlvid evaluate` again"]),
        ("same name", ["two models have one name"]),
        ("yaml", ["evaluation.yaml is damaged"]),
        ("no scores", ["evaluation.parquet is missing", "run `rlvid evaluate` again"]),
        ("cut", ["comparison.parquet is damaged"]),
        ("frame", ["part-00000.parquet", "prompt 2", "frame 2 is no whole PNG"]),
        ("prompt", ["was made for 'another'"]),
        ("part", ["part-00001.parquet is damaged"]),
    ],
)
def test_damage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, words: list[str]) -> None:
    folder = write_evaluation(tmp_path / "ev", steps=(20,))
    spoil(folder, kind)
    told = refused(capsys, str(folder), "--out", str(tmp_path / "out"))
    assert all(word in told for word in words), told
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `rlvid report` complains of, in its one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["rlvid", "report", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, str(tmp_path / "nowhere"))
    (tmp_path / "void").mkdir()
    assert "neither an evaluation (evaluation.yaml) nor a run" in refused(capsys, str(tmp_path / "void"))
    run, _ = save_run(tmp_path / "home")
    capsys.readouterr()  # how a library counts the files it wrote
    assert "no evaluation there" in refused(capsys, str(run))
    (run / "step-000003" / "state.json").unlink()
    assert "no checkpoint is whole (step-000003: state.json" in refused(capsys, str(run))
    folder = write_evaluation(tmp_path / "gap", steps=(20,), leave_out=3)
    told = refused(capsys, str(folder))
    assert "1 of 10 videos are missing, the first of model 'base', set 'scenes', D = 20, prompt 1" in told
    folder = write_evaluation(tmp_path / "sizes", steps=(20,), sizes={"toy": 16})
    assert "models of different shapes: 'base' makes 8 frames of 32 x 32" in refused(capsys, str(folder))
    (tmp_path / "file").write_text("here")
    folder = write_evaluation(tmp_path / "good", steps=(20,))
    assert "is no report" in refused(capsys, str(folder), "--out", str(tmp_path / "file"))
    assert "could not be written" in refused(capsys, str(folder), "--out", str(tmp_path / "file" / "in"))
    assert SETS["scenes"][0] in read_evaluation(folder).about.sets["scenes"]


def test_the_bars_of_a_picture_are_no_shorter_with_more_videos_of_the_same_prompts() -> None:
    values, prompts = np.arange(8.0), np.arange(8)
    bars = _bar(*_interval(values, prompts))
    assert bars.shape == (2, 1)
    assert (bars > 1).all()
    assert _bar(*_interval(values.repeat(4), prompts.repeat(4))) == pytest.approx(bars)
    assert not _bar(*_interval(values[:1], prompts[:1])).any()
