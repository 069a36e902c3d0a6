"""The settings that make a chain cheaper: guidance in an interval, fewer steps and forecasts before the gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import clips, flat_gradient, make
from torch import Tensor

from rlvid.config import load_config, parse_config
from rlvid.diffusion.chain import Step, denoise
from rlvid.diffusion.schedule import check_chain, with_prefix
from rlvid.models.base import VideoModel
from rlvid.models.guidance import LimitedGuidance
from rlvid.models.noise_path import Level
from rlvid.plan.counts import count
from rlvid.toy.tiny import tiny_model
from rlvid.toy.tiny_wan import tiny_wan

MODELS: dict[str, Callable[[], VideoModel]] = {"unet3d": tiny_model, "wan": tiny_wan}
DRAFT = {"name": "draft", "gradient_steps": 2}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> VideoModel:
    return MODELS[request.param]()


def inputs(model: VideoModel) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return noise, model.encode_prompts(["a red circle moving left", "a dog"])


def level(model: VideoModel, point: float) -> Level:
    return model.path.level(point, torch.empty(1))


def by_hand(
    model: VideoModel, x: Tensor, text: Tensor, grid: Any, guidance: Callable[[float], float] = lambda share: 3.0
) -> Tensor:
    """DDIM's steps, or Euler's: x' = alpha' x0 + sigma' eps, with a guidance by the share of noise."""
    for place, point in enumerate(grid):
        now = level(model, point)
        share = float(now.sigma.double() / (now.alpha.double() + now.sigma.double()))
        found = model.predict(x, point, text, guidance(share))
        then = level(model, grid[place + 1]) if place + 1 < len(grid) else model.path.final("exact", x)
        x = then.alpha * found.x0 + then.sigma * found.eps
    return x


def rows_of(model: VideoModel, run: Callable[[], Any]) -> list[int]:
    """The rows of each call of the denoiser."""
    rows: list[int] = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        run()
    finally:
        hook.remove()
    return rows


# ------------------------------------------------------------------------------------------------------- guidance


@torch.no_grad()
def test_the_chain_at_the_defaults_stays_bit_for_bit(model: VideoModel) -> None:
    latents, text = inputs(model)
    grid = model.path.grid(6)
    expected = by_hand(model, latents, text, grid)
    assert torch.equal(denoise(model, latents, text, grid, guidance=3.0), expected)
    assert torch.equal(denoise(model, latents, text, grid, guidance=LimitedGuidance(3.0, 0, 1)), expected)


@torch.no_grad()
def test_outside_its_interval_guidance_takes_the_conditional_branch_alone(model: VideoModel) -> None:
    latents, text = inputs(model)
    grid, limited = model.path.grid(6), LimitedGuidance(3.0, 0.4, 0.8)
    inside: list[bool] = []

    def guidance(share: float) -> float:
        inside.append(0.4 < share <= 0.8)
        return 3.0 if inside[-1] else 1.0

    expected = by_hand(model, latents, text, grid, guidance)
    assert 0 < sum(inside) < len(inside)
    assert not inside[0]
    assert not inside[-1]
    assert torch.equal(denoise(model, latents, text, grid, guidance=limited), expected)
    assert rows_of(model, lambda: denoise(model, latents, text, grid, guidance=limited)) == [
        4 if guided else 2 for guided in inside
    ]


def test_the_ends_of_an_interval_are_open_below_and_closed_above() -> None:
    path = tiny_wan().path
    limited = LimitedGuidance(3.0, 0.1, 0.7)
    assert [limited.at(path, point) for point in (0.1, 0.11, 0.7, 0.71)] == [1.0, 3.0, 3.0, 1.0]
    float32 = torch.tensor([0.1, 0.7])
    assert torch.as_tensor(limited.at(path, float32)).tolist() == [1.0, 3.0], "whatever the rounding of a point"


@pytest.mark.parametrize("gradient", [True, False])
def test_each_video_has_the_guidance_of_its_own_level(model: VideoModel, gradient: bool) -> None:
    latents, text = inputs(model)
    limited = LimitedGuidance(3.0, 0.3, 0.7)
    point_B = torch.tensor([model.path.grid(6)[0], model.path.at_share(0.5)])
    both = model.predict(latents, point_B, text, limited, unconditional_gradient=gradient)
    for row, guidance in enumerate((1.0, 3.0)):
        alone = model.predict(latents[row : row + 1], point_B[row : row + 1], text[row : row + 1], guidance)
        torch.testing.assert_close(both.eps[row], alone.eps[0], atol=1e-5, rtol=0)
    rows = rows_of(model, lambda: model.predict(latents, point_B, text, limited, unconditional_gradient=gradient))
    assert rows == ([3] if gradient else [2, 2])


@pytest.mark.parametrize("method", [{"name": "ddpo"}, {"name": "grpo", "window": 1}])
def test_a_replay_has_the_guidance_of_its_rollout(method: dict[str, Any]) -> None:
    running = make(method, sampling={"guidance_interval": [0.3, 0.7]})
    _, updates = flat_gradient(running, clips(running))
    total, number = updates[0].metrics["policy/first_ratio_error"]
    assert total / number < 1e-4


def test_the_base_that_a_penalty_compares_with_has_the_same_guidance() -> None:
    running = make(DRAFT | {"kl": 1.0}, random=False, sampling={"guidance_interval": [0.3, 0.7]})
    _, updates = flat_gradient(running, clips(running))
    assert updates[0].metrics["policy/kl"][0] < 1e-9, "the adapter is zero"


# ------------------------------------------------------------------------------------- the steps without gradient


def test_a_shorter_prefix_keeps_the_first_point_and_the_steps_with_gradient() -> None:
    grid = list(range(20, 0, -1))
    assert with_prefix(grid, 2, None) == grid
    assert with_prefix(grid, 2, 18) == grid
    assert with_prefix(grid, 2, 6) == [20, 17, 14, 11, 8, 5, 2, 1]
    assert with_prefix(grid, 0, 4) == [20, 15, 10, 5]
    assert with_prefix(grid, 2, 1) == [20, 2, 1]


@pytest.mark.parametrize(
    ("method", "points", "rows"),
    [
        (DRAFT, [901, 701, 401, 101, 1], [4] * 5),
        ({"name": "draft-lv"}, [901, 601, 301], [4] * 3),
        ({"name": "alignprop", "truncation": "fixed", "cut": 6}, [901, 701, 501, 301, 201, 101, 1], [4] * 7),
        ({"name": "instructvideo", "tau": 0.7}, [601, 401, 201, 1], [4] * 4),
    ],
)
def test_a_method_samples_on_the_thinned_grid(method: dict[str, Any], points: list[int], rows: list[int]) -> None:
    running = make(method, sampling={"steps": 10, "prefix_steps": 3, "eta": 0.0})
    batch = clips(running).take([0, 1])
    seen: list[float] = []
    running.penalise = lambda step, text: seen.append(step.point)
    made: list[Tensor] = []
    assert rows_of(running.context.model, lambda: made.append(running.sample(batch))) == rows
    assert seen == points
    model = running.context.model
    if method["name"] == "instructvideo":
        start = model.add_noise(batch.latents_BCFhw, running.noise(batch), points[0])
    else:
        start = running.context.normal("start", batch)
    assert torch.equal(made[0].detach(), by_hand(model, start, batch.text_BLD, points).detach())


@pytest.mark.parametrize("sampling", [{"prefix_steps": 3}, {"reuse": 3}, {"prefix_steps": 4, "reuse": 2}])
def test_the_steps_with_gradient_are_those_of_the_exact_chain(sampling: dict[str, Any]) -> None:
    """From the same latents, they come to the same video and the same gradient."""
    running = make(DRAFT, sampling={"steps": 10} | sampling)
    batch, model = clips(running).take([0, 1]), running.context.model
    steps: list[Step] = []
    running.penalise = lambda step, text: steps.append(step)
    made = running.sample(batch)
    assert [step.point for step in steps[-2:]] == [101, 1]
    assert [step.prediction.eps.requires_grad for step in steps[-3:]] == [False, True, True]
    exact = denoise(model, steps[-2].before, batch.text_BLD, [101, 1], guidance=3.0, gradient_steps=2)
    assert torch.equal(made, exact)
    weights = [p for p in model.denoiser.parameters() if p.requires_grad]
    got, expected = (torch.autograd.grad(each.square().sum(), weights) for each in (made, exact))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def test_between_calls_the_output_lies_on_the_line_through_the_last_two(model: VideoModel) -> None:
    latents, text = inputs(model)
    grid, path = model.path.grid(8), model.path
    steps: list[Step] = []
    rows = rows_of(model, lambda: denoise(model, latents, text, grid, guidance=3.0, reuse=3, observe=steps.append))
    assert len(rows) == 4, "steps 0, 1, 3 and 6"
    outputs, share = [path.predicted(step.prediction) for step in steps], [float(path.share(point)) for point in grid]
    for place in (0, 1, 3, 6):
        fresh = path.predicted(model.predict(steps[place].before, grid[place], text, 3.0))
        torch.testing.assert_close(outputs[place], fresh, atol=1e-4, rtol=0)
    for place, last, before in ((2, 1, 0), (4, 3, 1), (5, 3, 1), (7, 6, 3)):
        slope = (outputs[last] - outputs[before]) / (share[last] - share[before])
        line = outputs[last] + (share[place] - share[last]) * slope
        torch.testing.assert_close(outputs[place], line, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_an_output_that_is_held_is_one_longer_step(model: VideoModel) -> None:
    x, text = inputs(model)
    grid, path = model.path.grid(6), model.path
    longer = denoise(model, x, text, grid[:1], guidance=3.0)
    output = path.predicted(model.predict(x, grid[0], text, 3.0))
    for place, point in enumerate(grid):
        found = path.prediction(output, x, path.level(point, x))
        then = path.level(grid[place + 1], x) if place + 1 < len(grid) else path.final("exact", x)
        x = then.alpha * found.x0 + then.sigma * found.eps
    torch.testing.assert_close(x, longer, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_first_two_steps_of_each_guidance_are_called(model: VideoModel) -> None:
    latents, text = inputs(model)
    grid, limited = model.path.grid(20), LimitedGuidance(3.0, 0.3, 0.7)
    guided = [limited.at(model.path, point) == 3.0 for point in grid]
    first = [place for place in range(20) if place == 0 or guided[place] != guided[place - 1]]
    called = sorted({place for place in (*first, *(p + 1 for p in first), 0, 5, 10, 15) if place < 20})
    rows = rows_of(model, lambda: denoise(model, latents, text, grid, guidance=limited, reuse=5))
    assert rows == [4 if guided[place] else 2 for place in called]
    assert len(called) < 12


# --------------------------------------------------------------------------------------------- settings and plan


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("toy-ddpo", ["sampling.prefix_steps=3"], ["sampling.prefix_steps = 3", "'ddpo'", "draft-lv"]),
        ("toy-raft", ["sampling.reuse=2"], ["sampling.reuse = 2", "'raft'"]),
        ("toy-alignprop", ["sampling.reuse=2"], ["sampling.reuse = 2", "sampling.eta = 1", "sampling.eta=0"]),
        ("toy", ["sampling.prefix_steps=11"], ["sampling.prefix_steps = 11", "11 steps", "1 to 10"]),
        ("toy", ["sampling.prefix_steps=4", "sampling.reuse=5"], ["sampling.reuse = 5", "allowed: 1, 2, 3, 4"]),
        ("toy", ["sampling.prefix_steps=3", "sampling.reuse=2"], ["sampling.reuse = 2", "3 steps", "allowed: 1, 3"]),
        ("toy-draft", ["method.gradient_steps=null", "sampling.reuse=2"], ["sampling.reuse = 2", "0 steps"]),
        ("toy", ["sampling.prefix_steps=0"], ["sampling.prefix_steps = 0", "greater than or equal to 1"]),
        ("toy", ["sampling.guidance_interval=[0.5,0.2]"], ["guidance_interval = [0.5, 0.2]", "0 to 1"]),
        ("toy", ["sampling.guidance_interval=[0,2]"], ["sampling.guidance_interval", "less than or equal to 1"]),
        ("toy", ["sampling.guidance_interval=[0,0.5]", "sampling.guidance=1"], ["guidance_interval", "guidance = 1"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(name: str, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        load_config(name, overrides)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_chain_whose_every_step_carries_gradient_runs_at_the_defaults() -> None:
    assert load_config("toy-draft", ["method.gradient_steps=null"]).method.prefix_length(20) == 0


def test_a_chain_from_a_noise_level_is_measured_on_the_models_path() -> None:
    check_chain(load_config("toy-wan", ["sampling.prefix_steps=6"]))
    with pytest.raises(ValueError, match=r"sampling\.prefix_steps = 7 .* 7 steps .* 1 to 6"):
        check_chain(load_config("toy-wan", ["sampling.prefix_steps=7"]))


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("toy", ["sampling.guidance_interval=[0.97,1]"], ["0.658 to 0.0397", "such as [0.328, 1]"]),
        ("toy", ["sampling.guidance_interval=[0.7,1]"], ["0.658 to 0.0397"]),
        ("toy-draft", ["sampling.guidance_interval=[0,0.02]"], ["0.917 to 0.0397", "such as [0.458, 1]"]),
        ("toy-draft", ["sampling.guidance_interval=[0.8,0.9]", "sampling.prefix_steps=1"], ["0.917 to 0.0397"]),
        ("toy-ddpo", ["sampling.guidance_interval=[0.95,1]"], ["0.894 to 0.0397"]),
        ("toy-raft", ["method.guided=true", "sampling.guidance=1"], ["method.guided = true", "sampling.guidance = 1"]),
    ],
)
def test_settings_of_guidance_that_do_nothing_are_refused(name: str, overrides: list[str], words: list[str]) -> None:
    config = load_config(name, overrides)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        check_chain(config)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("toy", ["sampling.guidance_interval=[0.328,1]"]),
        ("toy", ["sampling.negative_prompt=x", "sampling.guidance=1"]),  # rlvid generate may guide
        ("toy-raft", ["method.guided=true", "sampling.guidance_interval=[0.93,1]"]),  # at random levels
        ("toy-draft", ["method.kl=0.1", "method.kl_at=path", "sampling.guidance_interval=[0.93,1]"]),
        ("toy-draft", ["sampling.guidance_interval=[0,0.04]", "method.unconditional_gradient=false"]),
        ("toy-draft-lv", ["sampling.guidance_interval=[0.92,0.94]", "method.start=0.93"]),
        ("toy-alignprop", ["sampling.guidance_interval=[0.2,0.6]", "method.unconditional_gradient=false"]),
        (
            "toy-draft",
            [
                "sampling.guidance_interval=[0.2,0.6]", "method.unconditional_gradient=false",
                "method.kl=0.1", "method.kl_at=path",
            ],
        ),
    ],
)  # fmt: skip
def test_settings_of_guidance_that_do_something_are_allowed(name: str, overrides: list[str]) -> None:
    check_chain(load_config(name, overrides))


def test_fingerprints_see_the_settings_and_stay_at_their_defaults() -> None:
    def fingerprint(**sampling: Any) -> str:
        return parse_config({"sampling": sampling}).fingerprint

    plain = fingerprint()
    assert fingerprint(guidance_interval=None, prefix_steps=None, reuse=1) == plain == "cc76c8fc07d3"
    others = fingerprint(guidance_interval=[0, 1]), fingerprint(prefix_steps=5), fingerprint(reuse=2)
    assert len({plain, *others}) == 4


@pytest.mark.parametrize(
    ("name", "overrides", "without", "with_gradient"),
    [
        ("toy-draft", [], 38, 2),
        ("toy-draft", ["sampling.prefix_steps=5"], 10, 2),
        ("toy-draft", ["sampling.reuse=4"], 12, 2),
        ("toy-draft", ["sampling.guidance_interval=[0.5,1]"], 31, 1),
        ("toy-wan", [], 14, 2),
        ("toy-wan", ["sampling.reuse=2", "sampling.prefix_steps=4"], 6, 2),
        ("toy-wan", ["sampling.guidance_interval=[0,0.3]"], 8, 2),
    ],
)
def test_a_plan_counts_the_cheaper_chain(name: str, overrides: list[str], without: int, with_gradient: int) -> None:
    config = load_config(name, overrides)
    found = count(config, 9 if name == "toy-wan" else 8).denoiser
    assert (found.plain, found.graph) == (without, with_gradient)
