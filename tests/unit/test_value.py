"""DPOK's value network: what it computes and how it is fitted, held to plain torch."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import torch
from helpers import TwoParameters, clips, make
from torch import Tensor
from torch.nn import functional as F

from rlvid import randomness
from rlvid.algorithms.base import WorkerGroup
from rlvid.algorithms.dpok import Dpok
from rlvid.algorithms.rollout import roll_out_and_score
from rlvid.algorithms.value import ValueNetwork


def test_a_value_is_of_two_convolutions_the_mean_word_and_sinusoids_of_the_timestep() -> None:
    network = ValueNetwork(3, 5, width=8)
    latents, text, timestep = torch.randn(2, 3, 5, 8, 8), torch.randn(2, 7, 5), torch.tensor([901, 1])
    state, seen = network.state_dict(), latents
    for layer in ("look.0", "look.2"):
        assert state[f"{layer}.weight"].shape[2:] == (3, 3, 3)
        seen = F.silu(F.conv3d(seen, state[f"{layer}.weight"], state[f"{layer}.bias"], stride=2, padding=1))
    read = F.linear(text.mean(1), state["read.weight"], state["read.bias"])
    angle = timestep[:, None] * 1000 ** (-torch.arange(4) / 3)  # periods from 2 pi to 2000 pi steps
    parts = torch.cat([seen.flatten(2).mean(2), read, angle.sin(), angle.cos()], dim=1)
    hidden = F.silu(F.linear(parts, state["judge.0.weight"], state["judge.0.bias"]))
    expected = F.linear(hidden, state["judge.2.weight"], state["judge.2.bias"])
    assert expected.shape == (2, 1)
    torch.testing.assert_close(network(latents, text, timestep), expected[:, 0], atol=1e-5, rtol=1e-5)
    assert network(latents.bfloat16(), text.bfloat16(), timestep).dtype == torch.float32


def test_rows_of_zeros_behind_a_prompt_do_not_count() -> None:
    network = ValueNetwork(3, 5, width=8)
    latents, text, timestep = torch.randn(3, 3, 5, 8, 8), torch.randn(3, 7, 5), torch.tensor([901.0, 500.0, 1.0])
    text[1, 4:] = 0
    text[2] = 0  # no token at all
    padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - 7))
    value = network(latents, padded, timestep)
    torch.testing.assert_close(value[:2], network(latents, text, timestep)[:2])
    torch.testing.assert_close(value[1:2], network(latents[1:2], text[1:2, :4], timestep[1:2]))
    assert value.isfinite().all()


def test_the_mean_of_rows_that_all_count_is_the_same_to_the_bit() -> None:
    network, (text,) = ValueNetwork(3, 768), torch.randn(1, 4, 77, 768)
    seen: list[Tensor] = []
    network.read.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    network(torch.randn(4, 3, 8, 8, 8), text, torch.arange(4))
    assert torch.equal(seen[0], text.mean(1))


def test_the_value_network_is_drawn_from_the_runs_seed_alone() -> None:
    context, drawn = make({"name": "dpok"}).context, []
    batch = SimpleNamespace(text_BLD=torch.zeros(1, 7, 5))
    for seed, other in ((0, 1), (0, 2), (7, 1)):
        config = context.config.model_copy(update={"seed": seed})
        latents = SimpleNamespace(latent_shape=(2, 3, 4, 4), device=torch.device("cpu"))
        method = Dpok(replace(context, config=config, model=latents))
        torch.manual_seed(other)
        before = torch.get_rng_state()
        method.build(batch)
        assert torch.equal(torch.get_rng_state(), before), "torch's own generator moved"
        network = method.value
        method.build(batch)
        assert method.value is network, "built twice"
        assert network.look[0].in_channels == 2
        drawn.append(torch.cat([p.flatten() for p in network.parameters()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class Against(WorkerGroup):
    """Other workers, whose gradients outweigh one's own."""

    def mean_(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor *= -1


def test_the_value_network_is_fitted_by_adamw_to_the_rewards_of_all_workers() -> None:
    """Over two micro-batches, with a video that takes no part; the error is a mean over the worker's videos."""
    method = make({"name": "dpok", "value_lr": 0.02}, train={"batch_size": 4, "micro_batch": 2})
    method.context.model, method.context.workers = TwoParameters(method.context.model), Against()
    batch = clips(method)
    rollouts, scores = roll_out_and_score(method.context, batch)
    rewards, valid = torch.tensor([[1.0, -2.0], [7.0, 0.5]]), torch.tensor([[True, True], [False, True]])
    scores = [replace(s, reward_B=r, valid_B=v) for s, r, v in zip(scores, rewards, valid, strict=True)]
    method.build(batch)
    network = copy.deepcopy(method.value)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02, weight_decay=0.0)
    picked = set()
    for turn in range(3):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for rollout, reward, sound in zip(rollouts, rewards, valid, strict=True):
            draw = randomness.uniform((), 0, "value", [(serial, turn) for serial in rollout.batch.serials])
            index = (3 * draw).floor().long()
            picked |= set(index.tolist())
            before = torch.stack([rollout.states[row][int(index[row])] for row in range(2)])
            value = network(before, rollout.batch.text_BLD, rollout.point_D[index])
            loss = loss + ((value - reward).square() * sound).sum() / 4
        loss.backward()
        for parameter in network.parameters():
            parameter.grad.neg_()
        optimizer.step()
        error = method.fit_value(batch, rollouts, scores, turn)
        torch.testing.assert_close(error, float(loss.detach()), atol=1e-5, rtol=1e-5)
    assert picked == {0, 1, 2}
    for got, expected in zip(method.value.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
