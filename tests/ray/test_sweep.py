"""A sweep from end to end on the tiny model: its driver is killed, and nothing is lost or done twice."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from kill_sweep import facts, run_killed, written

from rlvid.config import load_config
from rlvid.toy.tiny import save_tiny_model
from rlvid.train.preflight import check
from tuning.journal import Journal
from tuning.load import load_sweep
from tuning.sweep import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in diffusers' layout, and a sweep of two trials on it."""
    home = tmp_path_factory.mktemp("sweep")
    save_tiny_model(home / "model")
    settings = {
        "model.path": str(home / "model"), "model.frames": 4, "model.size": 16, "data.count": 6, "sampling.steps": 4,
        "train.batch_size": 4, "train.workers": 1, "train.zero_stage": 0, "optimizer.lr": 0.1, "optimizer.warmup": 0,
    }  # fmt: skip
    sweep = {
        "name": "tiny", "config": "toy", "storage": str(home), "settings": settings, "algorithm": "grid",
        "space": {"reward.attenuation": [0, "inf"], "reward.segments": [2]}, "rungs": [1, 2], "reduction": 2,
        "concurrent": 2, "evaluation": {"videos": 2},
    }  # fmt: skip
    (home / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return home


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_best_settings_are_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = folder / "tiny"
    standing = run_killed(["sweep.yaml"], home, [1], cwd=folder)
    sweep = load_sweep(str(folder / "sweep.yaml"))
    found = facts(sweep, standing)
    assert {name: value for name, (value, right) in found.items() if not right} == {}
    assert (found["drivers killed"][0], found["trials"][0]) == (1, 2)
    for trial in Journal(home).trials:
        assert trial.judged == ([1, 2] if trial.end == "finished" else [1])
        for step in trial.judged:
            state = json.loads((home / trial.name / f"step-{step:06d}" / "state.json").read_text())
            assert state["config"]["reward"]["segments"] == trial.settings["reward.segments"]
    with open(home / "report" / "results.csv", newline="") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [f"trial-{i:03d}" for i in range(2)]

    before = written(home)  # nothing is left to do
    monkeypatch.chdir(folder)
    assert main(["sweep.yaml"]) == 0
    assert "; 0 to run" in capsys.readouterr().out
    assert written(home) == before

    best = load_config(str(home / "report" / "best.yaml"), [])
    chosen = json.loads((home / "trial-000" / "step-000001" / "state.json").read_text())["config"]
    assert best.name == "tiny-best"
    assert best.model.path == str(folder / "model")
    assert best.optimizer.model_dump(mode="json") == chosen["optimizer"]
    check(best)
