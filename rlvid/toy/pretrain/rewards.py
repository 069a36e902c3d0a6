"""Stage 3: CLIPs of the built-in world, and rewards that are fitted to votes, in rounds.

All but the CLIPs is made by the commands that users have, each as a process of its own: the maker of votes,
``rlvid reward fit`` and ``rlvid train``. In the first round the oracle votes on rendered pairs and on samples of the
base model. Before each further round, models are fine-tuned on the rewards of the round before, some of them at four
times the learning rate, so that they over-optimise. The oracle votes on their videos too, and the rewards are fitted
again, to all votes.

The intermediate files are in a folder of their own. What is there already is not made again.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlvid.files import atomic_folder, write_atomic
from rlvid.reward.fit.folder import CONFIG, HEAD, SPEC, save_clip
from rlvid.toy.pretrain.common import log, scaled
from rlvid.toy.pretrain.contrastive import Vision, fit_clip, structure
from rlvid.toy.pretrain.text import build_tokenizer

ROUNDS = 3
MEAN, DEVIATION = 0.5182, 0.2827
"""Of the scores of base samples: those of the first built-in reward, so that learning rates carry over.

Measured on 64 prompts (``prompt_set("in_domain", 64)``), one video each (D = 20, g = 3, seed 0): mean and standard
deviation, over the videos, of the mean score of the 8 frames.
"""
CLIP_STEPS = 600
_PROMPTS, _PER_PROMPT, _HELD_OUT = 64, 40, 0.03


@dataclass(frozen=True)
class ClipPlan:
    """A CLIP: its image tower, and what is added to the seed."""

    name: str
    vision: Vision
    seed: int


@dataclass(frozen=True)
class VotesPlan:
    """Votes on rendered pairs, so many of each kind, and on videos of models; votes of one seed share the videos."""

    name: str
    seed: int
    rendered: dict[str, int]


@dataclass(frozen=True)
class RewardPlan:
    """A reward.

    Attributes:
        name: of its folder.
        begins_with: a CLIP, or a reward that stands before it in the same round.
        votes: that it is fitted to.
        seed: is added to the seed of the fit.
        steps: of the fit.
        settings: further ones of ``rlvid reward fit``.
        last: whether the last round alone fits it, since nothing trains on it.
    """

    name: str
    begins_with: str
    votes: str
    seed: int
    steps: int
    settings: tuple[str, ...]
    last: bool = True


@dataclass(frozen=True)
class TuningPlan:
    """A model that is fine-tuned between two rounds.

    Attributes:
        name: of the run.
        description: the shipped one that it starts from.
        reward: of the round before, that it trains on.
        steps: of the training.
        settings: further ones.
        scales: of the learned change, in the videos that are voted on.
    """

    name: str
    description: str
    reward: str
    steps: int
    settings: tuple[str, ...] = ()
    scales: tuple[float, ...] = (1.0,)


CLIPS = (
    ClipPlan("clip-a", Vision(96, 4), 100),
    ClipPlan("clip-b", Vision(80, 5), 200),
    ClipPlan("clip-c", Vision(64, 3), 400),
)
_STILL = {"photometry": 3000, "mismatch": 3000, "structure": 3500, "time": 0}
_MOVING = {"photometry": 3000, "mismatch": 4000, "structure": 4000, "time": 18000}
VOTES = (
    VotesPlan("image-a", 1, _STILL),
    VotesPlan("video-a", 1, _MOVING),
    VotesPlan("image-b", 2, _STILL),
    VotesPlan("video-b", 2, _MOVING),
)
_FIT = ("batch_size=64", "group=32", "lr=1e-3", "average=0.998", "cpus_per_worker=2", "readers=2")
_IMAGE = ("kind=image", *_FIT, "warmup=100", "contrastive=0.3")
_VIDEO = ("kind=video", *_FIT, "warmup=50", "contrastive=0.1", "backbone.towers=text")
_UNVOTED = ("kind=image", *_FIT, "warmup=100", "preferences=0", "contrastive=1")
REWARDS = (
    RewardPlan("reward", "clip-a", "image-a", 100, 1500, _IMAGE, last=False),
    RewardPlan("video", "reward", "video-a", 100, 4000, _VIDEO, last=False),
    RewardPlan("heldout", "clip-b", "image-b", 200, 1500, _IMAGE),
    RewardPlan("heldout-video", "heldout", "video-b", 200, 4000, _VIDEO),
    RewardPlan("unvoted", "clip-c", "image-b", 400, 600, _UNVOTED),
)
TUNINGS = (
    TuningPlan("draft", "toy-draft", "reward", 16),
    TuningPlan("draft-fast", "toy-draft", "reward", 12, ("optimizer.lr=0.032",), (1.0, 2.0)),
    TuningPlan("alignprop", "toy-alignprop", "video", 16, scales=(1.0, 2.0)),
    TuningPlan("instructvideo", "toy", "reward", 40, ("optimizer.lr=8e-3",)),
    TuningPlan("instructvideo-video", "toy", "video", 40, ("optimizer.lr=8e-3",), (0.5, 1.0)),
    TuningPlan("rwr", "toy-rwr", "video", 8),
    TuningPlan("raft-fast", "toy-raft", "reward", 8, ("optimizer.lr=4e-3",)),
    TuningPlan("ddpo", "toy-ddpo", "video", 12),
)
"""DPOK, GRPO and DRaFT-LV are left out, so that what is measured on their videos is not known to the rewards."""
_RUN = (
    "train.workers=2", "train.zero_stage=0", "optimizer.warmup=2", "output.videos_every=0", "output.archive_every=0",
)  # fmt: skip
_KEPT = (SPEC, CONFIG, "model.safetensors", HEAD)
"""Files of a reward that scoring reads, beside the tokenizer's."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

REPORT = "report.json"

Run = Callable[[Sequence[str]], None]
"""Runs a module, with its arguments, and raises an error where it fails."""


@dataclass(frozen=True)
class Step:
    """A module with its arguments, and the file or folder that is there once it is done.

    Attributes:
        command: module and arguments.
        makes: file or folder that the command makes at its very end.
        mark: whether it makes no such file, and an empty one is written for it.
    """

    command: tuple[str, ...]
    makes: Path
    mark: bool = False


def run_module(command: Sequence[str]) -> None:
    """Runs a module, with its arguments, in a process of its own.

    Raises:
        subprocess.CalledProcessError: it failed; its own messages are on the terminal.
    """
    subprocess.run([sys.executable, "-m", *command], check=True)


def make_rewards(
    out: Path, work: Path, seed: int, scale: float, device: torch.device, rounds: int = ROUNDS, run: Run = run_module
) -> None:
    """Makes the rewards of the built-in world, unless all of them are there; they replace older ones.

    Args:
        out: folder of the weights; its model is there already.
        work: folder of CLIPs, votes, runs and rewards of all rounds.
        seed: of everything.
        scale: share of all steps and counts.
        device: where the CLIPs are trained.
        rounds: of votes and fits; 1 or more.
        run: runs a command.

    Raises:
        ValueError: ``work`` is of another seed, scale or model.
    """
    if all((out / plan.name / REPORT).is_file() for plan in REWARDS):
        return
    _check_work(work, {"seed": seed, "scale": scale, "model": _digest(out / "model")})
    tokenizer = build_tokenizer()
    for plan in CLIPS:
        if not (folder := work / plan.name).is_dir():
            clip = fit_clip(plan.vision, seed + plan.seed, scaled(CLIP_STEPS, scale), tokenizer, device)
            with atomic_folder(folder) as part:
                save_clip(part, clip, structure(plan.vision, len(tokenizer)), tokenizer)
    for step in steps_of(out / "model", work, seed, scale, rounds):
        if not step.makes.exists():
            log.info("python -m %s", " ".join(step.command))
            step.makes.parent.mkdir(parents=True, exist_ok=True)
            run(step.command)
            if step.mark:
                step.makes.touch()
    for reward in REWARDS:
        copy_reward(_round(work, rounds) / reward.name, out / reward.name)


def _digest(model: Path) -> str:
    """Returns sixteen hex digits over a model's weights; those of a model that is not there yet are all alike."""
    found = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _check_work(work: Path, made_with: dict[str, Any]) -> None:
    """Keeps what a folder is made with; refuses one that was made otherwise."""
    plan = work / "plan.json"
    if plan.is_file():
        before = json.loads(plan.read_text(encoding="utf-8"))
        if changed := [key for key in made_with if before.get(key) != made_with[key]]:
            raise ValueError(f"{work}: was made with another {changed[0]}; delete it, or name another --work")
        return
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(plan, json.dumps(made_with).encode())


def steps_of(model: Path, work: Path, seed: int, scale: float, rounds: int) -> Iterator[Step]:
    """Yields the commands of all rounds, in order.

    Args:
        model: folder of the base model.
        work: folder of all that they make.
        seed: of everything.
        scale: share of all steps and counts.
        rounds: of votes and fits.
    """
    tuned, sampled = list[str](), set[int]()
    for number in range(1, rounds + 1):
        runs: list[str] = []
        for tuning in TUNINGS if number > 1 else ():
            yield _tuning_step(tuning, model, work, seed, scale, number)
            run = str(_round(work, number) / tuning.name)
            runs += [run if size == 1 else f"{run}*{size:g}" for size in tuning.scales]
        tuned += runs
        rewards = [plan for plan in REWARDS if number == rounds or not plan.last]
        asked = [plan for plan in VOTES if plan.name in {each.votes for each in rewards}]
        for votes_seed in dict.fromkeys(plan.seed for plan in asked):
            again = votes_seed in sampled
            earlier = _samples(work, number - 1, votes_seed) if again else None
            yield _samples_step(model, work, seed, scale, number, votes_seed, runs if again else tuned, earlier)
            sampled.add(votes_seed)
        for votes in asked:
            yield _votes_step(votes, work, seed, scale, number)
        for reward in rewards:
            yield _fit_step(reward, work, seed, scale, number)


def _round(work: Path, number: int) -> Path:
    return work / f"round-{number}"


def _samples(work: Path, number: int, votes_seed: int) -> Path:
    return _round(work, number) / f"samples-{votes_seed}.parquet"


def _tuning_step(plan: TuningPlan, model: Path, work: Path, seed: int, scale: float, number: int) -> Step:
    reward, steps = _round(work, number - 1) / plan.reward, scaled(plan.steps, scale)
    command = (
        "rlvid", "train", plan.description, f"name={plan.name}", f"output.storage={_round(work, number)}",
        f"seed={seed + number}", f"model.path={model}", "model.frames=8", "reward.name=fitted",
        f"reward.path={reward}", "reward.held_out=null", f"train.steps={steps}", *_RUN, *plan.settings,
    )  # fmt: skip
    return Step(command, _round(work, number) / f"{plan.name}.trained", mark=True)


def _samples_step(
    model: Path,
    work: Path,
    seed: int,
    scale: float,
    number: int,
    votes_seed: int,
    runs: Sequence[str],
    earlier: Path | None,
) -> Step:
    """Returns the command of the votes on videos of models, after those of the rounds before."""
    made = _samples(work, number, votes_seed)
    command = (
        "rlvid.fitting.votes", str(made), "--rendered", "0", "--model", str(model),
        "--prompts", str(scaled(_PROMPTS, scale, 8)), "--per-prompt", str(scaled(_PER_PROMPT, scale, 3)),
        "--steps", str(scaled(10, min(1.0, 10 * scale))), "--seed", str(seed + 10 * votes_seed + number),
        *(("--runs", *runs) if runs else ()),
        *(("--add", str(earlier)) if earlier else ()),
    )  # fmt: skip
    return Step(command, made)


def _votes_step(plan: VotesPlan, work: Path, seed: int, scale: float, number: int) -> Step:
    """Returns the command of all votes on rendered pairs and on videos of models."""
    made = _round(work, number) / f"{plan.name}.parquet"
    rendered = [f"{kind}={scaled(count, scale, 8)}" for kind, count in plan.rendered.items() if count]
    command = (
        "rlvid.fitting.votes", str(made), "--add", str(_samples(work, number, plan.seed)), "--rendered", *rendered,
        "--seed", str(seed + plan.seed),
    )  # fmt: skip
    return Step(command, made)


def _fit_step(plan: RewardPlan, work: Path, seed: int, scale: float, number: int) -> Step:
    made = _round(work, number) / plan.name
    clip = plan.begins_with in {each.name for each in CLIPS}
    begins_with = (work if clip else _round(work, number)) / plan.begins_with
    command = (
        "rlvid", "reward", "fit", str(_round(work, number) / f"{plan.votes}.parquet"), "--out", str(made),
        "backbone.name=clip", f"backbone.path={begins_with}", f"seed={seed + plan.seed}", f"mean={MEAN}",
        f"deviation={DEVIATION}", f"steps={scaled(plan.steps, scale)}", f"held_out={min(0.4, _HELD_OUT / scale):g}",
        *plan.settings,
    )  # fmt: skip
    return Step(command, made)


def copy_reward(fitted: Path, folder: Path) -> None:
    """Copies the files of a fitted reward that scoring reads, and the numbers of its report, without local paths."""
    report = json.loads((fitted / REPORT).read_text(encoding="utf-8"))
    with atomic_folder(folder) as part:
        for name in (*_KEPT, *_TOKENIZER):
            if (fitted / name).is_file():
                shutil.copyfile(fitted / name, part / name)
        numbers = {key: report[key] for key in ("pairs", "axes", "base")}
        (part / REPORT).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def accuracy_of_reward(folder: Path) -> dict[str, float]:
    """Returns how often a reward agrees with votes on prompts that it was not fitted on: in all, and by kind."""
    axes = json.loads((folder / REPORT).read_text(encoding="utf-8"))["axes"]
    found = dict[str, float]()
    for axis, numbers in axes.items():
        shares = {axis: numbers["held_out"]["accuracy"], **numbers["held_out"]["kinds"]}
        found |= {f"agrees with votes, {name}": share["share"] for name, share in shares.items()}
    return found
