"""RWR and RAFT, each held to an independent calculation."""

import math

import pytest
import torch
from helpers import clips, flat_gradient, make

from rlvid import randomness
from rlvid.algorithms.raft import best_of_each, best_share, kept_weights
from rlvid.algorithms.rwr import exponential_weights
from rlvid.algorithms.supervised import trained_rows


def test_exponential_weights_by_hand() -> None:
    reward = torch.tensor([1.0, 3.0, math.nan, 2.0])
    total = math.exp(0.5) + math.exp(1.5) + math.exp(1.0)
    expected = [3 * math.exp(0.5) / total, 3 * math.exp(1.5) / total, 0.0, 3 * math.exp(1.0) / total]
    assert exponential_weights([""] * 4, reward, 0.5).tolist() == pytest.approx(expected)
    pair = 2 / (1 + math.exp(0.5 * 2))
    grouped = exponential_weights(["a", "a", "b", "b"], reward, 0.5).tolist()
    assert grouped == pytest.approx([pair, 2 - pair, 0.0, 1.0])


def test_ranking_by_hand() -> None:
    prompts = ["a", "b", "a", "b", "c", "c"]
    reward = torch.tensor([0.1, 0.9, 0.3, 0.9, math.nan, math.nan])
    assert best_of_each(prompts, reward).tolist() == [False, True, True, False, False, False]
    assert best_share(reward, 0.5).tolist() == [False, True, True, True, False, False]
    assert best_share(reward, 1.0).tolist() == [True, True, True, True, False, False]
    assert kept_weights(torch.tensor([True, False, True, False])).tolist() == [2.0, 0.0, 2.0, 0.0]
    assert kept_weights(torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_workers_train_on_the_same_number_of_videos() -> None:
    weight = torch.tensor([0.0, 2.0, 0.0, 1.0, 3.0, 0.0])
    assert trained_rows(weight, 0, 1) == [1, 3, 4]
    assert [trained_rows(weight, rank, 2) for rank in range(2)] == [[0, 2], [0, 1]]
    assert [trained_rows(torch.zeros(4), rank, 2) for rank in range(2)] == [[0], [0]]


@pytest.mark.parametrize("guided", [False, True])
def test_the_supervised_loss_is_weighed_noise_prediction_on_the_best(guided: bool) -> None:
    method = make({"name": "raft", "share": 0.5, "inner_steps": 2, "guided": guided})
    batch, context = clips(method), method.context
    latents, (scored,) = method.collect(batch)
    best = scored.reward_B.argsort(descending=True)[:2].sort().values.tolist()
    losses = []
    for turn in range(2):
        serials = [batch.serials[row] for row in best]
        draw = randomness.uniform((), context.config.seed, "supervised-timestep", [(s, turn) for s in serials])
        t, noise = (draw * 1000).long(), context.normal("supervised-noise", batch.take(best), turn)
        abar = context.model.abar[t][:, None, None, None, None]
        noisy = abar.sqrt() * latents[best] + (1 - abar).sqrt() * noise
        text = batch.text_BLD[best]
        eps = context.model.denoiser(noisy, t, encoder_hidden_states=text).sample
        if guided:
            empty = context.model.denoiser(
                noisy, t, encoder_hidden_states=context.model.encode_prompts(["", ""])
            ).sample
            eps = empty + 3 * (eps - empty)
        losses.append((eps - noise).square().mean())
    _, updates = flat_gradient(method, batch)
    assert [u.step for u in updates] == [True, True]
    for update, loss in zip(updates, losses, strict=True):
        assert float(update.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
