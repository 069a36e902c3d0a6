"""A training whose source is slowed down, as the benchmark of the feed runs it and reads its numbers."""

from pathlib import Path

import pytest
from runs import settings

from jobs.benchmark import feed


@pytest.mark.slow
def test_a_training_on_a_slow_source_is_measured(folder: Path) -> None:
    run = settings(folder, "slow", "train.workers=1", "train.steps=4", "output.checkpoint_every=4", "guard.every=0")
    found = feed.trained(["toy", *run], folder / "runs" / "slow", slow=0.5)
    assert found["first step"] > 0.5, "its share takes so long to read"
    assert 0 < found["data"] < found["step"]
    assert found["peak GiB"] > 0
