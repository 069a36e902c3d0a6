"""The benchmark of cheaper steps without gradient, on miniatures of both families."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.benchmark import prefix
from rlvid.toy.tiny import save_tiny_model
from rlvid.toy.tiny_wan import save_tiny_wan


@pytest.mark.parametrize("config", [pytest.param("toy", marks=pytest.mark.slow), "toy-wan"])
def test_each_setting_is_held_to_the_exact_chain(config: str, tmp_path: Path) -> None:
    wan, out = config == "toy-wan", tmp_path / "prefix.json"
    (save_tiny_wan if wan else save_tiny_model)(tmp_path / "tiny")
    shape = ["model.frames=9", "model.size=16"] if wan else ["model.frames=4", "model.size=16"]
    given = ["--videos", "3", "--batch", "2", "--seeds", "1", "2", "--reuse", "2", "--intervals", "0,0.4", "--config"]
    own = [config, "--out", str(out), f"model.path={tmp_path / 'tiny'}", *shape, "reward.segments=2"]
    torch.set_num_threads(2)
    prefix.main([*given, *own, "sampling.steps=20"])
    found = json.loads(out.read_text())
    assert found["threads"] == torch.get_num_threads() == 1
    settings = found["settings"]
    exact = settings.pop("exact")
    length = int(exact["rows"] / 2) - 1
    assert exact["difference"] == exact["reward"]["change"] == exact["oracle"]["change"] == 0
    limited, half, quarter, reuse = settings.values()
    assert length + 1 < limited["rows"] < exact["rows"]
    rows = {"half": length // 2, "quarter": length // 4, "reuse": len({0, 1, *range(0, length, 2)})}
    few = {"half": half, "quarter": quarter, "reuse": reuse}
    assert {name: each["rows"] for name, each in few.items()} == {name: 2 * n + 2 for name, n in rows.items()}
    for each in settings.values():
        assert each["seconds"] > 0
        assert each["difference"] > 0
        low, high = each["reward"]["interval"]
        assert low <= each["reward"]["change"] <= high


def test_differences_are_those_of_the_same_videos() -> None:
    ones, prompts = torch.ones(2, 1, 1, 1, 2), np.arange(2)
    exact = [prefix.Made(4.0, 8, ones, torch.tensor([0.5, 0.7]), torch.tensor([0.1, 0.2]))]
    made = [prefix.Made(1.0, 4, ones * 1.5, torch.tensor([0.6, 0.6]), torch.tensor([0.1, 0.4]))]
    row = prefix.compare(made, exact, prompts)
    assert (row["seconds"], row["rows"], row["difference"]) == (0.5, 2.0, pytest.approx(0.5))
    assert row["reward"]["change"] == pytest.approx(0, abs=1e-6)
    assert row["oracle"]["change"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--videos", "0"], "--videos 0"),
        (["--reuse", "2", "0"], "--reuse 0: must be at least 1"),
        (["--config", "toy-ddpo"], "--config: method 'ddpo'"),
        (["sampling.reuse=2"], "sampling.reuse is set by this benchmark"),
        (["--intervals", "0.6,0.2"], "guidance_interval = "),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prefix.main(arguments)
