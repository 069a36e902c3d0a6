"""A numerical self-test of the training step on a tiny model, in one process or as one of several."""

import hashlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.base import Algorithm, Batch, Context, Stopwatch, WorkerGroup
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig, parse_config
from rlvid.doctor.finding import Finding, finding
from rlvid.models.base import VideoModel
from rlvid.models.lora import inject_lora
from rlvid.models.trained import trained_state
from rlvid.toy.tiny import tiny_model, tiny_reward
from rlvid.toy.tiny_wan import tiny_wan
from rlvid.train.engine import Engine, TorchEngine

_PROMPTS = ("a red circle moving left", "a dog", "a blue star growing", "a green square on a white background")
_BUG = "please report it with this output: trained weights cannot be trusted"


def tiny_config(method: str, workers: int = 1) -> RunConfig:
    """Returns a run of a tiny model on four videos a step."""
    return parse_config(
        {
            "name": "doctor",
            "method": method,
            "sampling": {"steps": 4},
            "reward": {"segments": 2},
            "train": {"batch_size": 4, "workers": workers},
            "optimizer": {"lr": 1e-5, "warmup": 0, "clip_norm": 0},
        }
    )


def build_algorithm(
    config: RunConfig, workers: WorkerGroup | None = None, model: VideoModel | None = None
) -> Algorithm:
    """Builds a method on a model, by default the tiny 3D U-Net, with a random adapter that changes the output."""
    model = model or tiny_model()
    drawn = torch.Generator().manual_seed(2)
    for parameter in inject_lora(model.denoiser, 2, config.model.lora.targets, seed=0):
        parameter.data.copy_(torch.randn(parameter.shape, generator=drawn) / 4)
    stopwatch = Stopwatch(torch.device("cpu"))
    context = Context(config, model, tiny_reward(), None, stopwatch, workers or WorkerGroup())
    return ALGORITHMS[config.method.name](context)


def share(method: Algorithm, rank: int, world: int) -> Batch:
    """Returns this worker's share of the first batch, as in training: every W-th sample."""
    serials = list(range(rank, method.context.config.train.batch_size, world))
    model, prompts = method.context.model, [_PROMPTS[serial] for serial in serials]
    latents = randomness.normal(model.latent_shape, 0, "doctor", [(serial,) for serial in serials])
    return Batch(0, serials, prompts, model.encode_prompts(prompts), latents)


def one_step(method: Algorithm, engine: Engine, batch: Batch) -> dict[str, Any]:
    """Takes one optimiser step; returns the gradient's norm, the adapter after it, and each sample's noise."""
    norm, noise = 0.0, method.context.normal("start", batch)
    for update in method.updates(batch):
        engine.backward(update.loss, update.step)
        if update.step:
            norm = engine.step(0).gradient_norm
    return {"norm": norm, "noise": {s: _digest(row) for s, row in zip(batch.serials, noise, strict=True)}}


@cache
def reference_step(method: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Returns the step in one process, in plain torch, and the adapter before and after it."""
    config = tiny_config(method)
    made = build_algorithm(config)
    start = {n: t.clone() for n, t in trained_state(made.context.model.denoiser, config.model).items()}
    done = one_step(made, TorchEngine(made.context.model.denoiser, config.optimizer), share(made, 0, 1))
    return done, start, trained_state(made.context.model.denoiser, config.model)


def check_gradient_step() -> Iterator[Finding]:
    """Checks that a step of InstructVideo in plain torch moves the adapter by a finite gradient."""
    done, _, _ = reference_step("instructvideo")
    fine = 0 < done["norm"] < float("inf")
    yield finding("gradient", fine, f"norm {done['norm']:.3g} on a tiny model", _BUG)


def check_wan_step() -> Iterator[Finding]:
    """Checks that a step of InstructVideo on a tiny Wan model moves every tensor of the adapter."""
    config = tiny_config("instructvideo")
    made = build_algorithm(config, model=tiny_wan())
    denoiser = made.context.model.denoiser
    start = {name: tensor.clone() for name, tensor in trained_state(denoiser, config.model).items()}
    done = one_step(made, TorchEngine(denoiser, config.optimizer), share(made, 0, 1))
    still = sum(torch.equal(start[name], tensor) for name, tensor in trained_state(denoiser, config.model).items())
    fine = 0 < done["norm"] < float("inf") and not still
    found = f"norm {done['norm']:.3g} on a tiny Wan model, {len(start) - still} of {len(start)} tensors moved"
    yield finding("gradient of Wan", fine, found, _BUG)


def check_first_ratio() -> Iterator[Finding]:
    """DDPO's probability ratio is 1 before the first optimiser step: rollout and replay agree."""
    made = build_algorithm(tiny_config("ddpo"))
    (total, count) = next(iter(made.updates(share(made, 0, 1)))).metrics["policy/first_ratio_error"]
    error = total / count
    yield finding("first-step ratio", error < 1e-4, f"mean |ratio - 1| = {error:.1e} (DDPO)", _BUG)


def check_samples() -> Iterator[Finding]:
    """Different samples have different noise, and the same sample has the same noise whoever makes it."""
    shape, serials = (4, 4, 8, 8), list(range(64))
    whole = randomness.normal(shape, 0, "start", [(serial,) for serial in serials])
    halves = {r: randomness.normal(shape, 0, "start", [(s,) for s in serials[r::2]]) for r in (0, 1)}
    distinct = len({_digest(row) for row in whole})
    same = all(torch.equal(whole[r::2], half) for r, half in halves.items())
    fine = distinct == len(serials) and same
    found = f"{distinct} of {len(serials)} samples differ; split in two they are {'the same' if same else 'OTHERS'}"
    yield finding("samples", fine, found, _BUG)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
