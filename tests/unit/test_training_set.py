"""Training sets of one source and of several: their rows, order and settings."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from rlvid.config import load_config, parse_config
from rlvid.data.batches import Shares
from rlvid.data.clips import CLIP, SCHEMA
from rlvid.data.encode import model_fingerprint
from rlvid.data.encoders import encode_items
from rlvid.data.listing import write_prompts
from rlvid.data.shares import Share
from rlvid.data.sources import read_rendered
from rlvid.data.training_set import Source, TrainingSet
from rlvid.data.writing import ClipWriter
from rlvid.reward.builtin import builtin_folder
from rlvid.toy.tiny import tiny_model
from rlvid.train.feeding import RunFeed
from rlvid.train.preflight import check, cut_captions, record_clips, record_rewards
from rlvid.train.progress import ProgressActor
from rlvid.train.reporter import Reporter


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of clips, of 3 and 5."""
    home, model, made = tmp_path_factory.mktemp("sets"), tiny_model(frames=2, size=8), []
    for seed, count in ((1, 3), (2, 5)):
        items = [{"index": i, "source": f"clip {i}", "caption": ""} for i in range(count)]
        with ClipWriter(home / str(seed), {"seed": seed}) as writer:
            writer.add(encode_items(model, items, lambda item, model, seed=seed: read_rendered(seed, item, model)))
            writer.finish({"fingerprint": str(seed)}, [])
        made.append(home / str(seed))
    return made


def test_rows_of_a_mixture_are_those_of_its_sources(folders: list[Path]) -> None:
    mixed, apart = TrainingSet.of(*folders), [TrainingSet.of(folder) for folder in folders]
    assert (mixed.counts, mixed.count) == ((3, 5), 8)
    found = mixed.rows([7, 0, 3, 0, 2])
    expected = [apart[1].rows([4]), apart[0].rows([0]), apart[1].rows([0]), apart[0].rows([0]), apart[0].rows([2])]
    assert found.column_names == list(CLIP)
    for place, row in enumerate(expected):
        assert found.slice(place, 1).to_pylist() == row.to_pylist()
    captions = [caption for each in apart for caption in each.captions()]
    assert list(mixed.captions()) == captions
    assert list(mixed.captions(4)) == [*captions[:2], *captions[3:5]]
    assert mixed.first_captions(3) == (captions[0], captions[3], captions[1])
    assert apart[0].fingerprint == "1"
    assert len({mixed.fingerprint, TrainingSet(mixed.sources, (1.0, 2.0)).fingerprint, "1", "2"}) == 4


def test_a_mixture_is_the_same_for_every_number_of_workers(folders: list[Path]) -> None:
    clips = TrainingSet(tuple(map(Source.of, folders)), (3.0, 1.0))

    def seen(workers: int, first_step: int = 0) -> dict[int, tuple[str, float]]:
        train = {"batch_size": 4, "group_size": 2, "workers": workers, "steps": 6}
        feed = RunFeed(parse_config({"train": train}), clips, Path())
        found = {}
        for block in feed.shares(first_step)():
            (row,) = block.to_pylist()
            share = Share.of(row, row["step"], row["rank"])
            for place, serial in enumerate(share.serials):
                assert share.posterior is not None
                found[serial] = share.prompts[place], float(share.posterior.mean[place].sum())
        return found

    alone = seen(1)
    assert sorted(alone) == list(range(24))
    assert all(alone[serial] == alone[serial + 1] for serial in range(0, 24, 2)), "a group starts from one clip"
    assert seen(2) == alone
    assert seen(4) == alone
    assert seen(2, first_step=4) == {serial: row for serial, row in alone.items() if serial >= 16}


def test_a_damaged_clip_is_replaced_from_its_own_source(folders: list[Path]) -> None:
    clips = TrainingSet.of(*folders)
    assert list(clips.neighbours(2)) == [0, 1], "around the end of the source"
    assert list(clips.neighbours(3)) == [4, 5, 7]


def test_clips_beside_prompts_are_read_as_captions(folders: list[Path], tmp_path: Path) -> None:
    write_prompts(["a dog", "a cat"], tmp_path / "prompts")
    mixed = TrainingSet.of(folders[0], tmp_path / "prompts")
    assert [source.kind for source in mixed.sources] == ["clips", "prompts"]
    assert mixed.rows([4, 0]).to_pylist() == [
        {"caption": "a cat"}, {"caption": next(TrainingSet.of(folders[0]).captions())}
    ]  # fmt: skip
    shares = Shares(mixed, 1, 0, np.array([[3, 0]]))
    (row,) = next(iter(shares())).to_pylist()
    assert Share.of(row, 0, 0).text_BLD is None


def test_captions_of_a_damaged_part_are_passed_over(folders: list[Path], tmp_path: Path) -> None:
    write_prompts([f"prompt {i}" for i in range(70_000)], tmp_path / "prompts")
    damaged = tmp_path / "prompts" / "part-00000.parquet"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert TrainingSet.of(tmp_path / "prompts").first_captions(1) == ("prompt 65536",)
    assert cut_captions(parse_config({}), TrainingSet.of(tmp_path / "prompts")) == []


def test_settings_of_mixtures_are_checked(tmp_path: Path) -> None:
    def made(**data: object) -> object:
        return parse_config({"data": data, "method": "ddpo"}).data

    assert made(source=["builtin", "a/b"], weights=[3, 1]).sources == ("builtin", "a/b")
    assert made(source="builtin").named == "builtin"
    assert made(source=["a", "b"]).named == "[a, b]"
    for data, said in (
        ({"source": []}, r"data.source = \[\]: must be the name of a source, or a list of names"),
        ({"source": 5}, r"data.source = 5: must be the name of a source, or a list of names"),
        ({"source": ["a", "a"]}, r"names a source twice"),
        ({"source": ["a", "b"], "weights": [1]}, r"data.weights = \[1.0\]: data.source names 2 sources; give a number"),
        ({"source": ["a", "b"], "weights": [1, 0]}, r"above 0 for each, in their order"),
        ({"source": ["a", "b"], "weights": [1, float("nan")]}, r"data.weights.1 = nan: "),
        ({"source": ["a", "b"], "weights": [1, float("inf")]}, r"data.weights.1 = inf: "),
        ({"source": ["a"], "weights": [1, 2]}, r"names 1 source; give"),
        ({"source": "a", "weights": [1]}, r"data.weights = \[1.0\]: data.source = 'a' is one source and no list"),
        ({"source": ["a", "b"], "prompts": "x.txt"}, r"data.source = '\[a, b\]' has captions of its own"),
    ):
        with pytest.raises(ValueError, match=said):
            made(**data)
    with pytest.raises(ValueError, match=r"data.source = '\[prompts, a\]': prompts have no clips"):
        parse_config({"data": {"source": ["prompts", "a"]}})
    run = load_config({}, ["data.source=[builtin,a/b]", "data.weights=[3,1]"])
    again = parse_config(yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json"))))
    assert (again, again.fingerprint) == (run, run.fingerprint)
    assert len({run.fingerprint, load_config({}, ["data.source=[builtin,a/b]"]).fingerprint}) == 2


def test_one_source_keeps_the_fingerprint_of_earlier_versions() -> None:
    former = "cc76c8fc07d3"  # by a version without mixtures, whose runs go on
    assert parse_config({}).fingerprint == former
    assert parse_config({"data": {"weights": None}}).fingerprint == former
    lists = [{"source": ["a", "b"]}, {"source": ["b", "a"]}, {"source": ["a", "b"], "weights": [2, 1]}, {"source": "a"}]
    assert len({parse_config({"data": data}).fingerprint for data in lists}) == 4


def test_the_source_that_changed_between_two_starts_is_named(folders: list[Path], tmp_path: Path) -> None:
    run, clips = tmp_path / "run", TrainingSet(tuple(map(Source.of, folders)), (3.0, 1.0))
    (run / "archive").mkdir(parents=True)
    note = run / "clips.txt"
    record_clips(run, clips)
    assert note.read_text() == "1 3\n2 5\n"
    record_clips(run, clips)
    shrunk = replace(clips, sources=(clips.sources[0], replace(clips.sources[1], count=4)))
    said = rf"those in {folders[1]} now are \(then: fingerprint 2, number 5; now: fingerprint 2, number 4\)"
    with pytest.raises(ValueError, match=said):
        record_clips(run, shrunk)
    assert note.read_text() == "1 3\n2 5\n", "the note is kept, so that the next start is refused too"

    one = TrainingSet.of(folders[0])
    note.write_text("0")
    with pytest.raises(ValueError, match=r"\(then: fingerprint 0, number unknown; now: fingerprint 1, number 3\)"):
        record_clips(run, one)
    note.write_text("1")
    record_clips(run, one)
    assert note.read_text() == "1 3\n", "a note of an earlier version is completed"


def test_a_run_goes_on_with_its_own_rewards_only(tmp_path: Path) -> None:
    run, fitted, function = tmp_path / "run", tmp_path / "liked", tmp_path / "mine.py"
    shutil.copytree(builtin_folder("builtin-frames"), fitted)
    function.write_text("def score(frames, prompts): ...")
    parts = [{"path": str(fitted), "name": "fitted"}, {"path": f"{function}:score"}]
    reward = parse_config({"reward": {"mixture": parts}}).reward
    run.mkdir()
    record_rewards(run, reward)
    assert list(json.loads((run / "rewards.json").read_text())) == [str(fitted)]
    shutil.copytree(builtin_folder("builtin"), fitted, dirs_exist_ok=True)
    record_rewards(run, reward)  # nothing has been trained yet
    (run / "archive").mkdir()
    function.write_text("def score(frames, prompts): raise SystemExit")
    os.utime(fitted / "reward.json")
    for name in (".cache", "README.md", "calibration.png", "report.json"):
        (fitted / name).write_text("of another day")
    record_rewards(run, reward)
    kept = (run / "rewards.json").read_text()
    shutil.copytree(builtin_folder("builtin-frames"), fitted, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=rf"'run' began with another reward than {re.escape(str(fitted))} now is; br"):
        record_rewards(run, reward)
    assert (run / "rewards.json").read_text() == kept, "the next start is refused too"
    (run / "rewards.json").unlink()
    record_rewards(run, reward)  # of an earlier version, which kept no note


def test_a_source_that_is_none_or_has_no_clips_is_refused_before_anything_starts(tmp_path: Path) -> None:
    def refused(*source: str) -> str:
        with pytest.raises(ValueError, match=r"data\.source|no clips") as error:
            check(load_config("toy", [f"data.source=[{','.join(source)}]"]))
        return str(error.value)

    (tmp_path / "notes.txt").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty").mkdir()
    pq.write_table(SCHEMA.empty_table(), tmp_path / "empty" / "part-00000.parquet")
    size = (tmp_path / "empty" / "part-00000.parquet").stat().st_size
    meta = {
        "clips": 0,
        "fingerprint": model_fingerprint(load_config("toy").model),
        "parts": [["part-00000.parquet", 0, size]],
    }
    (tmp_path / "empty" / "meta.json").write_text(json.dumps(meta))
    for source, fault in (("bulitin", "no such folder or file"), (f"{tmp_path}/notes.txt", "no table of videos")):
        line = refused("builtin", source)
        assert line.startswith(f"data.source = '{source}': {fault}; allowed: builtin, prompts, samples, a folder of ")
        assert "rlvid encode" in line
        assert "\n" not in line
    assert "the folder is empty" in refused("builtin", f"{tmp_path}/bare")
    assert f"{tmp_path}/empty: has no clips" in refused("builtin", f"{tmp_path}/empty")


def test_a_fault_of_the_clips_is_one_line_on_the_console_for_all_workers() -> None:
    progress: Any = ProgressActor.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    actor = SimpleNamespace(note=SimpleNamespace(remote=progress.note))
    for _ in range(2):  # starts of the workers
        for rank in range(2):
            reporter = Reporter(rank, actor)
            reporter.step = 3
            for fault in ("part-1 is damaged", "part-2 is damaged"):
                reporter.report(f"{fault}; no reward", kind=fault)
            reporter.report("the reward failed")
    assert progress.get()[1] == [
        "worker 0, step 3: part-1 is damaged; no reward",
        "worker 0, step 3: part-2 is damaged; no reward",
        *[f"worker {rank}, step 3: the reward failed" for rank in (0, 1)] * 2,
    ]
