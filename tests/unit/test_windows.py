"""Windows of random steps and shared starts are for every policy gradient: DDPO's and DPOK's."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import clips, close, flat_gradient, make

from rlvid.algorithms.advantages import others_mean
from rlvid.algorithms.base import Batch
from rlvid.algorithms.rollout import roll_out_and_score, windows

WINDOW = {"window": 2, "window_range": [0.3, 1.0], "same_start": True}
PAIRS = {"group_size": 2}


def pairs(method: Any) -> Batch:
    """Two videos of each of two prompts."""
    prompts = ["a dog", "a dog", "a blue star growing", "a blue star growing"]
    return replace(clips(method), prompts=prompts, text_BLD=method.context.model.encode_prompts(prompts))


def test_ddpo_with_a_window_and_a_prompts_own_statistics_is_grpo() -> None:
    ddpo = make({"name": "ddpo", "clip_range": 1e-3, "min_count": 2, "buffer": 2, **WINDOW}, train=PAIRS)
    grpo = make({"name": "grpo", **WINDOW}, train=PAIRS)
    gradients = [flat_gradient(method, pairs(method))[0] for method in (ddpo, grpo)]
    close(gradients[0], gradients[1], 1e-4)


def test_ddpo_trains_on_a_share_of_the_window_in_an_order_of_each_videos_own() -> None:
    method = make(
        {"name": "ddpo", "timestep_fraction": 0.5, "inner_epochs": 4, "window": 4, "window_range": [0.5, 1.0]},
        sampling={"steps": 21}, train=PAIRS,
    )  # fmt: skip
    batch = clips(method, tuple(range(40)))
    orders = torch.stack([method.order(batch, epoch) for epoch in range(4)])
    assert orders.shape == (4, 2, 40), "half of four steps"
    for row, own in enumerate(windows(method.context, batch)):
        assert {*orders[..., row].flatten().tolist()} <= {*own}
    assert {*orders.flatten().tolist()} == {*range(10, 20)}
    assert (orders[:, :, 0] != orders[:, :, 1]).any(), "the videos of a prompt share an order"


def test_dpok_takes_its_steps_from_the_window() -> None:
    method = make({"name": "dpok", "policy_steps": 3, **WINDOW, "window": 1}, train=PAIRS)
    batch, (rollouts, _) = pairs(method), roll_out_and_score(method.context, pairs(method))
    firsts = torch.tensor([own[0] for own in windows(method.context, batch)])
    assert all(torch.equal(method.pick(rollouts[0], "policy", turn).index_B, firsts) for turn in range(3))
    gradient, updates = flat_gradient(method, batch)
    assert len(updates) == 3
    assert gradient.norm() > 0


def test_dpok_may_compare_a_reward_with_the_prompts_other_videos() -> None:
    method = make({"name": "dpok", "baseline": "group", "policy_steps": 1, **WINDOW}, train=PAIRS)
    _, scores = roll_out_and_score(method.context, pairs(method))
    reward_B = scores[0].reward_B
    away_B = reward_B - reward_B[[1, 0, 3, 2]]
    _, (update,) = flat_gradient(method, pairs(method))
    assert update.metrics["policy/advantage"] == pytest.approx((float(away_B.abs().sum()), 4.0), rel=1e-4)
    assert "policy/value_error" not in update.metrics
    assert method.value is None
    assert method.state_dict() == {}


def test_the_mean_of_the_others_leaves_out_the_video_itself_and_those_without_a_reward() -> None:
    rewards = [1.0, 3.0, math.nan, 10.0, 20.0, 30.0]
    assert others_mean(rewards, 3).tolist() == [3.0, 1.0, 2.0, 25.0, 20.0, 15.0]
    assert others_mean([4.0, math.nan], 2).tolist() == [4.0, 4.0], "a video alone has no advantage"
