"""Guidance and the chain, held to diffusers' scheduler and to autograd."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import scheduler
from torch import Tensor, nn

from rlvid.diffusion.chain import Step, denoise
from rlvid.diffusion.schedule import partial
from rlvid.models.lora import inject_lora, lora_parameters
from rlvid.models.unet3d import LAYERS, UNet3DModel
from rlvid.toy.tiny import tiny_model

PROMPTS = ["a red circle moving left", "a dog"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def base() -> UNet3DModel:
    return tiny_model()


@pytest.fixture(scope="module")
def adapted() -> UNet3DModel:
    """A model whose adapter does something."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(5)
    for parameter in inject_lora(model.denoiser, 2, TARGETS, seed=0):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


@pytest.fixture(scope="module")
def inputs(base: UNet3DModel) -> tuple[Tensor, Tensor]:
    return torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(1)), base.encode_prompts(PROMPTS)


def reference_chain(
    model: UNet3DModel,
    x: Tensor,
    text: Tensor,
    steps: int,
    *,
    start: int = 0,
    guidance: float = 1.0,
    eta: float = 0.0,
    gradient_steps: int = 0,
    noise: Callable[[int], Tensor] | None = None,
    final: str = "exact",
) -> Tensor:
    """diffusers' own loop; the last step has eta = 0 in rlvid, for its result is the clean video."""
    reference = scheduler(steps, final)
    for index, t in enumerate(reference.timesteps[start:]):
        left = steps - start - index
        with torch.set_grad_enabled(left <= gradient_steps):
            eps = model.predict(x, int(t), text, guidance).eps
            drawn = None if noise is None or left == 1 else noise(index)
            x = reference.step(eps, t, x, eta=eta if left > 1 else 0.0, variance_noise=drawn).prev_sample
    return x


def gradients(model: UNet3DModel, latents: Tensor) -> list[Tensor]:
    """Of a scalar that no two latents enter alike, with respect to the adapter."""
    weights = torch.linspace(-1, 1, latents.numel()).reshape(latents.shape)
    return list(torch.autograd.grad((weights * latents).sum(), lora_parameters(model.denoiser)))


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    flat_a, flat_b = (torch.cat([t.flatten() for t in each]) for each in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())


def saved_tensors(run: Callable[[], Tensor]) -> int:
    """How many tensors autograd keeps for a backward pass."""
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return count


# ------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize(
    ("guidance", "unconditional_gradient", "expected"), [(3.0, True, [4]), (3.0, False, [2, 2]), (1.0, True, [2])]
)
def test_guidance_runs_the_branches_it_needs(
    base: UNet3DModel, inputs: tuple[Tensor, Tensor], guidance: float, unconditional_gradient: bool, expected: list[int]
) -> None:
    """Both branches in one batched call give what two separate calls give."""
    latents, text = inputs
    batches: list[int] = []
    hook = base.denoiser.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    try:
        got = base.predict(latents, 301, text, guidance, unconditional_gradient=unconditional_gradient)
    finally:
        hook.remove()
    assert batches == expected
    empty = base.encode_prompts([""]).expand_as(text)
    uncond, cond = (base.denoiser(latents, 301, encoder_hidden_states=e).sample for e in (empty, text))
    assert (uncond - cond).abs().max() > 1e-2, "the prompt makes no difference: this test proves nothing"
    eps = uncond + guidance * (cond - uncond)
    abar = scheduler().alphas_cumprod[301]
    torch.testing.assert_close(got.eps, eps, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.x0, (latents - (1 - abar).sqrt() * eps) / abar.sqrt(), atol=2e-5, rtol=0)


def test_each_video_may_have_a_timestep_of_its_own(base: UNet3DModel, inputs: tuple[Tensor, Tensor]) -> None:
    latents, text = inputs
    both = base.predict(latents, torch.tensor([901, 51]), text, 3.0)
    for row, t in enumerate((901, 51)):
        alone = base.predict(latents[row : row + 1], t, text[row : row + 1], 3.0)
        torch.testing.assert_close(both.eps[row], alone.eps[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(both.x0[row], alone.x0[0], atol=1e-4, rtol=0)


def test_the_unconditional_branch_can_be_a_constant(adapted: UNet3DModel, inputs: tuple[Tensor, Tensor]) -> None:
    latents, text = inputs
    through = adapted.predict(latents, 301, text, 3.0)
    constant = adapted.predict(latents, 301, text, 3.0, unconditional_gradient=False)
    torch.testing.assert_close(constant.eps, through.eps, atol=1e-5, rtol=0)
    empty = adapted.encode_prompts([""]).expand_as(text)
    uncond, cond = (adapted.denoiser(latents, 301, encoder_hidden_states=e).sample for e in (empty, text))
    expected = gradients(adapted, uncond.detach() + 3.0 * (cond - uncond.detach()))
    got = gradients(adapted, constant.eps)
    assert relative(got, expected) < 1e-5
    assert relative(got, gradients(adapted, through.eps)) > 1e-2


# ---------------------------------------------------------------------------------------------------------- chain


@pytest.mark.parametrize(
    ("steps", "eta", "final"),
    [(20, 0, "exact"), (20, 1, "paper"), pytest.param(50, 0, "paper", marks=pytest.mark.slow)],
)
def test_the_chain_is_the_one_of_diffusers(
    base: UNet3DModel, inputs: tuple[Tensor, Tensor], steps: int, eta: float, final: str
) -> None:
    latents, text = inputs
    noise = torch.randn(steps, *latents.shape)
    draw = noise.__getitem__ if eta else None
    taken: list[Step] = []
    got = denoise(
        base, latents, text, base.path.grid(steps), guidance=1.0, eta=eta, noise=draw, final=final, observe=taken.append
    )
    expected = reference_chain(base, latents, text, steps, eta=eta, noise=draw, final=final)
    assert [step.point for step in taken] == base.path.grid(steps)
    assert all(torch.equal(step.after, after.before) for step, after in pairwise(taken))
    assert torch.equal(taken[-1].after, got)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-5)


def test_the_two_ends_of_a_chain_differ(base: UNet3DModel, inputs: tuple[Tensor, Tensor]) -> None:
    latents, text = inputs
    exact, paper = (denoise(base, latents, text, [1], guidance=1.0, final=final) for final in ("exact", "paper"))
    prediction = base.predict(latents, 1, text, 1.0)
    torch.testing.assert_close(exact, prediction.x0, atol=0, rtol=0)
    assert (exact - paper).abs().max() > 1e-2


@pytest.mark.parametrize(("gradient_steps", "recompute"), [(1, False), (2, True), (4, False)])
def test_gradient_flows_through_the_last_steps_alone(
    adapted: UNet3DModel, inputs: tuple[Tensor, Tensor], gradient_steps: int, recompute: bool
) -> None:
    latents, text = inputs
    grid = partial(adapted.path.grid(10), 0.4)
    got = denoise(
        adapted, latents, text, grid, guidance=3.0, gradient_steps=gradient_steps, recompute=recompute, final="paper"
    )
    options = {"start": 6, "guidance": 3.0, "final": "paper"}
    expected = reference_chain(adapted, latents, text, 10, gradient_steps=gradient_steps, **options)
    other = reference_chain(adapted, latents, text, 10, gradient_steps=1 + gradient_steps % 4, **options)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-5)
    mine = gradients(adapted, got)
    assert relative(mine, gradients(adapted, expected)) < 1e-4
    assert relative(mine, gradients(adapted, other)) > 1e-2


@pytest.mark.parametrize("gradient_steps", [1, 3])
def test_recomputing_activations_changes_nothing(
    adapted: UNet3DModel, inputs: tuple[Tensor, Tensor], gradient_steps: int
) -> None:
    latents, text = inputs
    kept, recomputed = (
        denoise(adapted, latents, text, [301, 101, 1], guidance=3.0, gradient_steps=gradient_steps, recompute=recompute)
        for recompute in (False, True)
    )
    assert torch.equal(kept, recomputed)
    for a, b in zip(gradients(adapted, kept), gradients(adapted, recomputed), strict=True):
        assert torch.equal(a, b)


def test_a_layer_is_recomputed_once_and_keeps_its_inputs_alone(
    adapted: UNet3DModel, inputs: tuple[Tensor, Tensor]
) -> None:
    latents, text = inputs
    inner = [
        module
        for layer in adapted.denoiser.modules()
        if isinstance(layer, LAYERS)
        for module in layer.modules()
        if not list(module.children()) and any(True for _ in module.parameters())
    ]
    ran: Counter[Any] = Counter()
    hooks = [module.register_forward_pre_hook(lambda module, _: ran.update([module])) for module in inner]

    def run(recompute: bool) -> tuple[int, set[int]]:
        ran.clear()
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = denoise(adapted, latents, text, [1], guidance=3.0, gradient_steps=1, recompute=recompute)
        gradients(adapted, result)
        return sum(kept.values()), set(ran.values())

    (kept, once), (less, twice) = run(False), run(True)
    for hook in hooks:
        hook.remove()
    assert len(inner) > 50
    assert once == {1}
    assert twice <= {1, 2}, "some layers are computed more than twice"  # a layer's end need not be computed again
    assert 2 in twice
    assert less < kept / 4


def test_no_graph_is_built_that_is_not_used(adapted: UNet3DModel, inputs: tuple[Tensor, Tensor]) -> None:
    latents, text = inputs

    def saved(grid: list[int], gradient_steps: int, recompute: bool = False) -> int:
        options = {"guidance": 3.0, "gradient_steps": gradient_steps, "recompute": recompute}
        return saved_tensors(lambda: denoise(adapted, latents, text, grid, **options))

    one = saved([1], 1)
    assert one > 100
    assert saved([301, 201, 101, 1], 0) == 0
    assert saved([301, 201, 101, 1], 1) == one, "the prefix keeps tensors"
    assert saved([301, 201, 101, 1], 2) > 1.9 * one
    assert saved([301, 201, 101, 1], 1, recompute=True) < one / 10
    assert not denoise(adapted, latents, text, [101, 1], guidance=3.0).requires_grad
    with torch.no_grad():
        assert not denoise(adapted, latents, text, [101, 1], guidance=3.0, gradient_steps=2).requires_grad


def test_gradient_reaches_every_layer_of_the_adapter(adapted: UNet3DModel, inputs: tuple[Tensor, Tensor]) -> None:
    latents, text = inputs
    out = denoise(adapted, latents, text, [101, 1], guidance=3.0, gradient_steps=1)
    names = [name for name, _ in adapted.denoiser.named_parameters() if "lora_" in name]
    dead = [name for name, g in zip(names, gradients(adapted, out), strict=True) if not g.abs().max() > 0]
    assert not dead
    layers = sum(
        isinstance(m, nn.Linear) and name.endswith("lora_A.default") for name, m in adapted.denoiser.named_modules()
    )
    assert len(names) == 2 * layers


@pytest.mark.parametrize("gradient_steps", [-1, 3])
def test_a_window_outside_the_chain_is_named(
    base: UNet3DModel, inputs: tuple[Tensor, Tensor], gradient_steps: int
) -> None:
    with pytest.raises(ValueError, match=rf"gradient_steps = {gradient_steps}; .* allowed: 0 to 2"):
        denoise(base, *inputs, [101, 1], guidance=3.0, gradient_steps=gradient_steps)


def test_noise_must_come_from_somewhere(base: UNet3DModel, inputs: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"eta = 0\.5 needs a source of noise"):
        denoise(base, *inputs, [101, 1], guidance=3.0, eta=0.5)
