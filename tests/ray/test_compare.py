"""The comparison from end to end on the tiny model: runs side by side, and nothing twice."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANG

from rlvid.toy.tiny import save_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in diffusers' layout."""
    home = tmp_path_factory.mktemp("compare")
    save_tiny_model(home)
    return home


def compare(folder: Path, methods: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, ROOT / "jobs" / "compare.py", "--methods", methods, "--seeds", "0", "--videos", "4",
            "--points", "1", "--prompts", "1", "--jobs", "2", "--out", folder / "out", f"model.path={folder}",
            "model.frames=4", "model.size=16", "data.count=6", "sampling.steps=4", "reward.segments=2",
            "train.batch_size=4", "train.workers=1", "train.zero_stage=0",
        ],
        capture_output=True, text=True, timeout=HANG, cwd=folder,
    )  # fmt: skip


@pytest.mark.slow
def test_methods_are_trained_scored_and_compared_once(folder: Path) -> None:
    done = compare(folder, "instructvideo,few=rwr:method.inner_steps=1")
    logs = "".join(path.read_text() for path in (folder / "out").glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    table = (folder / "out" / "comparison.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["base", "instructvideo", "few"]
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:]] == ["0", "4", "4"]
    assert (folder / "out" / "comparison.png").stat().st_size > 10_000
    assert len(list((folder / "out" / "tensorboard").glob("*/events.*"))) == 2
    found = {path: path.stat().st_mtime for path in (folder / "out").glob("*/points.json")}
    assert len(found) == 2
    again = compare(folder, "instructvideo,few=rwr:method.inner_steps=1")
    assert again.returncode == 0, again.stderr
    assert "training" not in again.stdout
    assert {path: path.stat().st_mtime for path in found} == found
