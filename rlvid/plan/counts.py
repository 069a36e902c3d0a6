"""Counts a method's calls of the denoiser, the decoder and the reward for each sample.

The method itself runs, on a denoiser and a reward that count and compute next to nothing: what is planned is what will
be done, for every method alike.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig
from rlvid.models.unet3d import UNet3DModel
from rlvid.reward.load import held_out_scores_whole_videos, scores_whole_videos
from rlvid.toy.tiny import tiny_model

_BATCHES = 8
"""Batches that are averaged over: a method may draw how much it does (AlignProp's cut)."""


@dataclass
class Calls:
    """Calls of one component, in rows (videos x branches of guidance, frames or images).

    Attributes:
        plain: rows without a graph.
        graph: rows with a graph.
        again: rows that are computed again in the backward pass (the denoiser's layer by layer).
        backward: rows that are back-propagated.
        plain_rows: most rows of one call without a graph.
        graph_rows: most rows of one call with a graph, or computed again.
        held_rows: most rows whose graph is alive at once.
    """

    plain: float = 0.0
    graph: float = 0.0
    again: float = 0.0
    backward: float = 0.0
    plain_rows: int = 0
    graph_rows: int = 0
    held_rows: int = 0


@dataclass
class Counts:
    """Calls for each sample (rows) on one worker, and optimiser steps for each batch."""

    denoiser: Calls = field(default_factory=Calls)
    decoder: Calls = field(default_factory=Calls)
    reward: Calls = field(default_factory=Calls)
    held_out: Calls = field(default_factory=Calls)
    optimiser_steps: float = 0.0


class _Meter:
    """Notes the calls of one component; ``backward_pass`` says whether a backward pass is under way."""

    def __init__(self) -> None:
        self.calls, self.held, self.backward_pass = Calls(), 0, False

    def begin(self, rows: int) -> None:
        """Counts the start of a call; a recomputation stops early, once it has all that the backward pass needs."""
        self.calls.again += rows * self.backward_pass

    def end(self, rows: int, output: Tensor) -> None:
        """Counts the end of a call."""
        calls = self.calls
        if self.backward_pass:
            return
        if not output.requires_grad:
            calls.plain += rows
            calls.plain_rows = max(calls.plain_rows, rows)
            return
        calls.graph += rows
        calls.graph_rows = max(calls.graph_rows, rows)
        self.held += rows
        calls.held_rows = max(calls.held_rows, self.held)
        output.register_hook(lambda gradient: self._back(rows, gradient))

    def _back(self, rows: int, gradient: Tensor) -> Tensor:
        self.calls.backward += rows
        return gradient


class _Denoiser(nn.Module):
    """Says that half of what it is given is noise."""

    def __init__(self, meter: _Meter) -> None:
        super().__init__()
        self.part, self._meter = nn.Parameter(torch.tensor(0.5)), meter

    def forward(self, latents: Tensor, timestep: Tensor, **options: Any) -> tuple[Tensor]:
        output = latents * self.part
        self._meter.end(len(latents), output)
        return (output,)


class _Reward:
    """The mean of the pixels."""

    def __init__(self, meter: _Meter, whole_video: bool) -> None:
        self._meter, self.whole_video = meter, whole_video

    def __call__(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        scores_BS = frames_BSCHW.flatten(2).mean(2)
        self._meter.end(scores_BS.numel(), scores_BS)
        return scores_BS.mean(1) if self.whole_video else scores_BS


def count(config: RunConfig, frames: int) -> Counts:
    """Runs the method of ``config`` on videos of ``frames`` frames, and counts.

    Returns:
        Means over batches, for each sample; the largest calls are those of one worker.
    """
    train = config.train.model_copy(update={"workers": 1, "micro_batch": config.micro_batch})
    alone = config.model_copy(update={"train": train})  # of all workers' videos, since some methods compare them
    meters = {name: _Meter() for name in ("denoiser", "decoder", "reward", "held_out")}
    model = _counting_model(frames, config.model.decode_chunk, meters)
    whole = scores_whole_videos(config.reward)
    held_out = None
    if config.reward.held_out:
        held_out = _Reward(meters["held_out"], held_out_scores_whole_videos(config.reward))
    context = Context(alone, model, _Reward(meters["reward"], whole), held_out, Stopwatch(torch.device("cpu")))
    algorithm, steps = ALGORITHMS[config.method.name](context), 0
    for index in range(_BATCHES):
        for update in algorithm.updates(_batch(alone, model, index, config.train.workers)):
            for meter in meters.values():
                meter.backward_pass = True
            update.loss.backward()
            for meter in meters.values():
                meter.backward_pass, meter.held = False, 0
            steps += update.step
    if alone.train.checkpoint_activations:
        meters["denoiser"].calls.again = meters["denoiser"].calls.graph
    samples = _BATCHES * alone.train.batch_size
    for meter in meters.values():
        for name in ("plain", "graph", "again", "backward"):
            setattr(meter.calls, name, getattr(meter.calls, name) / samples)
    return Counts(**{name: meter.calls for name, meter in meters.items()}, optimiser_steps=steps / _BATCHES)


def _counting_model(frames: int, decode_chunk: int, meters: dict[str, _Meter]) -> UNet3DModel:
    model = tiny_model(frames=frames)
    model.decode_chunk = decode_chunk
    model.denoiser = _Denoiser(meters["denoiser"])
    model.base = nullcontext  # type: ignore[method-assign, assignment]  # there is no adapter to switch off
    decode: Callable[..., Any] = model.vae.decode
    meter = meters["decoder"]

    def counted(latents: Tensor) -> Any:
        meter.begin(len(latents))
        output = decode(latents)
        meter.end(len(latents), output.sample)
        return output

    model.vae.decode = counted
    return model


def _batch(config: RunConfig, model: UNet3DModel, step: int, workers: int) -> Batch:
    size, group = config.train.batch_size, config.train.group_size
    # Every W-th sample after the other, as a worker has them: which of a prompt's videos meet decides what is shared.
    serials = sorted(range(step * size, (step + 1) * size), key=lambda serial: (serial % workers, serial))
    prompts = [f"a dog {serial // group}" for serial in serials]
    latents = randomness.normal(model.latent_shape, config.seed, "plan", [(serial,) for serial in serials])
    return Batch(step, serials, prompts, model.encode_prompts(prompts), latents)
