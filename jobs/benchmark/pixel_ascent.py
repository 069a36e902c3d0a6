"""Measures how hard rewards are to game: gradient ascent on pixels, with the oracle and the other rewards beside.

    python -m jobs.benchmark pixel-ascent --rewards builtin builtin-heldout --out pixel-ascent
    python -m jobs.benchmark pixel-ascent --rewards builtin liked:fitted=runs/liked --out pixel-ascent --seeds 1,2

It starts from videos that the base model of the built-in world makes for fixed prompts from fixed noise. Adam
maximises each reward on their pixels, which are clamped to [0, 1] after each step; no model holds them near real
videos. So a gain of the reward is no gain of the video, unless the oracle gains too. The harder a reward is to game,
the less it gains without the oracle.

``--out`` keeps two files for each reward: the scores of every video (``NAME.json``) and the frames of the first one
(``NAME.npz``). A reward that is there already is not computed again; a call with other settings is refused. The folder
then holds ``ascent.md``, ``ascent.json`` and ``ascent.png`` over all its rewards.
"""

import argparse
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.benchmark.ascent_report import STEM, Ascent, write_report
from jobs.benchmark.options import make_folder, make_parser
from jobs.benchmark.regret import ORACLE
from rlvid.config.model import ModelConfig
from rlvid.data.clips import digest
from rlvid.diffusion.generate import generate
from rlvid.evaluate.load import device
from rlvid.evaluate.models import stamp
from rlvid.evaluate.scorers import FurtherReward, parse_rewards, stamp_of_reward
from rlvid.files import damaged, write_atomic
from rlvid.metric_names import REWARD_PREFIX
from rlvid.models.trained import load_trainable
from rlvid.reward.builtin import BUILTIN, builtin_folder
from rlvid.reward.load import load_reward
from rlvid.reward.video import label_of, mean_of_frames
from rlvid.terminal import counter, numbers, say
from rlvid.world.captions import PROMPT_SETS, prompt_set
from rlvid.world.grade import grade

RECORDED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 200)
"""Steps of Adam after which all scores are read, besides the start and the end: dense where rewards rise fastest."""
GUIDANCE = 3.0


@dataclass(frozen=True)
class Start:
    """The videos that an ascent starts from: N of P prompts from S seeds, N = P S."""

    frames_BFCHW: Tensor
    prompts: list[str]
    places: list[int]


def make_start(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Start:
    """Generates a video of each prompt and seed with the base model of the built-in world."""
    settings = ModelConfig()
    model = load_trainable(settings, 0, settings.path, device())
    words = [*prompts] * len(seeds)
    noise = [(seed, place) for seed in seeds for place in range(len(prompts))]
    frames_BFCHW = generate(model, words, steps=steps, guidance=GUIDANCE, noise_of=noise).nan_to_num(0.0)
    return Start(frames_BFCHW, words, [place for _, place in noise])


def check_gradient(name: str, reward: nn.Module, start: Start) -> None:
    """Checks on one video that a reward has a gradient.

    Raises:
        ValueError: it has none.
    """
    frames_BFCHW = start.frames_BFCHW[:1].to(device()).requires_grad_(True)
    if not reward(frames_BFCHW, start.prompts[:1]).requires_grad:
        raise ValueError(f"--rewards {name}: {label_of(reward)} gives no gradient to ascend; name another reward")


def ascend(
    trained: str, rewards: Mapping[str, nn.Module], start: Start, steps: int, lr: float
) -> tuple[dict[int, dict[str, list[float]]], dict[int, Tensor]]:
    """Maximises a reward on the pixels of all videos by Adam.

    Each video's gradient depends on this video alone, and Adam treats every pixel by itself. So the videos are
    independent of each other.

    Args:
        trained: key of the reward that is maximised.
        rewards: all rewards that are scored.
        start: the videos.
        steps: of Adam.
        lr: step size, in units of a pixel's range of 1.

    Returns:
        For each recorded step, 0 and the last among them: the scores of all videos by every reward and by the oracle,
        and the first video (F, 3, H, W).
    """
    scores, first = dict[int, dict[str, list[float]]](), dict[int, Tensor]()
    pixels_BFCHW = start.frames_BFCHW.to(device()).clone().requires_grad_(True)
    adam = torch.optim.Adam([pixels_BFCHW], lr=lr)
    show = counter("steps")
    for step in range(steps + 1):
        if step in (0, *RECORDED, steps):
            scores[step] = score(rewards, pixels_BFCHW.detach(), start.prompts)
            first[step] = pixels_BFCHW[0].detach().cpu().clone()
        if step < steps:
            adam.zero_grad()
            (-mean_of_frames(rewards[trained](pixels_BFCHW, start.prompts)).sum()).backward()
            adam.step()
            with torch.no_grad():
                pixels_BFCHW.clamp_(0, 1)
            show(trained.removeprefix(REWARD_PREFIX), step + 1, steps)
    return scores, first


@torch.no_grad()
def score(rewards: Mapping[str, nn.Module], frames_BFCHW: Tensor, prompts: list[str]) -> dict[str, list[float]]:
    """Returns the score of each video by each reward, and by the oracle."""
    found = {key: mean_of_frames(reward(frames_BFCHW, prompts)).tolist() for key, reward in rewards.items()}
    return found | {ORACLE: grade(frames_BFCHW.cpu(), prompts)["score"].tolist()}


def identity(reward: FurtherReward) -> str:
    """Returns sixteen hex digits over a reward's name and files."""
    path = str(builtin_folder(reward.name)) if reward.name in BUILTIN else reward.path or ""
    return digest([reward.name, path and stamp_of_reward(path)])


def place_of(out: Path, key: str) -> Path:
    """Returns the path of a reward's scores."""
    return out / f"{key.removeprefix(REWARD_PREFIX)}.json"


def check_kept(path: Path, setup: Mapping[str, Any], identities: Mapping[str, str]) -> None:
    """Checks that a reward's scores were computed with these settings, and by the same rewards.

    Raises:
        ValueError: they were not.
    """
    kept = read_kept(path)
    for key, now in setup.items():
        if kept["setup"].get(key) != now:
            raise ValueError(
                f"--out {path.parent}: {path.stem} was computed with {key} = {kept['setup'].get(key)!r}, and now it is "
                f"{now!r}; choose another folder, or delete {path.name}"
            )
    if changed := [key for key, now in identities.items() if kept["rewards"].get(key, now) != now]:
        name = changed[0].removeprefix(REWARD_PREFIX)
        raise ValueError(
            f"--out {path.parent}: in {path.name} {name!r} is another reward, or its files have changed; choose "
            f"another folder, or delete {path.name}"
        )


def read_kept(path: Path) -> dict[str, Any]:
    """Reads the scores of a reward's ascent.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = found["setup"], found["rewards"], found["places"], found["scores"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error, "delete it; it is then computed anew") from None
    return found


def write_kept(
    path: Path, about: dict[str, Any], scores: dict[int, dict[str, list[float]]], first: Mapping[int, Tensor]
) -> None:
    """Writes the frames of an ascent's first video, and then its scores, which say that both are whole."""
    frames = {str(step): (video.clamp(0, 1) * 255).round().byte().numpy() for step, video in first.items()}
    np.savez(data := io.BytesIO(), **frames)  # type: ignore[arg-type]
    write_atomic(path.with_suffix(".npz"), data.getvalue())
    write_atomic(path, json.dumps(about | {"scores": scores}).encode())


def read_ascent(path: Path) -> Ascent:
    """Reads a reward's ascent as ``write_kept`` wrote it.

    Raises:
        ValueError: a file is damaged.
    """
    kept, frames = read_kept(path), path.with_suffix(".npz")
    try:
        with np.load(frames) as found:
            first = {int(step): torch.from_numpy(found[step]) for step in found.files}
    except (ValueError, OSError, EOFError) as error:
        raise damaged(frames, error, f"delete it and {path.name}; they are then computed anew") from None
    scores = {int(step): {key: np.array(each) for key, each in found.items()} for step, found in kept["scores"].items()}
    return Ascent(path.stem, REWARD_PREFIX + path.stem, np.array(kept["places"]), scores, first)


def main(arguments: list[str]) -> None:
    """Ascends every reward that is not in the folder yet, and writes the report."""
    options = parse(arguments)
    named = {each.metric: each for each in parse_rewards(",".join(options.rewards))}
    if no_gradient := next((key for key, each in named.items() if each.name == "oracle"), None):
        raise ValueError(
            f"--rewards {no_gradient.removeprefix(REWARD_PREFIX)}: the oracle gives no gradient to ascend, and is "
            "always there as a judge; name another reward"
        )
    seeds = numbers(options.seeds, "--seeds")
    setup = {
        "set": options.set, "prompts": options.prompts, "seeds": seeds, "sampling steps": options.sampling_steps,
        "steps": options.steps, "lr": options.lr, "model": digest(stamp(ModelConfig().path)),
    }  # fmt: skip
    identities = {key: identity(each) for key, each in named.items()}
    make_folder(options.out)
    paths = {key: place_of(options.out, key) for key in named}
    if taken := next((key for key, path in paths.items() if path.stem == STEM), None):
        raise ValueError(
            f"--rewards {taken.removeprefix(REWARD_PREFIX)}: the report has this name; choose another label"
        )
    kept = [path for found in sorted(options.out.glob("*.npz")) if (path := found.with_suffix(".json")).is_file()]
    for path in kept:
        check_kept(path, setup, identities)
    if missing := [key for key, path in paths.items() if not path.is_file()]:
        rewards = {
            key: load_reward(each.name, device(), path=each.path, key=f"--rewards {key.removeprefix(REWARD_PREFIX)}")
            for key, each in named.items()
        }
        start = make_start(prompt_set(options.set, options.prompts, seeds[0]), seeds, options.sampling_steps)
        for key in missing:
            check_gradient(key.removeprefix(REWARD_PREFIX), rewards[key], start)
        about = {"setup": setup, "rewards": identities, "places": start.places, "prompts": start.prompts}
        for key in missing:
            scores, first = ascend(key, rewards, start, options.steps, options.lr)
            write_kept(paths[key], about, scores, first)
    ascents = [read_ascent(path) for path in dict.fromkeys([*paths.values(), *kept])]
    say(write_report(options.out, ascents))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__, "pixel-ascent")
    parser.add_argument(
        "--rewards", nargs="+", required=True, help="NAME, NAME=PATH or LABEL:NAME=PATH each, as for rlvid evaluate"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the scores and the report")
    parser.add_argument("--set", default="in_domain", choices=PROMPT_SETS, help="built-in set of the prompts")
    parser.add_argument("--prompts", type=int, default=24, help="prompts; the intervals are over them")
    parser.add_argument("--seeds", default="1", help="seeds of the noise, such as 1,2: a video of each prompt and seed")
    parser.add_argument("--sampling-steps", type=int, default=20, help="DDIM steps of the videos at the start")
    parser.add_argument("--steps", type=int, default=200, help="steps of Adam")
    parser.add_argument("--lr", type=float, default=0.02, help="step size of Adam; a pixel lies in [0, 1]")
    options = parser.parse_args(arguments)
    if options.prompts < 2 or min(options.steps, options.sampling_steps) < 1 or not 0 < options.lr < math.inf:
        raise ValueError("--prompts must be 2 or more, --steps and --sampling-steps 1 or more, --lr above 0")
    return options
