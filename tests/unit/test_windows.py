"""Windows of random steps and shared starts are for every policy gradient: DDPO's and DPOK's."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import clips, close, flat_gradient, make

from rlvid.algorithms.advantages import others_mean
from rlvid.algorithms.base import Batch, WorkerGroup
from rlvid.algorithms.rollout import roll_out_and_score, windows
from rlvid.algorithms.scoring import plan
from rlvid.config import parse_config

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


def test_each_worker_gets_the_baselines_of_its_own_videos() -> None:
    method = make({"name": "dpok", "baseline": "group", "policy_steps": 1, **WINDOW}, train=PAIRS)
    _, scores = roll_out_and_score(method.context, pairs(method))
    rewards = scores[0].reward_B.tolist()
    own = scores[0].reward_B[[1, 3]]  # the second one of two workers

    class Second(WorkerGroup):
        rank, size = 1, 2

        def gather(self, items: list[Any]) -> list[Any]:
            return [("a dog", reward, 0.0) for reward in rewards]

    method.context = replace(method.context, workers=Second())
    batch = pairs(method).take([1, 3])
    (baseline_B,) = method.group_means(batch, [replace(scores[0], reward_B=own, valid_B=scores[0].valid_B[[1, 3]])])
    assert baseline_B.tolist() == pytest.approx([rewards[0], rewards[2]])


def test_dpok_without_the_kl_term_asks_no_base_model() -> None:
    method = make({"name": "dpok", "kl": 0.0, "baseline": "group", "policy_steps": 1, **WINDOW}, train=PAIRS)
    method.context.model.base = None  # a call would fail
    _, (update,) = flat_gradient(method, pairs(method))
    assert "policy/kl" not in update.metrics
    assert not method.method.needs_base


def test_videos_from_one_start_are_scored_at_the_same_frames() -> None:
    serials = tuple(range(16))
    for same in (True, False):
        settings = {"name": "grpo", "window": 1, "same_start": same}
        method = make(settings, train={"batch_size": 16, "group_size": 4}, reward={"segments": 2})
        frames_PGS = plan(method.context, clips(method, serials)).frames_BS.reshape(4, 4, 2)
        alike = bool((frames_PGS == frames_PGS[:, :1]).all())
        assert alike is same
        assert (frames_PGS[0] != frames_PGS[1:]).any()
    halves = [plan(method.context, clips(method, serials[part::2])).frames_BS for part in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), plan(method.context, clips(method, serials)).frames_BS)


@pytest.mark.parametrize(
    ("method", "group", "words"),
    [
        ({"name": "ddpo", "window": 1, "same_start": True}, 1, ["method.same_start", "train.group_size = 1"]),
        ({"name": "ddpo", "window": 1, "timestep_fraction": 0.5}, 2, ["method.timestep_fraction = 0.5"]),
        ({"name": "dpok", "baseline": "group", "value_lr": 1e-3}, 2, ["method.value_lr = 0.001"]),
        ({"name": "dpok", "baseline": "group", "value_steps": 1}, 2, ["method.value_steps = 1"]),
    ],
)
def test_settings_that_would_do_nothing_are_refused(method: dict[str, Any], group: int, words: list[str]) -> None:
    with pytest.raises(ValueError, match="method") as error:
        parse_config({"method": method, "train": {"group_size": group}})
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_mean_of_the_others_leaves_out_the_video_itself_and_those_without_a_reward() -> None:
    rewards = [1.0, 3.0, math.nan, 10.0, 20.0, 30.0]
    assert others_mean(rewards, 3).tolist() == [3.0, 1.0, 2.0, 25.0, 20.0, 15.0]
    assert others_mean([4.0, math.nan], 2).tolist() == [4.0, 4.0], "a video alone has no advantage"
