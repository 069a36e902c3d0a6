"""RWR and RAFT, each held to an independent calculation."""

import math
from typing import Any

import pytest
import torch
from helpers import clips, flat_gradient, make

from rlvid import randomness
from rlvid.algorithms.raft import best_of_each, best_share, kept_weights
from rlvid.algorithms.rwr import exponential_weights
from rlvid.algorithms.scoring import all_rewards
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
    assert kept_weights(torch.tensor([False, True, False, False])).tolist() == [0.0, 4.0, 0.0, 0.0]
    assert kept_weights(torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_rewards_that_differ_by_rounding_are_equals() -> None:
    """Whatever rounding makes of them, as the number of workers and the micro-batches do."""
    prompts, generator = ["a", "b", "a", "b", "a", "b"], torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = torch.randint(-2, 3, (6,), generator=generator) * 2.0**-19  # units in the last place of 21.3
        same = torch.full((6,), 21.3) + noise
        assert best_of_each(prompts, same).tolist() == [True, True, False, False, False, False]
        assert best_share(same, 0.5).tolist() == [True, True, True, False, False, False]
        assert best_share(same + torch.tensor([0, 0, -1, 1, 0, 1]), 0.5).tolist() == [1, 0, 0, 1, 0, 1]
        assert exponential_weights([""] * 6, same, 1e9).tolist() == [1.0] * 6
        assert best_share(-same, 0.5).tolist() == [True, True, True, False, False, False]
        assert exponential_weights([""] * 6, -same, 1e9).tolist() == [1.0] * 6
        assert exponential_weights([""] * 6, same - torch.arange(6) // 3, 1e9).tolist() == [2.0] * 3 + [0.0] * 3
    coarse = torch.tensor([21.25, 21.375, 20.0])
    assert best_share(coarse, 1 / 3).tolist() == [False, True, False]
    assert best_share(coarse, 1 / 3, 2.0**-7).tolist() == [True, False, False]
    assert best_share(torch.tensor([-1.0, 0.0, -2.0, 0.0]), 0.25).tolist() == [False, True, False, False]
    far = torch.tensor([0.1, 0.3, 0.2, -1e9])  # an outlier does not make the others equals
    assert best_share(far, 0.25).tolist() == [False, True, False, False]
    assert exponential_weights([""] * 4, far, 1.0).argmax() == 1


@pytest.mark.parametrize("settings", [{"name": "rwr"}, {"name": "raft", "share": 0.5}])
def test_equal_videos_are_chosen_by_their_place_alone(settings: dict[str, Any]) -> None:
    chosen = []
    for size in (1, 2, 4):
        method = make(settings, train={"batch_size": 4, "micro_batch": size})
        method.context.reward = lambda frames, prompts: torch.full(frames.shape[:2], 21.3) + frames.mean() * 1e-6
        batch = clips(method)
        _, scores = method.collect(batch)
        prompts, rewards, rounding = all_rewards(method.context.workers, batch, scores)
        assert rounding == 2.0**-19
        chosen.append(method.weights(prompts, torch.tensor(rewards), rounding).tolist())
    assert chosen == [[2.0, 2.0, 0.0, 0.0] if settings["name"] == "raft" else [1.0] * 4] * 3


def test_settings_choose_between_the_batch_and_a_prompts_own_samples() -> None:
    prompts, reward = ["a", "a", "b", "b"], torch.tensor([1.0, 2.0, 5.0, 9.0])
    groups: dict[str, Any] = {"train": {"batch_size": 4, "group_size": 2}}
    own = make({"name": "rwr", "per_prompt": True, "beta": 1.0}, **groups).weights(prompts, reward, 2.0**-19)
    assert own.tolist() == pytest.approx(exponential_weights(prompts, reward, 1.0).tolist())
    whole = make({"name": "rwr", "beta": 1.0}).weights(prompts, reward, 2.0**-19)
    assert whole.tolist() == pytest.approx(exponential_weights([""] * 4, reward, 1.0).tolist())
    assert make({"name": "raft", "keep": "local"}, **groups).weights(prompts, reward, 2.0**-19).tolist() == [0, 2, 0, 2]
    assert make({"name": "raft", "share": 0.5}).weights(prompts, reward, 2.0**-19).tolist() == [0, 0, 2, 2]


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
        abar = context.model.path.abar[t][:, None, None, None, None]
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
