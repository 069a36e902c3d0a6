"""The plan of the built-in rewards: their CLIPs, votes and fits, and the models that are fine-tuned between rounds."""

import hashlib
from dataclasses import dataclass

from rlvid.toy.pretrain.contrastive import Vision

ROUNDS = 2
MEAN, DEVIATION = 0.5182, 0.2827
"""Of the scores of base samples: those of the first built-in reward, so that learning rates carry over.

Measured on 64 prompts (``prompt_set("in_domain", 64)``), one video each (D = 20, g = 3, seed 0): mean and standard
deviation, over the videos, of the mean score of the 8 frames.
"""
CLIP_STEPS = 400
PROMPTS, PER_PROMPT, HELD_OUT = 48, 40, 0.03
"""Prompts that models sample; pairs of each; share of the prompts that are held out."""


@dataclass(frozen=True)
class ClipPlan:
    """A CLIP: its image tower, what is added to the seed, and the share of degraded clips."""

    name: str
    vision: Vision
    seed: int
    degraded: float = 0.5


@dataclass(frozen=True)
class VotesPlan:
    """Votes on videos of models, and on rendered pairs, so many of each kind in all rounds.

    Votes of one seed are on the same videos of models.

    Attributes:
        name: of the file.
        seed: is added to that of all draws.
        rendered: pairs of each kind.
        footage: share of rendered pairs whose sides both have low quality.
        tuned: whether models that were fine-tuned are among those that sample; else the base model alone.
    """

    name: str
    seed: int
    rendered: dict[str, int]
    footage: float = 0.4
    tuned: bool = True


@dataclass(frozen=True)
class RewardPlan:
    """A reward.

    Attributes:
        name: of its folder.
        begins_with: a CLIP, or a reward that stands before it in the same round. Where an earlier round fitted the
            reward, one that begins with a CLIP goes on from there.
        votes: that it is fitted to.
        seed: is added to the seed of the fit.
        steps: of the fit.
        settings: further ones of ``rlvid reward fit``.
        early: steps in the rounds before the last, of a reward that is trained on.
    """

    name: str
    begins_with: str
    votes: str
    seed: int
    steps: int
    settings: tuple[str, ...]
    early: int = 0


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
    ClipPlan("clip-c", Vision(64, 3), 400, degraded=0.0),
)
_STILL = {"photometry": 3000, "mismatch": 3000, "structure": 3500, "time": 0}
_MOVING = {"photometry": 3000, "mismatch": 4000, "structure": 4000, "time": 18000}
VOTES = (
    VotesPlan("image-a", 1, _STILL),
    VotesPlan("video-a", 1, _MOVING),
    VotesPlan("image-b", 2, _STILL),
    VotesPlan("video-b", 2, _MOVING),
    VotesPlan("captions", 3, {"alike": 4000}, footage=0.0, tuned=False),
)
_FIT = ("batch_size=64", "group=32", "lr=1e-3", "average=0.998", "cpus_per_worker=2", "readers=2")
_IMAGE = ("kind=image", *_FIT, "warmup=100", "contrastive=0.3")
_VIDEO = ("kind=video", *_FIT, "warmup=50", "contrastive=0.1", "backbone.towers=text")
_UNVOTED = ("kind=image", *_FIT, "warmup=100", "preferences=0", "contrastive=1")
REWARDS = (
    RewardPlan("frames", "clip-a", "image-a", 100, 500, _IMAGE, early=750),
    RewardPlan("video", "frames", "video-a", 100, 2500, _VIDEO, early=1500),
)
"""To train on; fitted in every round."""
JUDGES = (
    RewardPlan("heldout-frames", "clip-b", "image-b", 200, 1000, _IMAGE),
    RewardPlan("unvoted", "clip-c", "captions", 400, 400, _UNVOTED),
    RewardPlan("heldout-video", "heldout-frames", "video-b", 200, 3000, _VIDEO),
)
"""To judge with; fitted after the last round."""
_FEW = "sampling.steps=10"
_PAPER = "method.denoising=0"
TUNINGS = (
    TuningPlan("draft", "toy-draft", "frames", 14, ("optimizer.lr=0.032",), (0.5, 1.0, 2.0)),
    TuningPlan("alignprop", "toy-alignprop", "video", 16, scales=(1.0, 2.0)),
    TuningPlan("instructvideo", "toy", "frames", 40, (_FEW, _PAPER, "optimizer.lr=8e-3")),
    TuningPlan("instructvideo-video", "toy", "video", 40, (_FEW, _PAPER, "optimizer.lr=8e-3"), (0.5, 1.0)),
    TuningPlan("rwr", "toy-rwr", "video", 8, (_FEW,)),
    TuningPlan("raft-fast", "toy-raft", "frames", 6, (_FEW, "optimizer.lr=4e-3")),
    TuningPlan("ddpo", "toy-ddpo", "video", 12, (_FEW,)),
)
"""DPOK, GRPO and DRaFT-LV are left out, so that what is measured on their videos is not known to the rewards."""
RUN = (
    "train.workers=2", "train.zero_stage=0", "optimizer.warmup=2", "output.videos_every=0", "output.archive_every=0",
)  # fmt: skip
_ALL = (
    CLIPS, VOTES, REWARDS, JUDGES, TUNINGS, RUN, ROUNDS, MEAN, DEVIATION, CLIP_STEPS, PROMPTS, PER_PROMPT, HELD_OUT,
)  # fmt: skip
PLAN_DIGEST = hashlib.sha256(repr(_ALL).encode()).hexdigest()[:16]
"""Sixteen hex digits over the plan. A work folder with another digest is refused."""
