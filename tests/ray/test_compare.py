"""Methods side by side from end to end on the tiny model: a sweep of variants and seeds at a budget, nothing twice."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANG

from rlvid.toy.tiny import save_tiny_model
from tuning.sweep import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in diffusers' layout."""
    home = tmp_path_factory.mktemp("compare")
    save_tiny_model(home)
    return home


@pytest.mark.slow
def test_methods_are_trained_scored_and_compared_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "methods", "name=out", f"storage={folder}", "unit=videos", "rungs=[4]", "evaluation={videos: 2, copies: 2}",
        "space.seed=[0]", "space.variant={instructvideo: {}, few: {config: toy-rwr, method.inner_steps: 1}}",
        f"model.path={folder}", "model.frames=4", "model.size=16", "data.count=6", "sampling.steps=4",
        "reward.segments=2", "train.batch_size=4",
    ]  # fmt: skip
    command, out = [sys.executable, ROOT / "tuning" / "sweep.py", *arguments], folder / "out"
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, cwd=folder, check=False)
    logs = "".join(path.read_text() for path in (out / "logs").glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    table = (out / "report" / "comparison.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["base", "instructvideo", "few"]
    assert [line.split("|")[3].strip() for line in table.splitlines()[4:]] == ["0", "4", "4"]
    assert "Diversity" in table
    assert (out / "report" / "comparison.png").stat().st_size > 10_000
    assert len(list((out / "hparams").iterdir())) == 2
    found = {path: path.stat().st_mtime for path in out.glob("*-seed0/rungs/*.json")}
    assert len(found) == 2
    monkeypatch.chdir(folder)
    assert main(arguments) == 0
    assert "; 0 to run" in capsys.readouterr().out
    assert {path: path.stat().st_mtime for path in found} == found
