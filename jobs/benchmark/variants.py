"""rlvid's own step with one thing changed: whether what it does pays, and whether what it leaves out would."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.benchmark.parts import Bench
from rlvid.models.lora import lora_parameters
from rlvid.models.unet3d import LAYERS

EXPLAINED = {
    "sdpa": "attention without scaled_dot_product_attention's kernels",
    "guidance": "the two branches of guidance in two calls",
    "channels-last": "channels-last convolutions",
    "compile": "torch.compile of the denoiser's layers",
    "precision": "bfloat16 weights (float32, where the rest is bfloat16)",
}


@contextmanager
def without_sdpa(bench: Bench) -> Iterator[Bench]:
    with sdpa_kernel(SDPBackend.MATH):
        yield bench


@contextmanager
def two_calls(bench: Bench) -> Iterator[Bench]:
    model = copy.copy(bench.model)

    def guided(
        latents_BCFhw: Tensor, timestep_B: Tensor, text_BLD: Tensor, guidance: float, unconditional_gradient: bool
    ) -> Tensor:
        cond = model.output(latents_BCFhw, timestep_B, text_BLD)
        if guidance == 1.0:
            return cond
        uncond = model.output(latents_BCFhw, timestep_B, model.negative(text_BLD))
        return uncond + guidance * (cond - uncond)

    model._guided = guided  # type: ignore[method-assign]  # of this copy alone
    yield replace(bench, model=model)


@contextmanager
def channels_last(bench: Bench) -> Iterator[Bench]:
    def lay_out(how: torch.memory_format) -> None:
        for module in (*bench.model.denoiser.modules(), *bench.model.vae.modules()):
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=how)

    lay_out(torch.channels_last)
    try:
        yield bench
    finally:
        lay_out(torch.contiguous_format)


@contextmanager
def compiled(bench: Bench, backend: str = "inductor") -> Iterator[Bench]:
    """Each layer by itself, within its checkpoint: the whole network takes torch minutes to look at."""
    layers = [module for module in bench.model.denoiser.modules() if isinstance(module, LAYERS)]
    kept = [layer.forward for layer in layers]
    # Layers of a class share their code; by default a ninth shape would go without being compiled.
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=256):
        for layer, forward in zip(layers, kept, strict=True):
            run, plain = forward.func, forward.args[0]  # as rlvid.models.recompute prepared it
            layer.forward = partial(run, torch.compile(plain, backend=backend, dynamic=False))
        try:
            yield bench
        finally:
            for layer, forward in zip(layers, kept, strict=True):
                layer.forward = forward


@contextmanager
def other_precision(bench: Bench) -> Iterator[Bench]:
    """bfloat16 where it was float32, else float32."""
    before = bench.model.vae.dtype

    def cast(dtype: torch.dtype) -> None:
        for part in (bench.model.denoiser, bench.model.vae, bench.model.text_encoder, bench.reward):
            nn.Module.to(part, dtype)
        for parameter in lora_parameters(bench.model.denoiser):
            parameter.data = parameter.data.float()

    cast(torch.bfloat16 if before == torch.float32 else torch.float32)
    try:
        yield bench
    finally:
        cast(before)


VARIANTS: dict[str, Callable[[Bench], AbstractContextManager[Bench]]] = {
    "sdpa": without_sdpa,
    "guidance": two_calls,
    "channels-last": channels_last,
    "compile": compiled,
    "precision": other_precision,
}
