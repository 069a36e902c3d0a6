"""The benchmark of a batch of GRPO: its rows and calls of the denoiser."""

import json
from pathlib import Path

import pytest
import torch

from jobs.benchmark import rollout
from rlvid.toy.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a miniature of the built-in model."""
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    save_tiny_model(folder)
    return [f"model.path={folder}", "model.frames=4", "model.size=16", "reward.segments=2"]


@pytest.mark.slow
def test_a_batch_of_grpo_is_counted_and_timed(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "rollout.json"
    torch.set_num_threads(2)
    rollout.main(["--batch", "4", "--repeats", "1", "--out", str(out), *tiny, "sampling.steps=6"])
    found = json.loads(out.read_text())
    assert found["threads"] == torch.get_num_threads() == 1
    ways = found["ways"]
    late = ways.pop("the last step, same start")["rows"] / 4
    assert late < ways.pop("one step, same start")["rows"] / 4 < 14
    assert {name: way["rows"] / 4 for name, way in ways.items()} == {
        "a call for each video and step": 22, "all steps": 22, "window of 4": 20, "one step": 14,
    }  # fmt: skip
    assert ways["a call for each video and step"]["calls"] == 6 + 4 * 5
    assert ways["one step"]["calls"] == 6 + 1
    assert all(way["speed/videos_per_second"] > 0 for way in ways.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", "0"], "--repeats 0"),
        (["--batch", "3"], "--batch 3"),
        (["method.window=2"], "method.window is set by this benchmark"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rollout.main(arguments)
