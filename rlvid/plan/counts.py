"""Counts a method's calls of the denoiser, the decoder and the reward for each sample.

The method itself runs, on a denoiser and a reward that count and compute next to nothing: what is planned is what will
be done, for every method alike. So does the way of a causal decoder (Wan): chunk after chunk, and the sweep back.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlvid import randomness
from rlvid.algorithms.alignprop import draw_cut
from rlvid.algorithms.base import Batch, Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.algorithms.reward_gradient import SHARE_EVERY
from rlvid.config import RunConfig
from rlvid.config.methods.reward_gradient import AlignPropConfig
from rlvid.models.base import VideoModel
from rlvid.models.folders import WAN, family
from rlvid.models.load import path_outline
from rlvid.reward.load import held_out_scores_whole_videos, scores_whole_videos
from rlvid.toy.tiny import tiny_model

_BATCHES = 8
"""Batches that are averaged over: a method may draw how much it does, see ``drawn_cuts``."""
_DRAWN = 256
"""Steps of which ``drawn_cuts`` knows the cut."""


@dataclass
class Calls:
    """Calls of one component, in rows (videos x branches of guidance, frames, chunks of videos, or images).

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
    """Calls for each sample (rows) on one worker, and optimiser steps for each batch.

    Attributes:
        decoder: frames; of a causal decoder, chunks.
        first_chunk: of these, the first chunks of videos, which have one frame.
        share: chunks for the measurement of the gradient that ``model.decode_window`` keeps.
        archived: frames of a sample that are handed to the archive.
        decoded_again: whether all frames are decoded once more, for a held-out reward of whole videos.
    """

    denoiser: Calls = field(default_factory=Calls)
    decoder: Calls = field(default_factory=Calls)
    first_chunk: Calls = field(default_factory=Calls)
    share: Calls = field(default_factory=Calls)
    reward: Calls = field(default_factory=Calls)
    held_out: Calls = field(default_factory=Calls)
    optimiser_steps: float = 0.0
    archived: float = 0.0
    decoded_again: bool = False

    @property
    def frames(self) -> float:
        """Decoded frames of a sample; of a causal decoder, and beside frames decoded again, those that are scored."""
        calls = self._of_frames
        return calls.plain + calls.graph

    @property
    def frames_held(self) -> int:
        """The most frames whose graph is alive at once."""
        return self._of_frames.held_rows

    @property
    def _of_frames(self) -> Calls:
        causal = self.first_chunk != Calls()
        return self.reward if causal or self.decoded_again else self.decoder


class _Meter:
    """Notes the calls of one component."""

    def __init__(self) -> None:
        self.calls, self.held = Calls(), 0

    def begin(self, rows: int) -> None:
        """Counts the start of a call; a recomputation stops early, once it has all that the backward pass needs."""
        self.calls.again += rows * _in_backward_pass()

    def end(self, rows: int, output: Tensor) -> None:
        """Counts the end of a call."""
        calls, again = self.calls, _in_backward_pass()
        if not output.requires_grad:
            if not again:
                calls.plain += rows
                calls.plain_rows = max(calls.plain_rows, rows)
            return
        calls.graph_rows = max(calls.graph_rows, rows)
        if not again:
            calls.graph += rows
            self.held += rows
            calls.held_rows = max(calls.held_rows, self.held)
        output.register_hook(lambda gradient: self._back(rows, gradient, 0 if again else rows))

    def _back(self, rows: int, gradient: Tensor, held: int) -> Tensor:
        self.calls.backward += rows
        self.held -= held
        return gradient


def _in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks it


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
    meters = {each.name: _Meter() for each in fields(Counts) if each.default_factory is Calls}
    counting = _counting_wan if family(config.model.path) is WAN else _counting_unet3d
    model = counting(config, frames, meters)
    model.denoiser, model.path = _Denoiser(meters["denoiser"]), path_outline(config.model)
    model.base = nullcontext  # type: ignore[method-assign, assignment]  # there is no adapter to switch off
    whole = scores_whole_videos(config.reward)
    held_out, judges_whole = None, held_out_scores_whole_videos(config.reward)
    if config.reward.held_out:
        held_out = _Reward(meters["held_out"], judges_whole)
    context = Context(alone, model, _Reward(meters["reward"], whole), held_out, Stopwatch(torch.device("cpu")))
    algorithm, steps, archived = ALGORITHMS[config.method.name](context), 0, 0
    for index in _spread_steps(config, len(context.grid)):
        for update in algorithm.updates(drawn_batch(alone, model, index, config.train.workers)):
            update.loss.backward()
            for meter in meters.values():
                meter.held = 0
            steps += update.step
            archived += update.samples.frames_BS.numel() if update.samples else 0
    if alone.train.checkpoint_activations:
        meters["denoiser"].calls.again = meters["denoiser"].calls.graph
    samples = _BATCHES * alone.train.batch_size
    for component, meter in meters.items():
        rare = _BATCHES / SHARE_EVERY if component == "share" else 1  # measured in the first batch alone
        for name in ("plain", "graph", "again", "backward"):
            setattr(meter.calls, name, getattr(meter.calls, name) * rare / samples)
    calls = {name: meter.calls for name, meter in meters.items()}
    return Counts(
        **calls,
        optimiser_steps=steps / _BATCHES,
        archived=archived / samples,
        decoded_again=judges_whole and not whole,
    )


def drawn_cuts(config: RunConfig, length: int) -> dict[int, int]:
    """Returns the cut of the first training steps in a chain of ``length``; {} for a method that draws none."""
    if not isinstance(config.method, AlignPropConfig):
        return {}
    return {step: draw_cut(config.method, length, config.seed, step) for step in range(_DRAWN)}


def _spread_steps(config: RunConfig, length: int) -> list[int]:
    """Returns training steps to average over, of which the first alone measures the decoder's gradient share.

    Where steps do different amounts of work, each eighth of them, ordered by their work, has one.
    """
    cuts = drawn_cuts(config, length)
    if not cuts:
        return list(range(_BATCHES))
    ranked = sorted((step for step in cuts if step == 0 or step % SHARE_EVERY), key=cuts.__getitem__)
    bounds = [n * len(ranked) // _BATCHES for n in range(_BATCHES + 1)]
    parts = [ranked[first:last] for first, last in pairwise(bounds)]
    return sorted(0 if 0 in part else part[len(part) // 2] for part in parts)


def _counting_unet3d(config: RunConfig, frames: int, meters: dict[str, _Meter]) -> VideoModel:
    model = tiny_model(frames=frames)
    model.decode_chunk = config.model.decode_chunk
    meter = meters["decoder"]

    def counted(latents: Tensor) -> Any:
        meter.begin(len(latents))
        # tanh keeps its output for the backward pass, as layers do: without that, nothing is computed again.
        pixels = functional.interpolate(latents[:, :3].tanh(), scale_factor=2)
        meter.end(len(latents), pixels)
        return SimpleNamespace(sample=pixels)

    model.vae.decode = counted
    return model


class _ChunkDecoder(nn.Module):
    """Stands in for the decoder of ``AutoencoderKLWan``: passes a number of each latent frame on to its cache."""

    def __init__(self, decoder: _Meter, first_chunk: _Meter) -> None:
        super().__init__()
        self.meters = decoder, first_chunk

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int], first_chunk: bool) -> Tensor:
        meters = self.meters if first_chunk else self.meters[:1]
        for meter in meters:
            meter.begin(len(x))
        passed = x.mean((1, 2, 3, 4))
        feat_cache[0] = passed if first_chunk else passed + feat_cache[0]
        for meter in meters:
            meter.end(len(x), feat_cache[0])
        return feat_cache[0][:, None, None, None, None].expand(-1, 3, 1 if first_chunk else 4, 1, 1)


def _counting_wan(config: RunConfig, frames: int, meters: dict[str, _Meter]) -> VideoModel:
    from rlvid.models.wan_parts import decode_settings
    from rlvid.toy.tiny_wan import tiny_wan

    model = tiny_wan(frames=frames, height=16, width=16, decode=decode_settings(config.model))
    network = _ChunkDecoder(meters["decoder"], meters["first_chunk"])
    model.vae.decoder = network
    measured = model._decoder.gradient_share

    def counted(*given: Any) -> Any:
        own, network.meters = network.meters, (meters["share"], _Meter())
        try:
            return measured(*given)
        finally:
            network.meters = own

    model._decoder.gradient_share = counted  # type: ignore[method-assign, assignment]  # the same, with other meters
    return model


def drawn_batch(config: RunConfig, model: VideoModel, step: int, workers: int, text_1LD: Tensor | None = None) -> Batch:
    """Returns a batch of random latents: of all workers' videos, in the order of the workers.

    ``text_1LD`` stands in for the embeddings of all prompts; default: the model embeds them.
    """
    size, group = config.train.batch_size, config.train.group_size
    # Every W-th sample after the other, as a worker has them: which of a prompt's videos meet decides what is shared.
    serials = sorted(range(step * size, (step + 1) * size), key=lambda serial: (serial % workers, serial))
    prompts = [f"a dog {serial // group}" for serial in serials]
    latents = randomness.normal(model.latent_shape, config.seed, "plan", [(serial,) for serial in serials])
    text = model.encode_prompts(prompts) if text_1LD is None else text_1LD.expand(len(prompts), -1, -1)
    return Batch(step, serials, prompts, text.float().to(model.device), latents.to(model.device))
