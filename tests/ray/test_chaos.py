"""A seeded kill in short, of a node with its worker; drivers die in test_sweep.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANG

from rlvid.toy.tiny import save_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_kill_changes_nothing(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny")
    command = [
        sys.executable, ROOT / "tests" / "faults" / "chaos.py", "--kills", "1", "--victims", "raylet", "--seed", "3",
        "--out", tmp_path / "outcomes.json",
        f"model.path={tmp_path / 'tiny'}", "train.workers=1", "model.frames=4", "model.size=16", "reward.segments=2",
        f"output.storage={tmp_path / 'runs'}",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_API")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1.5 * HANG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert [each["victim"] for each in outcomes] == ["raylet"]
    assert all(each["faults"] == [] for each in outcomes)
    assert max(each["after_step"] for each in outcomes) > 0, "nothing was killed in the middle of its work"
    assert "equal, bit for bit" in done.stdout
