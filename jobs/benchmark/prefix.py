"""Measures what a cheaper part of the chain without gradient saves, and what it changes in the videos.

    python -m jobs.benchmark prefix --out prefix.json
    python -m jobs.benchmark prefix --config toy-wan --videos 32 --seeds 1 2 --out prefix.json sampling.steps=50

Each setting makes a video of each prompt from the same noise with the untrained model of a run, in turns. Prompts are
captions of rendered clips, which InstructVideo edits. All frames are scored.

    seconds      of the steps without gradient, a video
    rows         of the denoiser in the whole chain, a video: videos x branches of guidance
    difference   |x - y| / |y| of the final latents, y the exact chain's; the mean over videos
    reward       less that of the exact chain's videos, with its 95 % interval over prompts
    oracle       the same of the oracle's score
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.benchmark.options import add_threads, check_out, limit_threads, make_parser, refuse
from jobs.benchmark.parts import Calls
from jobs.benchmark.record import commit, processor
from rlvid.algorithms.base import Batch, Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.algorithms.reward_gradient import RewardGradient
from rlvid.config import RunConfig, load_config
from rlvid.config.methods.reward_gradient import InstructVideoConfig
from rlvid.config.methods.reward_gradient import RewardGradient as Settings
from rlvid.config.prefix import useful
from rlvid.data.sources import rendered_clip
from rlvid.diffusion.chain import Step
from rlvid.diffusion.schedule import check_chain, editing_chain
from rlvid.evaluate.load import device
from rlvid.evaluate.tables.table import Grid, json_text
from rlvid.files import write_atomic
from rlvid.models.base import VideoModel
from rlvid.models.load import path_outline
from rlvid.models.trained import load_trainable
from rlvid.reward.load import trained_reward
from rlvid.reward.video import mean_of_frames
from rlvid.stats import bootstrap_interval
from rlvid.terminal import counter, say
from rlvid.world.grade import grade

EXACT = "exact"


@dataclass(frozen=True)
class Made:
    """The videos of a setting: seconds and rows of all of them; latents, reward and oracle score of each."""

    seconds: float
    rows: int
    latents_BCFhw: Tensor
    reward_B: Tensor
    oracle_B: Tensor


def prefix_length(config: RunConfig) -> int:
    """Returns the most steps without gradient that run; ValueError for a method that has no such part."""
    method, steps = config.method, config.sampling.steps
    if not isinstance(method, Settings):
        raise ValueError(
            f"--config: method {method.name!r} trains on its whole chain; choose toy, toy-draft or toy-wan"
        )
    if isinstance(method, InstructVideoConfig):
        path = path_outline(config.model)
        return len(editing_chain(method, path, path.grid(steps))) - method.gradient_steps
    return method.prefix_length(steps)


def variants(options: argparse.Namespace, length: int) -> dict[str, list[str]]:
    """Returns the overrides of each setting: intervals, a half and a quarter of the steps, calls at every n-th step."""
    fewer = sorted({length // 2, length // 4} - {0}, reverse=True)
    reuse = [each for each in options.reuse if each in useful(length)]
    return {
        EXACT: [],
        **{f"guidance_interval=[{each}]": [f"sampling.guidance_interval=[{each}]"] for each in options.intervals},
        **{f"prefix_steps={each}": [f"sampling.prefix_steps={each}"] for each in fewer},
        **{f"reuse={each}": [f"sampling.reuse={each}"] for each in reuse},
    }


def draw_batches(model: VideoModel, videos: int, size: int) -> list[Batch]:
    """Returns the prompts and latents of rendered clips."""
    batches = []
    for first in range(0, videos, size):
        serials = list(range(first, min(first + size, videos)))
        drawn = [rendered_clip(0, serial, model.frames, model.height, model.width) for serial in serials]
        prompts, frames = [caption for caption, _ in drawn], torch.stack([clip for _, clip in drawn])
        batches.append(Batch(0, serials, prompts, model.encode_prompts(prompts), model.encode_frames(frames).mean))
    return batches


def make(config: RunConfig, model: VideoModel, reward: nn.Module, batch: Batch) -> Made:
    """Runs the method's chain of a batch, as a training step does, and scores its videos."""
    algorithm = ALGORITHMS[config.method.name](Context(config, model, reward, None, Stopwatch(model.device)))
    assert isinstance(algorithm, RewardGradient)
    ends = [0.0]

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    def note(step: Step, text_BLD: Tensor) -> None:
        if not step.prediction.eps.requires_grad:
            ends.append(now())

    algorithm.penalise = note  # type: ignore[method-assign]
    calls = Calls(model)
    ends[0] = now()
    latents_BCFhw = algorithm.sample(batch).detach()
    calls.remove()
    with torch.no_grad():
        every_BF = torch.arange(model.frames, device=model.device).expand(len(batch), -1)
        frames_BFCHW = model.decode_frames(latents_BCFhw, every_BF).float().clamp(0, 1)
        reward_B = mean_of_frames(reward(frames_BFCHW, batch.prompts)).cpu()
        oracle_B = grade(frames_BFCHW.cpu(), batch.prompts)["score"]
    return Made(ends[-1] - ends[0], calls.made["denoiser evaluations"], latents_BCFhw.cpu(), reward_B, oracle_B)


def compare(found: Sequence[Made], exact: Sequence[Made], prompts: np.ndarray) -> dict[str, Any]:
    """Returns a setting's row: costs a video, and differences to the exact chain's videos; ``prompts`` are clusters."""

    def joined(made: Sequence[Made], name: str) -> Tensor:
        return torch.cat([getattr(each, name) for each in made]).double()

    x, y = (joined(made, "latents_BCFhw").flatten(1) for made in (found, exact))
    row: dict[str, Any] = {
        "seconds": sum(each.seconds for each in found) / len(prompts),
        "rows": sum(each.rows for each in found) / len(prompts),
        "difference": float(((x - y).norm(dim=1) / y.norm(dim=1)).mean()),
    }
    for name in ("reward", "oracle"):
        now, before = (joined(made, f"{name}_B") for made in (found, exact))
        interval = bootstrap_interval((now - before).numpy(), prompts)
        row[name] = {"mean": float(now.mean()), "change": float((now - before).mean()), "interval": [*interval]}
    return row


def table(rows: dict[str, dict[str, Any]]) -> Grid:
    """Returns the table of the settings."""

    def change(of: dict[str, Any]) -> str:
        return f"{of['change']:+.3f} [{of['interval'][0]:+.3f}, {of['interval'][1]:+.3f}]"

    def cells(name: str, row: dict[str, Any]) -> list[str]:
        costs = [name, f"{row['seconds']:.3f}", f"{row['rows']:.1f}", f"{row['difference']:.3f}"]
        return costs + [
            f"{row[key]['mean']:.3f}" if name == EXACT else change(row[key]) for key in ("reward", "oracle")
        ]

    heads = ["setting", "seconds a video", "rows a video", "difference", "reward", "oracle"]
    return Grid(heads, [cells(name, row) for name, row in rows.items()])


def main(arguments: list[str]) -> None:
    """Reads the options, measures all settings in turns, prints the table and keeps the numbers."""
    parser = make_parser(__doc__, "prefix", overrides=True)
    parser.add_argument("--config", default="toy", help="description of a run that back-propagates the reward")
    parser.add_argument("--videos", type=int, default=24, help="prompts, a video of each for every seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of the noise")
    parser.add_argument("--batch", type=int, default=8, help="videos made at once")
    parser.add_argument("--intervals", nargs="+", default=["0,0.6", "0.2,1", "0.2,0.6"], help="LOW,HIGH each")
    parser.add_argument("--reuse", type=int, nargs="+", default=[2, 3], help="values of sampling.reuse")
    add_threads(parser)
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    options = parser.parse_intermixed_args(arguments)
    if min(options.videos, options.batch) < 1:
        raise ValueError(f"--videos {options.videos} and --batch {options.batch} must be 1 or more")
    if wrong := [each for each in options.reuse if each < 1]:
        raise ValueError(f"--reuse {wrong[0]}: must be at least 1")
    if options.out:
        check_out(options.out)
    limit_threads(options)
    refuse(options.overrides, ["seed", "sampling.guidance_interval", "sampling.prefix_steps", "sampling.reuse"])
    base = load_config(options.config, options.overrides)
    ways = variants(options, prefix_length(base))
    settings = {name: load_config(options.config, [*options.overrides, *own]) for name, own in ways.items()}
    check_chain(base)
    model = load_trainable(base.model, 0, base.model.path, device(), negative_prompt=base.sampling.negative_prompt)
    reward, batches = trained_reward(base.reward, device()), draw_batches(model, options.videos, options.batch)
    for config in settings.values():
        make(config, model, reward, batches[0])  # warms up
    found: dict[str, list[Made]] = {name: [] for name in settings}
    show, turns = counter("batches"), [(seed, batch) for seed in options.seeds for batch in batches]
    for done, (seed, batch) in enumerate(turns):
        for name, config in settings.items():
            found[name].append(make(config.model_copy(update={"seed": seed}), model, reward, batch))
        show(done + 1, len(turns))
    prompts = np.tile(np.arange(options.videos), len(options.seeds))
    rows = {name: compare(made, found[EXACT], prompts) for name, made in found.items()}
    say(table(rows).markdown())
    if options.out:
        about = {"card": processor(), "threads": options.threads, "commit": commit(), "arguments": arguments}
        write_atomic(options.out, json_text(about | {"settings": rows}).encode())
