"""The benchmarks of policy gradients: what is signal and what is noise, and what a batch of GRPO costs."""

import json
import math
from pathlib import Path

import pytest
import torch

from jobs.benchmark import policy_signal, rollout
from rlvid.toy.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a miniature of the built-in model."""
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    save_tiny_model(folder)
    return [f"model.path={folder}", "model.frames=4", "model.size=16", "reward.segments=2", "sampling.steps=4"]


def test_signal_and_noise_of_known_gradients_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    true_N = torch.zeros(400)
    true_N[0] = 3.0
    noise_PN = torch.randn(300, 400, generator=generator)
    h_PN = torch.randn(300, 400, generator=generator) + torch.nn.functional.pad(torch.tensor([4.0, 3.0]), (0, 398))
    (agreement, error), (alignment, other) = policy_signal.jackknife(true_N + noise_PN, h_PN)
    assert abs(agreement - 9 / 400) < 4 * error < 0.02
    assert abs(alignment - 0.8) < 4 * other < 0.2
    (nothing, error), _ = policy_signal.jackknife(noise_PN, h_PN)
    assert abs(nothing) < 4 * error


def test_a_pool_is_weighed_by_advantages_and_steps() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards_PGT = torch.randn(3, 4, 2, generator=generator)
    scores_PGTN = torch.randn(3, 4, 2, 5, generator=generator)
    pool = policy_signal.Pool(rewards_PGT, scores_PGTN, torch.zeros(3, 5), [0, 2], torch.tensor([0.5, 1.0]))
    weight_T = torch.tensor([2.0, 1.0])
    got_PN = pool.gradients(policy_signal.in_group, weight_T, 4)
    for prompt in range(3):
        expected = torch.zeros(5)
        for step in range(2):
            reward_G = rewards_PGT[prompt, :, step]
            advantage_G = (reward_G - reward_G.mean()) / reward_G.std(correction=0)
            expected += weight_T[step] * (advantage_G[:, None] * scores_PGTN[prompt, :, step]).mean(0)
        torch.testing.assert_close(got_PN[prompt], expected, atol=1e-4, rtol=1e-4)


def test_the_signal_of_a_model_is_measured_kept_and_gone_on_with(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "signal"
    arguments = ["--prompts", "3", "--group", "4", "--steps", "0", "2", "--pathwise", "1", "--out", str(out), *tiny]
    policy_signal.main(arguments)
    found = json.loads((out / "signal.json").read_text())
    names = [row["choice"] for row in found["rows"]]
    assert names[:2] == ["step 0", "step 2"]
    assert {"all steps", "all steps, inverse weights", "groups of 2", "the reward's own gradient"} <= {*names}
    assert all(math.isfinite(row["agreement"][0]) for row in found["rows"])
    assert found["parameters"] > 100
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(times) == 3
    (out / "prompt-001.safetensors").unlink()
    policy_signal.main(arguments)
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert [name for name in times if times[name] != again[name]] == ["prompt-001.safetensors"]
    assert json.loads((out / "signal.json").read_text())["rows"] == found["rows"]
    policy_signal.main([*arguments[: -len(tiny) - 1], str(tmp_path / "one"), *tiny, "method.window=1"])
    assert (tmp_path / "one" / "signal.json").is_file()
    with pytest.raises(ValueError, match=r"--steps \[3\]: the random steps of this chain are 0 to 2"):
        policy_signal.main(["--steps", "3", "--out", str(out), *tiny])


def test_a_batch_of_grpo_is_counted_and_timed(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "rollout.json"
    settings = [each for each in tiny if "steps" not in each]
    rollout.main(["--batch", "4", "--repeats", "1", "--out", str(out), *settings, "sampling.steps=6"])
    ways = json.loads(out.read_text())["ways"]
    late = ways.pop("one late step, same start")["rows"] / 4
    assert late < ways.pop("one step, same start")["rows"] / 4 < 14
    assert {name: way["rows"] / 4 for name, way in ways.items()} == {
        "a call for each video and step": 22, "all steps": 22, "window of 4": 20, "one step": 14,
    }  # fmt: skip
    assert ways["a call for each video and step"]["calls"] == 6 + 4 * 5
    assert ways["one step"]["calls"] == 6 + 1
    assert all(way["speed/videos_per_second"] > 0 for way in ways.values())
