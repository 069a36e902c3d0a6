"""The inputs of the benchmark of growth: clips, evaluations and scores that no training made."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from jobs.benchmark.feed import repeat_clips
from rlvid.algorithms.base import Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import parse_config
from rlvid.data.encoders import encode_items
from rlvid.data.sources import read_rendered
from rlvid.data.writing import ClipWriter
from rlvid.evaluate.cache import write_part
from rlvid.evaluate.models import find_models
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.evaluate.work import Evaluation
from rlvid.files import write_atomic
from rlvid.models.trained import load_trainable
from rlvid.runs.checkpoints import checkpoint_name
from rlvid.toy.tiny import save_tiny_model, tiny_model, tiny_reward
from rlvid.train.checkpoint import save_checkpoint
from rlvid.train.engine import TorchEngine
from tuning.judges import GAIN

_FRAMES, _SIZE = 2, 8
_FEW = 64
"""Clips that are encoded; larger sets repeat them."""


def tiny_clips(folder: Path, count: int) -> Path:
    """Makes a folder of ``count`` encoded clips, in the layout of the cache."""
    few, many = folder / "few", folder / "many"
    items = [{"index": index, "source": f"clip {index}", "caption": ""} for index in range(_FEW)]
    with ClipWriter(few, {}) as writer:
        model = tiny_model(frames=_FRAMES, size=_SIZE)
        writer.add(encode_items(model, items, lambda item, model: read_rendered(0, item, model)))
        writer.finish({"fingerprint": "0" * 16, "model_fingerprint": "0" * 16}, [])
    repeat_clips(few, count, many)
    return many


def evaluation_of(folder: Path, videos: int) -> Evaluation:
    """Plans an evaluation of a miniature and of a run that has changed it, of half of the videos each.

    Args:
        folder: where the model, the run and the evaluation are made.
        videos: of both models together, at least 2.
    """
    save_tiny_model(folder / "tiny")
    config = parse_config({
        "name": "run",
        "model": {"path": str(folder / "tiny"), "frames": _FRAMES, "size": _SIZE, "finetune": "lora"},
        "sampling": {"steps": 2},
        "reward": {"segments": 1},
    })  # fmt: skip
    model = load_trainable(config.model, config.seed, config.model.path)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) / 8
    method = ALGORITHMS[config.method.name](Context(config, model, tiny_reward(), None, Stopwatch(model.device)))
    state = {"step": 1, "workers": 1, "skipped": 0, "seconds": 0.0, "videos": 0}
    engine = TorchEngine(model.denoiser, config.optimizer)
    save_checkpoint(folder / "run" / checkpoint_name(1), 0, state, config, engine, method, model.denoiser)
    write_atomic(folder / "run" / "config.yaml", yaml.safe_dump(config.model_dump(mode="json")).encode())
    prompts = [f"a red circle moving left, number {number}" for number in range(videos // 2)]
    return Evaluation.of(find_models([str(folder / "run")]), {"set": prompts}, steps_list=[2], folder=folder / "out")


def draw_rows(plan: Evaluation) -> list[Row]:
    """Draws the scores of all videos of an evaluation."""
    drawn = np.random.default_rng(0)
    return [
        Row(shard.model, shard.set, shard.steps, index, prompt, copy=copy, **_draw_scores(drawn))
        for shard in plan.shards
        for index, copy, prompt in shard.video_keys
    ]


def _draw_scores(drawn: np.random.Generator) -> dict[str, Any]:
    return dict(zip(METRICS, drawn.random(len(METRICS)).tolist(), strict=True))


def write_videos(plan: Evaluation) -> None:
    """Writes videos of noise for all shards of an evaluation."""
    drawn = torch.Generator().manual_seed(0)
    plan.videos.mkdir(parents=True)
    for index, shard in enumerate(plan.shards):
        frames_BFCHW = torch.rand(len(shard.video_keys), _FRAMES, 3, _SIZE, _SIZE, generator=drawn)
        write_part(plan.part(index), shard.labels, frames_BFCHW, plan.identities[index])


def made_up_scores(name: str, steps: int, drawn: random.Random) -> dict[str, Any]:
    """Draws the scores of a trial after ``steps`` steps, as ``tuning.measure.measure`` returns them: of 12 videos."""
    level = drawn.random()
    rows: list[dict[str, Any]] = [
        {"model": name, "set": "in_domain", "steps": 10, "index": index, "prompt": f"prompt {index}", "copy": 0}
        | {metric: level + drawn.gauss(0, 0.1) for metric in METRICS}
        for index in range(12)
    ]
    mean = {metric: sum(row[metric] for row in rows) / len(rows) for metric in METRICS}
    mean[GAIN] = drawn.random() if steps else 0.0
    std = dict.fromkeys(METRICS, 0.1)
    return {"step": steps, "seconds": drawn.random(), "videos": 4 * steps, "mean": mean, "std": std, "rows": rows}
