"""The benchmark of a policy gradient's signal: its sums, held to other ways to them, and a whole measurement."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import make, parameters

from jobs.benchmark import policy_signal
from rlvid.algorithms.base import Batch
from rlvid.algorithms.rollout import replay, roll_out
from rlvid.algorithms.scoring import score
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.step import ddim, step_mean
from rlvid.toy.tiny import save_tiny_model


def test_a_steps_gradient_is_that_of_grpos_log_probabilities() -> None:
    method = make(
        {"name": "grpo", "window": 1, "window_range": [0.3, 0.6], "same_start": True}, train={"group_size": 4}
    )
    context = method.context
    text_BLD = context.model.encode_prompts(["a dog"])
    batch = Batch(0, [4, 5, 6, 7], ["a dog"] * 4, text_BLD.expand(4, -1, -1), None)
    rollout = roll_out(context, batch)
    found = policy_signal.measure_step(context, batch, rollout.states[0][1][None], 1, 2)
    taken = rollout.at(torch.ones(4, dtype=torch.int64))
    now = replay(context, taken)
    reward_G = found["reward"]
    advantage_G = (reward_G - reward_G.mean()) / reward_G.std(correction=0)
    loss = (advantage_G * now.log_probability_B).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters(method))])
    elements, spread = taken.before_BCFhw[0].numel(), float(now.kernel.spread.flatten()[0])
    got = found["this step, 4 videos"] / spread / elements
    assert policy_signal.cosine(got, expected) > 0.9999
    assert float(got.norm()) == pytest.approx(float(expected.norm()), rel=1e-2)
    assert float(found["h"].norm()) > 0


def test_the_rewards_own_gradient_is_that_of_finite_differences() -> None:
    method = make(
        {"name": "grpo", "window": 1, "same_start": True}, train={"group_size": 4}, reward={"segments": 4},
        dtype=torch.float64,
    )  # fmt: skip
    context, step, pathwise = method.context, 1, 3
    model, grid, config = context.model, context.grid, context.config
    text_BLD = model.encode_prompts(["a dog"])
    batch = Batch(0, [4, 5, 6, 7], ["a dog"] * 4, text_BLD.expand(4, -1, -1), None)
    before = context.normal("start", batch.take([0])).double()
    found = policy_signal.measure_step(context, batch, before, step, pathwise)
    weights, generator = parameters(method), torch.Generator().manual_seed(1)
    direction = [torch.randn(each.shape, generator=generator).to(each) for each in weights]
    now, then = model.path.level(grid[step], before), model.path.level(grid[step + 1], before)
    noise_G = context.normal("ddim", batch, step)

    @torch.no_grad()
    def reward(distance: float) -> float:
        """The mean reward of the videos, where the weights are moved in this one step alone."""
        for parameter, way in zip(weights, direction, strict=True):
            parameter.add_(distance * way)
        prediction = model.predict(before, grid[step], text_BLD, config.sampling.guidance)
        for parameter, way in zip(weights, direction, strict=True):
            parameter.sub_(distance * way)
        kernel = ddim(now, then, 1.0)
        after_G = step_mean(prediction, then, kernel) + kernel.spread * noise_G
        latents = denoise(model, after_G, batch.text_BLD, grid[step + 1 :], guidance=config.sampling.guidance)
        return float(score(context, batch, latents).reward_B[:pathwise].double().mean())

    expected = (reward(1e-3) - reward(-1e-3)) / 2e-3
    slope = float(found["h"].double() @ torch.cat([each.flatten() for each in direction]).double())
    assert slope == pytest.approx(expected, rel=1e-2)


def test_agreement_and_the_mean_of_the_batch_are_what_they_say() -> None:
    h_PN = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    assert policy_signal.agreement(h_PN) == pytest.approx(((1 + 0 + 2) / 3) / ((1 + 2 + 4) / 3))
    generator = torch.Generator().manual_seed(0)
    here, expected = [], []
    rewards_PG = torch.randn(3, 4, generator=generator) + torch.tensor([[0.0], [3.0], [5.0]])
    for reward_G in rewards_PG:
        noise_GN = torch.randn(4, 6, generator=generator)
        own_G = (reward_G - reward_G.mean()) / reward_G.std(correction=0)
        own = {"this step, 4 videos": (own_G[:, None] * noise_GN).mean(0), "mean noise": noise_GN.mean(0)}
        here.append(own | {"reward": reward_G, "this step, 2 videos": torch.zeros(6)})
        expected.append(((reward_G - rewards_PG.mean())[:, None] * noise_GN).mean(0))
    torch.testing.assert_close(policy_signal.of_the_batch(here), torch.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_signal_of_a_model_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "tiny")
    tiny = [f"model.path={tmp_path / 'tiny'}", "model.frames=4", "model.size=16", "reward.segments=2"]
    out = tmp_path / "signal.json"
    tiny.append("sampling.steps=4")
    policy_signal.main(
        ["--prompts", "2", "--group", "5", "--steps", "0", "2", "--pathwise", "1", "--out", str(out), *tiny]
    )
    found = json.loads(out.read_text())
    ways = ["this step, 4 videos", "this step, 5 videos", "all steps, 5 videos", "this step, mean of the batch"]
    assert [(row["step"], row["way"]) for row in found["rows"]] == [(step, way) for step in (0, 2) for way in ways]
    assert all(-1 <= row["cosine"] <= 1 and math.isfinite(row["agreement"]) for row in found["rows"])
    assert all(math.isfinite(row["signal"]) for row in found["rows"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| 2 | all steps, 5 videos |" in capsys.readouterr().out
    for wrong, words in (
        (["--steps", "3"], "are 0 to 2"),
        (["--prompts", "1"], "--prompts and --group must be 2 or more"),
        (["--group", "1"], "--prompts and --group must be 2 or more"),
        (["--out", str(tmp_path / "signal.png")], "--out .*png"),
        (["train.group_size=8"], "train.group_size is set by this benchmark"),
        (["reward.name=oracle", "reward.held_out=null"], "'oracle' gives no gradient"),
        (["model.finetune=full"], "model.finetune = 'full'"),
    ):
        with pytest.raises(ValueError, match=words):
            policy_signal.main([*tiny, *wrong])
