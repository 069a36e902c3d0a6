"""What every method must do: train the adapter alone, add up, resume, live with a reward that fails."""

import copy
import math
import resource
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clips, close, flat_gradient, make, one_gradient
from torch import Tensor, nn

from rlvid import randomness
from rlvid.algorithms.base import Stopwatch, peak_memory
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.algorithms.scoring import plan
from rlvid.config import load_config, parse_config, shipped_configs
from rlvid.config.methods import METHODS
from rlvid.config.train import OptimizerConfig
from rlvid.models.lora import lora_state
from rlvid.reward.load import load_reward
from rlvid.train.engine import TorchEngine
from rlvid.world.captions import labels_of, write_caption
from rlvid.world.render import render, sample_clips

ALL = ["instructvideo", "draft", "draft-lv", "alignprop", "ddpo", "dpok", "grpo", "rwr", "raft"]


def with_slow(names: list[str], *slow: str) -> list[Any]:
    """Returns the values of a parameter, some of which are slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def test_every_method_has_settings_and_code() -> None:
    assert list(METHODS) == list(ALGORITHMS) == ALL
    shipped = {load_config(name).method.name for name in shipped_configs() if name.startswith("toy")}
    assert shipped == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_the_frames_drawn_do_not_rank_videos(name: str) -> None:
    """The paper's weights add up to another sum for every draw, which a method that compares videos would learn."""
    method = make({"name": name})
    sum_B = plan(method.context, clips(method, tuple(range(64)))).weights_BS.sum(1)
    assert ((sum_B - 1).abs().max() < 1e-6) == (not method.method.needs_gradient)
    assert sum_B.std() > 0.02 or not method.method.needs_gradient
    told = make({"name": name}, reward={"segments": 2, "tar_normalisation": "paper"})
    assert plan(told.context, clips(told, tuple(range(64)))).weights_BS.sum(1).std() > 0.02


@pytest.mark.parametrize("name", ALL)
def test_every_method_trains_the_adapter_and_nothing_else(name: str) -> None:
    method = make({"name": name}, random=name != "rwr", held_out=True)
    gradient, updates = flat_gradient(method, clips(method))
    assert gradient.isfinite().all()
    assert gradient.any()
    assert updates[-1].step
    assert {"reward/weighted", "reward/trained", "reward/held_out"} <= updates[0].metrics.keys()
    assert updates[0].samples is not None
    assert updates[0].samples.serials == [8, 9, 10, 11]
    frozen = [p for n, p in method.context.model.denoiser.named_parameters() if "lora_" not in n]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("name", with_slow(ALL, "draft", "draft-lv", "alignprop", "dpok", "grpo", "rwr"))
def test_micro_batches_with_recomputed_activations_add_up_to_the_batch(name: str) -> None:
    whole = make({"name": name})
    parts = make({"name": name}, train={"micro_batch": 1, "checkpoint_activations": True})
    expected, (first, *_) = flat_gradient(whole, clips(whole))
    got, updates = flat_gradient(parts, clips(parts))
    close(got, expected)
    total = [sum(u.metrics.get("reward/weighted", (0.0, 0.0))[i] for u in updates) for i in (0, 1)]
    repeats = 2 if name == "draft-lv" else 1
    assert total == pytest.approx([repeats * v for v in first.metrics["reward/weighted"]], rel=1e-3)


@pytest.mark.parametrize("name", with_slow(ALL, "draft", "draft-lv", "alignprop", "grpo", "raft"))
def test_a_video_that_the_reward_fails_on_is_left_out_and_counted(name: str) -> None:
    method, clean = make({"name": name}), make({"name": name})
    reward = method.context.reward

    class Failing(nn.Module):
        def forward(self, frames: Tensor, prompts: list[str]) -> Tensor:
            factor = torch.tensor([math.nan if p == "a dog" else 1.0 for p in prompts])
            return reward(frames, prompts) * factor[:, None]  # NaN, and NaN in its derivative

    method.context.reward = Failing()
    gradient, updates = flat_gradient(method, clips(method))
    assert gradient.isfinite().all()
    assert updates[0].metrics["reward/excluded"][0] == 1
    assert updates[0].metrics["reward/weighted"][1] == 3
    assert updates[0].samples.reward_B.isnan().tolist() == [False, True, False, False]
    if name in ("instructvideo", "draft"):  # what is left is the sum of the other three
        losses = [clean.loss(clips(clean, (serial,))).loss / 4 for serial in (8, 10, 11)]
        close(gradient, sum(one_gradient(clean, loss) for loss in losses))
        assert float(updates[0].loss.detach()) == pytest.approx(float(sum(losses).detach()), rel=1e-4)


@pytest.mark.parametrize(  # the others differ in no state
    "name", with_slow(["instructvideo", "draft-lv", "ddpo", "dpok", "raft"], "draft-lv", "dpok", "raft")
)
def test_a_resumed_method_ends_where_an_uninterrupted_one_does(name: str, tmp_path: Path) -> None:
    settings = {"name": name} | ({"min_count": 2} if name == "ddpo" else {})
    # The last batch has a prompt of the first without its company, on which what a process keeps must not depend.
    serials = [(0, 1, 2, 3), (9, 13, 17, 21)]

    def started() -> tuple[Any, TorchEngine]:
        method = make(settings)
        return method, TorchEngine(method.context.model.denoiser, OptimizerConfig(lr=1e-3))

    def run(method: Any, engine: TorchEngine, steps: range) -> list[Tensor]:
        seen = []
        for step in steps:
            batch = replace(clips(method, serials[step]), step=step)
            for update in method.updates(batch):
                seen += [update.loss.detach(), *([update.samples.reward_B] if update.samples else [])]
                engine.backward(update.loss, update.step)
                if update.step:
                    engine.step(step)
        return seen

    straight, first, second = started(), started(), started()
    run(*straight, range(1))
    run(*first, range(1))
    first[1].save(tmp_path)
    torch.save(first[0].state_dict(), tmp_path / "algorithm.pt")
    second[1].load(tmp_path)
    second[0].load_state_dict(torch.load(tmp_path / "algorithm.pt", weights_only=True))
    seen = [run(*each, range(1, 2)) for each in (straight, second)]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))  # the weights may round a difference off
    ends = [lora_state(each[0].context.model.denoiser) for each in (straight, second)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert any(
        not torch.equal(ends[0][key], tensor)
        for key, tensor in lora_state(make(settings).context.model.denoiser).items()
    )


@pytest.mark.parametrize("name", ["draft", "rwr"])
def test_a_reward_that_raises_costs_its_videos_and_a_wrong_shape_ends_the_run(name: str) -> None:
    method = make({"name": name})

    def raising(frames: Tensor, prompts: list[str]) -> Tensor:
        raise ZeroDivisionError

    method.context.reward = raising
    gradient, updates = flat_gradient(method, clips(method))
    assert not gradient.any()
    assert updates[0].metrics["reward/excluded"][0] == 4
    method.context.reward = lambda frames, prompts: torch.zeros(3, 7)
    with pytest.raises(ValueError, match=r"scores of shape \(3, 7\) for 4 videos of 2 frames"):
        flat_gradient(method, clips(method))


def test_noise_follows_the_runs_seed_the_purpose_the_sample_and_the_index() -> None:
    methods = [make({"name": "draft"}) for _ in range(2)]
    seeded = make({"name": "draft"})
    seeded.context.config = seeded.context.config.model_copy(update={"seed": 7})
    batch = clips(seeded)
    first, again, other = (each.context.normal("start", batch) for each in (*methods, seeded))
    assert torch.equal(first, again)
    expected = [randomness.normal(seeded.context.model.latent_shape, 7, "start", [(s, 0)])[0] for s in batch.serials]
    assert torch.equal(other, torch.stack(expected))
    draws = [first, other, seeded.context.normal("noise", batch), seeded.context.normal("start", batch, 1)]
    for one, two in combinations([row for draw in draws for row in draw], 2):
        assert not torch.equal(one, two)


def test_a_stopwatch_adds_up_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 20.0, 21.0, 30.0, 35.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    for name in ("chain", "decode", "chain"):
        with watch.stage(name):
            pass
    assert watch.read() == {"chain": 7.0, "decode": 1.0}
    assert watch.read() == {}


def test_peak_memory_is_that_of_the_process() -> None:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_memory(torch.device("cpu")) == pytest.approx(1024 * kilobytes, rel=0.05)


class Brightness:
    """A reward of whole videos without a gradient."""

    whole_video = True

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return frames.detach().mean((1, 2, 3, 4))


@pytest.mark.parametrize("name", ["ddpo", "dpok", "rwr", "raft"])
def test_rewards_without_gradient_are_learned_from(name: str) -> None:
    method = make({"name": name})
    method.context.reward = Brightness()
    gradient, (first, *_) = flat_gradient(method, clips(method))
    assert gradient.any()
    assert first.samples.frames_BSCHW.shape[1] == 4, "it looks at every frame"
    expected = first.samples.frames_BSCHW.mean((1, 2, 3, 4))
    torch.testing.assert_close(first.samples.reward_B, expected, atol=0.05, rtol=0)  # frames are clamped in the archive
    with pytest.raises(ValueError, match="gives no gradient, which method 'draft' needs"):
        parse_config({"method": "draft", "reward": {"name": "oracle"}})


def test_the_oracle_is_a_reward() -> None:
    shown = sample_clips(3, torch.Generator().manual_seed(0))
    prompts = [write_caption(labels) for labels in labels_of(shown)]
    reward_B = load_reward("oracle")(render(shown), [*prompts[:2], "a dog"])
    assert (reward_B[:2] > 0.9).all()
    assert reward_B[2].isnan()


def test_the_penalty_is_the_distance_to_a_second_copy_of_the_base_model() -> None:
    free, bound = make({"name": "draft", "gradient_steps": 2}), make({"name": "draft", "gradient_steps": 2, "kl": 0.5})
    batch, base = clips(bound), copy.deepcopy(bound.context.model)
    for name, parameter in base.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    seen: list[tuple[Tensor, int]] = []
    kept = bound.penalise
    bound.penalise = lambda step, text: (seen.append((step.before.detach(), step.point)), kept(step, text))
    update = bound.loss(batch)
    with torch.no_grad():
        distances = [
            (bound.context.model.predict(x, t, batch.text_BLD, 3.0).eps - base.predict(x, t, batch.text_BLD, 3.0).eps)
            .square()
            .mean()
            for x, t in seen[-2:]
        ]
    expected = torch.stack(distances).mean()
    assert expected > 0
    assert float(update.metrics["policy/kl"][0]) == pytest.approx(float(expected), rel=1e-5)
    assert float((update.loss - free.loss(batch).loss).detach()) == pytest.approx(float(expected) / 2, rel=1e-3)
    assert not torch.equal(bound.loss(clips(bound, (12, 13))).loss, update.loss)
    assert torch.equal(bound.loss(batch).loss, update.loss), "a micro-batch pays for its own distance alone"
