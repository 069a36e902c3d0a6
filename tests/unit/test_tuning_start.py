"""A sweep as it starts and starts again: what is looked at first, what may have changed, what it is measured by."""

import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any

import kill_sweep
import pytest
import yaml
from helpers import save_run

from rlvid import files
from rlvid.config import shipped_configs
from tuning import sweep as tuning_sweep
from tuning import trial
from tuning.description import Sweep
from tuning.journal import Journal
from tuning.load import load_sweep, shipped_sweeps
from tuning.measure import job_of, measure
from tuning.resume import keep_description
from tuning.sweep import check, check_room, main, run


def sweep(tmp_path: Path, *overrides: str, source: str = "toy") -> Sweep:
    return load_sweep(source, [f"storage={tmp_path}", *overrides])


def test_the_command_answers_mistakes_before_ray_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.yaml"]) == 2
    assert main(["toy", f"storage={tmp_path}", "trials=3"]) == 2
    assert main(["toy", f"storage={tmp_path}", "space.reward.segments=[1, 9]"]) == 2
    assert main(["toy", f"storage={tmp_path}/working_dir_files/_ray_pkg_1/runs"]) == 2
    (tmp_path / "few.txt").write_text("a dog\na cat\n")
    assert main(["toy", f"storage={tmp_path}", f"evaluation.prompts={tmp_path}/few.txt", "evaluation.videos=3"]) == 2
    ranges = "space={reward.segments: {integers: [1, 9]}}"
    assert main(["toy", f"storage={tmp_path}", "algorithm=optuna", "trials=2", ranges]) == 2
    assert kill_sweep.main(["--kills", "a", "toy"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:30] for line in lines] == [
        "error: sweep 'nowhere.yaml' is", "error: the grid has 20 combina", "error: reward.segments = 9 exc",
        f"error: storage = '{tmp_path}"[:30], "error: evaluation.prompts with", "error: reward.segments = 9 exc",
        "error: --kills 'a': expected w",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]


def test_files_are_looked_for_before_ray_starts(tmp_path: Path) -> None:
    made = sweep(tmp_path, "data.source=nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        check(made, made.planned()[:1])


def test_trials_that_do_not_fit_side_by_side_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvid.cluster.nodes.nodes_possible", lambda: [({"CPU": 3.0}, 2.0)])
    wide = ("train.cpus_per_worker=2", "space={train.workers: [1, 2]}")  # one a node, though six cores are three
    made = sweep(tmp_path, *wide, "concurrent=1")
    assert check_room(made, made.planned()) is False
    with pytest.raises(ValueError, match=r"concurrent = 2: trials with train.workers = 2 at 2 CPU each .* 1 to 1$"):
        check_room(sweep(tmp_path, *wide, "concurrent=2"), made.planned())
    with pytest.raises(ValueError, match=r"train.workers = 4 at train.cpus_per_worker = 2"):
        check_room(made, [{"train.workers": 4}])


def test_a_changed_sweep_is_refused_by_name(tmp_path: Path) -> None:
    keep_description(sweep(tmp_path))
    keep_description(sweep(tmp_path, "concurrent=1"))  # may change
    for change, words in {
        "space.reward.segments=[1, 2]": r"space.reward.segments: \[1, 2, 4, 8\] -> \[1, 2\]",
        "rungs=[2, 12]": r"rungs: \[4, 12\] -> \[2, 12\]",
        "sampling.steps=8": "settings.sampling.steps: 10 -> 8",
    }.items():
        with pytest.raises(ValueError, match=words):
            keep_description(sweep(tmp_path, change))
    turned = "space={reward.segments: [1, 2, 4, 8], reward.attenuation: [0, .5, 1, 2, inf]}"
    with pytest.raises(ValueError, match=r"the order of space: reward.attenuation, reward.segments -> reward.se"):
        keep_description(sweep(tmp_path, turned))
    twelve = ("name=r", "algorithm=random")
    keep_description(sweep(tmp_path, *twelve, "trials=12"))
    keep_description(sweep(tmp_path, *twelve, "trials=14"))
    with pytest.raises(ValueError, match="the sweep began with 14"):
        keep_description(sweep(tmp_path, *twelve, "trials=12"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="exists and is not a sweep"):
        keep_description(sweep(tmp_path, "name=other"))


def test_a_sweep_goes_on_from_another_copy_of_its_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each `ray job submit --working-dir .` makes one, and the cluster deletes those of before."""

    def copy(name: str, prompt: str = "a dog") -> Sweep:
        home = tmp_path / name
        home.mkdir()
        monkeypatch.chdir(home)
        (home / "prompts.txt").write_text(f"a cat\n{prompt}\n")
        (home / "mine.py").write_text("def red(frames, prompts):\n    return frames[:, :, 0].mean((2, 3))\n")
        (home / "base.yaml").write_text(toy())
        changes = {"config": f"{home}/base.yaml", "evaluation": {"prompts": "prompts.txt", "videos": 2}}
        (home / "sweep.yaml").write_text(yaml.safe_dump(yaml.safe_load(shipped_sweeps()["toy"].read_text()) | changes))
        return sweep(tmp_path, "reward.name=custom", "reward.path=mine.py:red", source=f"{home}/sweep.yaml")

    first = copy("a")
    keep_description(first)
    before = first.run({}, "trial-000", 4)
    shutil.rmtree(tmp_path / "a")
    again = copy("b")
    keep_description(again)
    assert again.run({}, "trial-000", 4) == before  # so that the trial's own checkpoints are taken
    assert again.base().reward.path == f"{tmp_path}/b/mine.py:red"
    assert job_of(again, use_gpu=False)["prompts"] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match=r"a text of evaluation.prompts: 'a dog' -> 'a cow'"):
        keep_description(copy("c", "a cow"))


def test_who_edits_the_base_meanwhile_changes_no_trial(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(toy())
    made = sweep(tmp_path, f"config={base}")
    made.planned()
    base.write_text("seed: 7")
    assert made.run({}, "trial", 4).seed == made.to_train({}, "best").seed == 0


def toy() -> str:
    return shipped_configs()["toy"].read_text(encoding="utf-8")


def test_a_guard_that_ends_training_only_warns_in_a_trial(tmp_path: Path) -> None:
    made = sweep(tmp_path, "guard.stop=true", "guard.every=20")
    assert not made.run({}, "trial", 4).guard.stop
    assert made.to_train({}, "best").guard.stop


def test_judges_are_found_from_other_folders_and_checked_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def score(frames, prompts):\n    return frames.mean((2, 3, 4))\n")
    made = sweep(tmp_path, "guard.rewards=[{name: custom, path: 'mine.py:score'}]")
    assert [each.path for each in made.base().guard_rewards] == [f"{tmp_path}/mine.py:score"]
    check(made, made.planned()[:1])
    lost = sweep(tmp_path, "guard.rewards=[{name: fitted, path: nowhere}]")
    with pytest.raises(ValueError, match=r"guard.rewards .*nowhere"):
        check(lost, lost.planned()[:1])


def test_a_base_without_a_clip_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = save_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    made = sweep(
        tmp_path, "reward.name=brightness", "reward.held_out=compression", "model.path=tiny", "model.frames=4",
        "model.size=16", "sampling.steps=2", "evaluation.videos=2",
    )  # fmt: skip
    job = job_of(made, use_gpu=False)
    monkeypatch.chdir("/")
    scores = measure(job, str(run), 3)
    assert Path.cwd() == tmp_path  # for what is written from there
    assert math.isfinite(scores["mean"]["clipsim"])
    assert scores["seconds"] == 75.5
    assert [row["prompt"] for row in scores["rows"]] == made.prompts


def test_a_run_s_lock_is_held_as_network_file_systems_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_nfs_does(file: Any, how: int) -> None:
        if not file.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        taken.append(how)

    taken: list[int] = []
    monkeypatch.setattr(files.fcntl, "flock", as_nfs_does)
    (tmp_path / ".lock").touch()
    trial._wait_for(tmp_path / ".lock")
    assert len(taken) == 1


def test_tune_s_own_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune import TuneError

    def broken(*_: Any) -> None:
        raise TuneError("a trial could not be placed")

    monkeypatch.setattr(tuning_sweep, "run", broken)
    assert main(["toy", f"storage={tmp_path}"]) == 1


def test_nodes_without_the_storage_are_found_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def blind(storage: str, name: str) -> None:
        raise ValueError(f"a node does not see {storage} of {name}")

    monkeypatch.setattr("rlvid.cluster.connect.start_ray", lambda address: None)
    monkeypatch.setattr("rlvid.cluster.nodes.nodes_possible", lambda: [({"CPU": 8.0}, 1.0)])
    monkeypatch.setattr("rlvid.cluster.nodes.check_nodes", blind)
    assert main(["toy", f"storage={tmp_path}"]) == 2
    assert f"a node does not see {tmp_path} of toy-sweep" in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()


def test_where_nothing_was_measured_no_report_is_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = sweep(tmp_path, "algorithm=optuna", "trials=1", "space={seed: {integers: [0, 9]}}")
    keep_description(made)
    journal = Journal(made.folder)
    journal.append({"trial": 0, "settings": {"seed": 1}})
    journal.append({"trial": 0, "invalid": "told before"})
    run(made)
    said = capsys.readouterr().out
    assert "0 to run" in said
    assert "nothing was measured, so there is no report" in said
    assert "report.md" not in said
