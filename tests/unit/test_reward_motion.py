"""The part of a mixture that holds the motion of the base model's videos."""

from typing import Any

import pytest
import torch
from helpers import clips, flat_gradient, make
from torch import Tensor

from rlvid.config import parse_config
from rlvid.evaluate import metrics
from rlvid.reward.load import check_reward, scores_whole_videos, trained_reward
from rlvid.reward.mixture import MixtureReward
from rlvid.reward.motion import MotionReward, motion

PART = {"name": "motion", "floor": 0.1, "weight": 2.0}
MIXTURE = {"mixture": [{"name": "brightness"}, PART], "held_out": None}


def video(step: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A video (1, 4, 3, 8, 8) that brightens by ``step`` a frame, and so has that motion."""
    return (0.2 + step * torch.arange(4, dtype=dtype))[None, :, None, None, None].expand(1, 4, 3, 8, 8)


def test_the_score_is_a_hinge_at_the_floor() -> None:
    reward = MotionReward(0.1)
    steps = (0.0, 0.025, 0.05, 0.1, 0.2)
    frames = torch.cat([video(step) for step in steps])
    scores_B = reward(frames, ["a dog"] * 5)
    torch.testing.assert_close(scores_B, torch.tensor([-1.0, -0.75, -0.5, 0.0, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(motion(frames), torch.tensor(steps), atol=1e-6, rtol=0)
    assert reward(frames.bfloat16(), ["a dog"] * 5).dtype == torch.float32
    assert reward(video(0.5), ["a dog"]) == 0
    assert motion(video(0.5).clamp(0, 1)) < motion(video(0.5)), "pixels that leave the range are cut off first"


def test_an_evaluation_measures_the_same_motion() -> None:
    assert metrics.motion is motion
    with pytest.raises(ValueError, match=r"^motion: a clip has 1 frame"):
        MotionReward(0.1)(torch.zeros(1, 1, 3, 4, 4), ["a dog"])


def test_the_gradient_is_that_of_finite_differences_and_none_above_the_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    frames = (0.4 + 0.2 * noise).requires_grad_()
    moved = float(motion(frames).max().detach())
    assert torch.autograd.gradcheck(lambda x: MotionReward(1.5 * moved)(x, ["", ""]), (frames,))
    (below,) = torch.autograd.grad(MotionReward(1.5 * moved)(frames, ["", ""]).sum(), frames)
    faster = motion((frames + 1e-3 * below / below.abs().max()).detach())
    assert bool((faster > motion(frames)).all())
    (above,) = torch.autograd.grad(MotionReward(0.5 * moved)(frames, ["", ""]).sum(), frames)
    assert not above.any()


def test_a_run_trains_on_a_mixture_with_it() -> None:
    config = parse_config({"reward": MIXTURE})
    reward = trained_reward(config.reward)
    assert isinstance(reward, MixtureReward)
    assert reward.labels == ["brightness", "motion"]
    frames = video(0.05)
    expected = frames.mean() + 2 * (0.05 / 0.1 - 1)
    torch.testing.assert_close(reward(frames, ["a dog"]), expected[None], atol=1e-5, rtol=0)
    check_reward(config.reward, needs_gradient=True)
    assert scores_whole_videos(config.reward)
    method = make({"name": "draft"}, reward=MIXTURE)
    method.context.reward = reward
    gradient, (update,) = flat_gradient(method, clips(method))
    assert gradient.isfinite().all()
    assert gradient.any()
    total, count = update.metrics["reward/part_motion"]
    assert count == 4
    assert -4 <= total <= 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"mixture": [{"name": "motion"}]},
            r"reward\.mixture\.0: floor is not set.*floor=0\.03; .*rlvid evaluate --base",
        ),
        ({"mixture": [{"name": "brightness", "floor": 0.1}]}, r"floor = 0\.1 is for name = 'motion'"),
        ({"mixture": [PART | {"floor": 0}]}, r"reward\.mixture\.0\.floor = 0.*greater than 0"),
        ({"mixture": [PART | {"path": "weights"}]}, r"the reward 'motion' takes no path"),
        ({"name": "motion"}, r"reward\.name = 'motion'"),
        ({"held_out": "motion"}, r"reward\.held_out = 'motion'"),
    ],
)
def test_what_does_not_fit_is_named(reward: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"reward": reward})


def test_parts_without_a_floor_are_hashed_as_before() -> None:
    part = parse_config({"reward": {"mixture": [{"name": "brightness"}]}}).reward.mixture[0]
    assert part.model_dump() == {"name": "brightness", "path": None, "weight": 1.0, "preprocess": None}
    first, other = (parse_config({"reward": {"mixture": [PART | {"floor": floor}]}}) for floor in (0.1, 0.2))
    assert first.fingerprint != other.fingerprint
    assert parse_config(first.model_dump(mode="json")) == first
