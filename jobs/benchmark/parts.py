"""The parts of both sides of the benchmark: networks with random weights, a batch of clips, and a meter."""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jobs.benchmark.live import LiveBytes
from jobs.benchmark.released import FreshText, ReleasedModel, nested_checkpoints
from rlvid import randomness
from rlvid.algorithms.base import Batch, Context, Stopwatch, peak_memory
from rlvid.algorithms.instructvideo import InstructVideo
from rlvid.config import RunConfig, parse_config
from rlvid.models.base import Posterior
from rlvid.models.lora import inject_lora, lora_parameters
from rlvid.models.unet3d import DTYPES, UNet3DModel
from rlvid.reward.clip import ClipReward
from rlvid.train.engine import TorchEngine


class NoModules:
    """Replaces torch's module tracker, which fails in a backward pass that ends at a leaf."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class Meter(Stopwatch):
    """Seconds and peak memory of named stages; while ``counting``, their operations, and bytes ``live`` at the peak."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.live = 0
        self.device, self.current = device, ""
        self.peaks: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self._counter: FlopCounterMode | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = NoModules()  # type: ignore[assignment]
        with counter as self._counter, LiveBytes() as live:
            yield
        self._counter, self.live = None, live.peak

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        reset_peak(self.device)
        self.current = name
        before = self._counter.get_total_flops() if self._counter else 0
        with super().stage(name):
            yield
        self.peaks[name] = max(self.peaks.get(name, 0), peak_memory(self.device))
        if self._counter:
            self.flops[name] = self.flops.get(name, 0) + self._counter.get_total_flops() - before


class Calls:
    """Counts videos in the denoiser and frames in the decoder; separately while ``again`` says so."""

    def __init__(self, model: Any, again: Callable[[], bool] = lambda: False) -> None:
        self.made, self._again = Counter[str](), again
        parts = {"denoiser evaluations": model.denoiser, "frames decoded": model.vae.decoder}
        self._hooks = [part.register_forward_pre_hook(partial(self._count, name)) for name, part in parts.items()]

    def _count(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.made[name + " again" * self._again()] += len(inputs[0])

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def reset_peak(device: torch.device) -> None:
    """Resets the peak to the memory that is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Measures the operations per second of matrix products: the median of several, after a second of warm-up."""
    gpu = device.type == "cuda"
    side, at_once, repeats = side or (8192 if gpu else 2048), 10 if gpu else 1, 10 if gpu else 4
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    watch = Stopwatch(device)
    seconds: list[float] = []
    until = time.perf_counter() + gpu  # a GPU's clock rises at first, and falls under heat
    while time.perf_counter() < until or len(seconds) <= repeats:
        with watch.stage("products"):
            for _ in range(at_once):
                a @ b
        seconds.append(watch.read()["products"])
    return 2 * side**3 * at_once / statistics.median(seconds[-repeats:])


def build(preset: str, precision: str, device: torch.device) -> tuple[dict[str, Any], ClipReward]:
    """Returns arguments of ``UNet3DModel`` by name, and HPSv2 (a small CLIP for ``tiny``); random weights."""
    from rlvid.models.folders import modelscope_folder
    from rlvid.models.untrained import random_parts
    from rlvid.toy.pretrain.denoiser import build_scheduler
    from rlvid.toy.tiny import tiny_model

    dtype, reward = DTYPES[precision], build_reward(preset, precision, device)
    if preset != "tiny":
        return random_parts(modelscope_folder(), dtype, device), reward
    small = tiny_model()
    parts = {"unet": small.denoiser, "vae": small.vae, "text_encoder": small.text_encoder}
    for part in parts.values():
        nn.Module.to(part, device, dtype)
    return parts | {"tokenizer": small.tokenizer, "scheduler": build_scheduler()}, reward


def build_reward(preset: str, precision: str, device: torch.device) -> ClipReward:
    """Returns HPSv2, or a small CLIP for ``tiny``; random weights."""
    from rlvid.reward.load import load_reward
    from rlvid.toy.tiny import tiny_reward

    if preset == "tiny":
        return tiny_reward().to(device, DTYPES[precision])
    # Both sides keep the reward's activations, so that they differ in what is measured alone.
    reward = load_reward("hpsv2", device, path="random", precision=precision, chunk=64, checkpoint_activations=False)
    assert isinstance(reward, ClipReward)
    return reward


@dataclass
class Bench:
    """Both sides: one network, one adapter and its optimiser, one batch of clips, pixels and what was encoded."""

    config: RunConfig
    model: UNet3DModel
    released: ReleasedModel
    reward: ClipReward
    engine: TorchEngine
    meter: Meter
    frames_BFCHW: Tensor
    prompts: list[str]
    text_BLD: Tensor
    posterior: Posterior

    def step(self, side: str, index: int, update: bool = True) -> None:
        """Runs a training step of ``rlvid`` or ``released``; without ``update`` the gradient is kept."""
        meter, ours = self.meter, side == "rlvid"
        serials = list(range(len(self.prompts)))
        noise = randomness.normal(self.model.latent_shape, 0, "posterior", [(serial,) for serial in serials])
        context = Context(self.config, self.model, self.reward, None, meter)
        with ExitStack() as stack:
            if ours:
                with meter.stage("data"):
                    text, latents = self.text_BLD.to(meter.device), self.posterior.sample(noise).to(meter.device)
            else:
                stack.enter_context(nested_checkpoints(self.released.denoiser))
                context.model, context.reward = self.released, FreshText(self.reward)
                with meter.stage("encode"):
                    text = self.released.encode_text(self.prompts)
                    latents = self.released.encode_frames(self.frames_BFCHW).sample(noise)
            batch = Batch(index, serials, self.prompts, text, latents)
            for part in InstructVideo(context).updates(batch):
                with meter.stage("backward"):
                    self.engine.backward(part.loss, part.step)
        if update:
            with meter.stage("optimiser"):
                self.engine.step(index)

    def with_clips(self, number: int, recompute: bool = True) -> "Bench":
        """Returns the same networks on so many videos at once, with or without activation checkpointing."""
        return replace(self, config=with_batch(self.config, number, recompute), **draw_clips(self.model, number))


def config_of(options: argparse.Namespace, **more: dict[str, Any]) -> RunConfig:
    """Returns the options as a run has them, with ``more`` keys by section."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"frames": options.frames, "size": options.size, "precision": options.precision},
        "sampling": {"steps": options.sampling_steps},
        "reward": {"held_out": None, "segments": options.segments},
        "train": {"batch_size": options.batch},
    }
    return parse_config({name: sections.get(name, {}) | more.get(name, {}) for name in sections | more})


def with_batch(config: RunConfig, number: int, recompute: bool) -> RunConfig:
    """Returns the same run on so many videos at once, with or without activation checkpointing."""
    train = config.train.model_copy(update={"batch_size": number, "checkpoint_activations": recompute})
    return config.model_copy(update={"train": train})


def draw_clips(model: UNet3DModel, number: int) -> dict[str, Any]:
    """Clips of noise with prompts, and what was encoded of them, as ``Bench`` takes them."""
    frames_BFCHW = torch.rand(number, model.frames, 3, model.height, model.width)
    prompts = [f"clip {index}: a dog runs over the grass" for index in range(number)]
    posterior = model.encode_frames(frames_BFCHW)
    kept = Posterior(posterior.mean.cpu(), posterior.std.cpu())
    text_BLD = model.encode_prompts(prompts).float().cpu()
    return {"frames_BFCHW": frames_BFCHW, "prompts": prompts, "text_BLD": text_BLD, "posterior": kept}


def add_adapter(denoiser: nn.Module, config: RunConfig, device: torch.device) -> TorchEngine:
    """Puts an adapter of rank 4 on a denoiser, all of whose weights get a gradient; returns its optimiser."""
    inject_lora(denoiser, 4, config.model.lora.targets, seed=0)
    for parameter in lora_parameters(denoiser):
        nn.init.normal_(parameter, std=0.02)  # an adapter whose B is zero would leave A without gradient
    denoiser.to(device)
    return TorchEngine(denoiser, config.optimizer, config.model.precision)


class Adapter:
    """The weights of an engine's adapter at the start, to come back to."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self._start = [parameter.detach().clone() for parameter in engine.parameters]

    def restore(self) -> None:
        """Restores the weights, makes a new optimiser, and frees the memory of what came before."""
        with torch.no_grad():
            for parameter, before in zip(self._engine.parameters, self._start, strict=True):
                parameter.grad = None
                parameter.copy_(before)
        self._engine.optimizer.state.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def prepare(options: argparse.Namespace) -> Bench:
    """Builds the networks, and encodes the clips, as is done once before a training."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    shape = {"frames": options.frames, "height": options.size, "width": options.size}
    config = config_of(options)
    parts, reward = build(options.preset, options.precision, device)
    model, released = UNet3DModel(**parts, **shape), ReleasedModel(**parts, **shape, decode_chunk=1)
    engine = add_adapter(model.denoiser, config, device)
    return Bench(config, model, released, reward, engine, Meter(device), **draw_clips(model, options.batch))
