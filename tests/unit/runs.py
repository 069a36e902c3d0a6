"""Runs of seconds on the tiny model, which the tests on Ray share, and what plain torch makes of them."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig, load_config, parse_config
from rlvid.data.order import clip_indices
from rlvid.data.shares import tensors
from rlvid.data.training_set import TrainingSet
from rlvid.models.base import VideoModel
from rlvid.models.text_rows import pad_rows
from rlvid.models.trained import load_trainable, load_trained, trained_state
from rlvid.reward.load import load_reward
from rlvid.train.engine import TorchEngine
from rlvid.train.feeding import RunFeed

STEPS = 3
QUIET = Console(file=io.StringIO())


def settings(folder: Path, name: str, *overrides: str) -> list[str]:
    """Overrides of the toy description for a run of seconds."""
    return [
        f"name={name}", f"model.path={folder / 'tiny'}", "model.frames=4", "model.size=16", "data.count=6",
        f"output.storage={folder / 'runs'}", "sampling.steps=4", "reward.segments=2", "train.batch_size=4",
        "optimizer.lr=1e-5", "optimizer.warmup=0", f"train.steps={STEPS}", "output.checkpoint_every=2",
        "output.videos_every=0", "train.micro_batch=1", *overrides,
    ]  # fmt: skip


def config(folder: Path, name: str, *overrides: str) -> RunConfig:
    """A run of seconds."""
    return load_config("toy", settings(folder, name, *overrides))


def adapter(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The adapter of a checkpoint, under the names that ``trained_state`` gives it."""
    found = load_file(run / f"step-{step:06d}" / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two adapters."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


Trajectory = tuple[dict[str, torch.Tensor], list[float]]
"""The adapter after the steps, and the gradient's norm in each: AdamW would hide a wrong scale, the norm shows it."""


def plain_torch(run: RunConfig, clips: TrainingSet, checkpoint: Path | None = None, first_step: int = 0) -> Trajectory:
    """The same steps without Ray and DeepSpeed, on the whole batch at once; from a checkpoint's weights, if given."""
    run = parse_config(yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json"))) | {"name": "plain"})
    model = load_trainable(run.model, run.seed, run.model.path)
    if checkpoint is not None:
        load_trained(model.denoiser, run.model, checkpoint)
    engine = TorchEngine(model.denoiser, run.optimizer)
    context = Context(run, model, load_reward("builtin"), None, Stopwatch(torch.device("cpu")))
    algorithm, norms = ALGORITHMS[run.method.name](context), []
    for step in range(first_step, run.train.steps):
        for update in algorithm.updates(_batch(run, model, clips, step)):
            engine.backward(update.loss, update.step)
            if update.step:
                norms.append(engine.step(step).gradient_norm)
    return trained_state(model.denoiser, run.model), norms


def _batch(run: RunConfig, model: VideoModel, data: TrainingSet, step: int) -> Batch:
    size = run.train.batch_size
    serials = list(range(step * size, (step + 1) * size))
    draws = [serial // run.train.group_size for serial in serials]
    prompts, text, posterior = tensors(data.rows(clip_indices(draws, data.count, run.seed).tolist()))
    text = pad_rows([*text], model.text_length or text.shape[1])
    noise = randomness.normal(model.latent_shape, run.seed, "posterior", [(s,) for s in serials])
    return Batch(step, serials, prompts, text, posterior.sample(noise))


class LocalShard:
    """A worker's part of the feed, read in its own process: what Ray Data would deal out."""

    def __init__(self, run: RunConfig, clips: TrainingSet, rank: int = 0, first_step: int = 0) -> None:
        self._shares = RunFeed(run, clips, Path()).shares(first_step)
        self._rank = rank

    def iter_batches(self, **_: Any) -> "LocalShard":
        """Returns what can be iterated over and is no iterator, as ``ray.data.DataIterator`` does."""
        return self

    def __iter__(self) -> Iterator[pa.Table]:
        return (block for block in self._shares() if block["rank"][0].as_py() == self._rank)


def tiny_state(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """What is trained, before the first step."""
    run = config(folder, "start", *overrides)
    return trained_state(load_trainable(run.model, run.seed, run.model.path).denoiser, run.model)
