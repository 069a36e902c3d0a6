"""The tiny model, reward and batch that the tests of the methods share."""

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from rlvid import randomness
from rlvid.algorithms.base import Algorithm, Batch, Context, Stopwatch, Update
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import parse_config
from rlvid.models.lora import inject_lora, lora_parameters
from rlvid.toy.tiny import tiny_model, tiny_reward

PROMPTS = ["a red circle moving left", "a dog", "a blue star growing", "a red circle moving left"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def scheduler(steps: int = 20, final: str = "paper") -> DDIMScheduler:
    """ModelScopeT2V's, of diffusers."""
    made = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=final == "exact",
        steps_offset=1,
    )
    made.set_timesteps(steps)
    return made


def make(
    method: dict[str, Any],
    *,
    random: bool = True,
    dtype: torch.dtype = torch.float32,
    held_out: bool = False,
    **sections: dict[str, Any],
) -> Any:
    """A method on the tiny model with an adapter, in chains of four steps, on batches of four videos."""
    settings = {"sampling": {"steps": 4}, "train": {"batch_size": 4}, "reward": {"segments": 2}}
    config = parse_config(
        {"method": method} | {k: settings.get(k, {}) | sections.get(k, {}) for k in settings.keys() | sections.keys()}
    )
    model = tiny_model()
    for part in (model.denoiser, model.vae, model.text_encoder):
        part.to(dtype)
    generator = torch.Generator().manual_seed(2)
    for parameter in inject_lora(model.denoiser, 2, TARGETS, seed=0):
        if random:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    other = tiny_reward(7) if held_out else None
    context = Context(config, model, tiny_reward(), other, Stopwatch(torch.device("cpu")))
    return ALGORITHMS[config.method.name](context)


def clips(method: Algorithm, serials: tuple[int, ...] = (8, 9, 10, 11)) -> Batch:
    """A clip and a prompt for each serial, whatever the others are."""
    model = method.context.model
    latents = randomness.normal(model.latent_shape, 0, "clip", [(s,) for s in serials])
    prompts = [PROMPTS[s % 4] for s in serials]
    return Batch(2, list(serials), prompts, model.encode_prompts(prompts), latents)


def parameters(method: Algorithm) -> list[nn.Parameter]:
    """The adapter's."""
    return lora_parameters(method.context.model.denoiser)


def flat_gradient(method: Algorithm, batch: Batch) -> tuple[Tensor, list[Update]]:
    """The accumulated gradient of all updates, without a step between them."""
    updates = []
    for update in method.updates(batch):
        update.loss.backward()
        updates.append(update)
    return torch.cat([p.grad.flatten() for p in parameters(method) if p.grad is not None]), updates


def one_gradient(method: Any, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters(method))])


def close(got: Tensor, expected: Tensor, bound: float = 1e-4) -> None:
    assert expected.norm() > 0
    assert (got - expected).norm() < bound * expected.norm()
