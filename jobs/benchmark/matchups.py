"""The steps that are compared: a published way and rlvid's own, on one set of networks."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from jobs.benchmark.parts import Bench, Meter, add_adapter, build_reward, config_of, prepare
from jobs.benchmark.published import DdpoPytorch, Published, UniRL, Vader, VideoXFun
from jobs.benchmark.released import FreshText
from jobs.benchmark.step import Sides
from rlvid.algorithms.base import Batch, Context
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig
from rlvid.models.base import VideoModel
from rlvid.reward.clip import ClipReward
from rlvid.train.engine import TorchEngine

RLVID, RELEASED = "rlvid", "released"
"""Names of the two sides of every matchup."""
TAIL = 5
"""Steps with gradient of VideoX-Fun."""


@dataclass(frozen=True)
class Peer:
    """A published way of training.

    Attributes:
        model: drives the networks; None: see ``jobs.benchmark.released``.
        method: settings of rlvid's method with the same gradient.
        wan: whether its model is of Wan's classes; else it is a 3D U-Net.
        train: settings of both sides.
        released: settings of the published side alone.
        also: sides of rlvid's own beside the first, with their settings.
    """

    model: type[Published] | None
    method: dict[str, Any] = field(default_factory=dict)
    wan: bool = False
    train: dict[str, Any] = field(default_factory=dict)
    released: dict[str, Any] = field(default_factory=dict)
    also: dict[str, dict[str, Any]] = field(default_factory=dict)


_DRAFT = {"name": "draft", "gradient_steps": 1}
_KEPT = {"rlvid, kept": {"checkpoint_activations": False}}
PEERS = {
    "InstructVideo": Peer(None),
    "VADER": Peer(Vader, _DRAFT),
    "UniRL": Peer(UniRL, _DRAFT | {"unconditional_gradient": False}),
    "ddpo-pytorch": Peer(
        DdpoPytorch,
        {"name": "ddpo"},
        train={"checkpoint_activations": False},
        released={"micro_batch": 1, "rollout_batch": 1},
        also={"rlvid, recomputed": {"checkpoint_activations": True}},
    ),
    "VideoX-Fun": Peer(VideoXFun, _DRAFT | {"gradient_steps": TAIL}, wan=True, also=_KEPT),
    "UniRL-Wan": Peer(UniRL, _DRAFT | {"unconditional_gradient": False}, wan=True, also=_KEPT),
}
"""The published ways, by name."""


@dataclass
class Networks:
    """A model with an adapter, a reward, the adapter's optimiser, and a meter of stages."""

    model: VideoModel
    reward: ClipReward
    engine: TorchEngine
    meter: Meter


@dataclass(frozen=True)
class Way:
    """The settings and the driver of a side."""

    config: RunConfig
    model: Any


class Matchup:
    """A published step and rlvid's: the same networks, noise and prompts.

    Args:
        networks: of both sides.
        ways: by the name of the side.
        prompts: one for each video of a step.
    """

    def __init__(self, networks: Networks, ways: dict[str, Way], prompts: list[str]) -> None:
        self.networks, self.ways, self.prompts = networks, ways, prompts
        self.model, self.engine, self.meter = networks.model, networks.engine, networks.meter
        self._text_BLD = know_prompts(networks.model, networks.reward, prompts)

    def step(self, side: str, index: int, update: bool = True) -> None:
        """Runs a training step of a side; without ``update`` the gradient is kept."""
        way, text_BLD, reward, meter = self.ways[side], self._text_BLD, self.networks.reward, self.meter
        context = Context(way.config, way.model, reward, None, meter)
        if isinstance(way.model, Published):
            with meter.stage("encode"):
                text_BLD = way.model.encode_text(self.prompts)
            if way.model.fresh_reward_text:
                context.reward = FreshText(reward)
        batch = Batch(index, list(range(len(self.prompts))), self.prompts, text_BLD, None)
        for part in ALGORITHMS[way.config.method.name](context).updates(batch):
            with meter.stage("backward"):
                self.engine.backward(part.loss, part.step)
        if update:
            with meter.stage("optimiser"):
                self.engine.step(index)


def know_prompts(model: VideoModel, reward: ClipReward, prompts: list[str]) -> torch.Tensor:
    """Returns embeddings text_BLD of prompts; model and reward have embedded all that they embed once."""
    text_BLD = model.encode_prompts(prompts)
    model.negative(text_BLD)
    reward.text_features(prompts)
    return text_BLD


def matchup(peer: Peer, options: argparse.Namespace, networks: Networks) -> Matchup:
    """Returns the steps of a peer with a ``model`` and rlvid; ddpo is on ``options.rollouts`` videos."""
    assert peer.model is not None
    number = options.rollouts if peer.method["name"] == "ddpo" else options.batch
    method, model = dict(peer.method), networks.model
    if method.get("gradient_steps", 1) > 1:  # VideoX-Fun leaves at least one step before the tail
        method["gradient_steps"] = min(method["gradient_steps"], options.sampling_steps - 1)

    def config(**train: Any) -> RunConfig:
        shape = {"frames": model.frames} | ({"path": "builtin-wan"} if peer.wan else {})
        return config_of(options, model=shape, method=method, train={"batch_size": number} | peer.train | train)

    driven = peer.model(model)
    ways = {RLVID: Way(config(), model), RELEASED: Way(config(**peer.released), driven)}
    ways |= {name: Way(config(**train), model) for name, train in peer.also.items()}
    return Matchup(networks, ways, [f"clip {index}: a dog runs over the grass" for index in range(number)])


def matchups(options: argparse.Namespace, names: Sequence[str]) -> Iterator[tuple[str, Sides, list[str]]]:
    """Yields each peer's name, steps and sides; the networks of a family are built once, and gone before the next."""
    for wan in (False, True):
        chosen = [name for name in names if PEERS[name].wan == wan]
        if not chosen:
            continue
        bench = None if wan else prepare(options)
        networks = wan_networks(options) if bench is None else of_bench(bench)
        for name in chosen:
            if PEERS[name].model is None:
                assert bench is not None
                know_prompts(bench.model, bench.reward, bench.prompts)
                yield name, bench, [RLVID, RELEASED]
            else:
                steps = matchup(PEERS[name], options, networks)
                yield name, steps, list(steps.ways)


def of_bench(bench: Bench) -> Networks:
    """Returns the networks of a bench."""
    return Networks(bench.model, bench.reward, bench.engine, bench.meter)


def wan_networks(options: argparse.Namespace) -> Networks:
    """Builds a model of Wan's classes: a miniature, the built-in one (``reduced``), or one of Wan's 1.3B (``full``).

    Frames are 4 n + 1: one more than the preset's, as a rule.
    """
    from rlvid.config.model import ModelConfig
    from rlvid.models.load import load_video_model
    from rlvid.models.wan_text import UMT5Embedder
    from rlvid.reward.load import load_reward
    from rlvid.toy.tiny_wan import tiny_wan

    torch.manual_seed(0)
    device = torch.device(options.device)
    shape = {"frames": options.frames // 4 * 4 + 1}
    if options.preset == "tiny":
        tiny = tiny_wan(**shape, height=options.size, width=options.size)
        assert isinstance(tiny.text, UMT5Embedder)
        for part in (tiny.denoiser, tiny.vae, tiny.text.encoder):
            nn.Module.to(part, device)
        model: VideoModel = tiny
    else:
        path = {"reduced": "builtin-wan", "full": "random-wan-1.3b"}[options.preset]
        spec = ModelConfig(path=path, size=options.size, precision=options.precision, **shape)
        model = load_video_model(spec, device=device)
    if options.preset == "reduced":
        reward = load_reward("builtin", device, precision=options.precision)
    else:
        reward = build_reward(options.preset, options.precision, device)
    assert isinstance(reward, ClipReward)
    engine = add_adapter(model.denoiser, config_of(options), device)
    return Networks(model, reward, engine, Meter(device))
