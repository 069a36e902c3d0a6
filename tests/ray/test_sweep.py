"""A sweep from end to end on the tiny model: its driver is killed, and nothing is lost or done twice."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlvid.toy.tiny import save_tiny_model
from tuning.journal import Journal

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in diffusers' layout, and a sweep of four trials on it."""
    home = tmp_path_factory.mktemp("sweep")
    save_tiny_model(home / "model")
    settings = {
        "model.path": str(home / "model"), "model.frames": 4, "model.size": 16, "data.clips": 6, "sampling.steps": 4,
        "train.batch_size": 4, "train.workers": 1, "train.zero_stage": 0, "optimizer.lr": 1e-3, "optimizer.warmup": 0,
    }  # fmt: skip
    sweep = {
        "name": "tiny", "config": "toy", "storage": str(home), "settings": settings, "algorithm": "grid",
        "space": {"reward.attenuation": [0, "inf"], "reward.segments": [1, 2]}, "rungs": [1, 2], "reduction": 2,
        "concurrent": 2, "evaluation": {"videos": 2},
    }  # fmt: skip
    (home / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return home


def start(folder: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "tuning" / "sweep.py"), "sweep.yaml", *more]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def kept(home: Path) -> dict[Path, int]:
    """When each score and each checkpoint was written; a file's time in nanoseconds."""
    found = [*home.glob("trial-*/rungs/*.json"), *home.glob("trial-*/step-*/state.json")]
    return {path: path.stat().st_mtime_ns for path in found}


def test_a_killed_sweep_goes_on_and_its_best_settings_train(folder: Path) -> None:
    home = folder / "tiny"
    first = start(folder)
    until = time.monotonic() + 300
    while not list(home.glob("trial-*/rungs/*.json")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < until, "nothing was measured within five minutes"
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = kept(home)
    assert len(Journal(home).trials) == 4
    assert any(trial.end is None for trial in Journal(home).trials)

    again = start(folder)
    text, _ = again.communicate(timeout=500)
    assert again.returncode == 0, text
    assert {path: time for path, time in kept(home).items() if path in before} == before
    trials = Journal(home).trials
    assert [trial.end in ("finished", "stopped early") for trial in trials] == [True] * 4
    for trial in trials:
        assert trial.judged == ([1, 2] if trial.end == "finished" else [1])  # each rung once
        for step in trial.judged:
            state = json.loads((home / trial.name / f"step-{step:06d}" / "state.json").read_text())
            assert state["step"] == step
            assert state["config"]["reward"]["segments"] == trial.settings["reward.segments"]
    with open(home / "report" / "results.csv", newline="") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [f"trial-{i:03d}" for i in range(4)]

    done = start(folder)  # nothing is left to do
    text, _ = done.communicate(timeout=100)
    assert done.returncode == 0, text
    assert "; 0 to run" in text
    changed = start(folder, "space.reward.segments=[1, 4]")
    text, _ = changed.communicate(timeout=100)
    assert changed.returncode == 2
    assert "space.reward.segments: [1, 2] -> [1, 4]" in text

    best = [sys.executable, "-m", "rlvid.cli", "train", home / "report" / "best.yaml", "train.steps=1", "name=best"]
    trained = subprocess.run(
        [*map(str, best), "output.videos_every=0"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (folder / "best" / "step-000001" / "adapter" / "adapter_model.safetensors").is_file()
