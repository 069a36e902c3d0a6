"""A training on a source that is slowed down: what it says, and what the benchmark makes of it."""

from pathlib import Path

import pytest
from runs import settings

from jobs.benchmark import feed


@pytest.mark.slow
def test_a_slow_source_is_said_once_and_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = settings(folder, "slow", "train.workers=1", "train.steps=12", "output.checkpoint_every=12", "guard.every=0")
    found = feed.trained(["toy", *run], folder / "runs" / "slow", slow=1.0)
    assert found["said"] == 1
    assert "reading data.source=builtin is slower than training" in capsys.readouterr().out
    assert 0.5 < found["data"] < found["step"]
    assert found["first step"] > 1
    assert found["peak GiB"] > 0
