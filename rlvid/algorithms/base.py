"""The interface of a method: a generator of losses.

    for batch in batches:
        for update in algorithm.updates(batch):
            engine.backward(update.loss)
            if update.step:
                engine.step()

Reward-gradient methods yield one optimiser step a batch, in one or more accumulated parts. Policy-gradient and
supervised methods first roll out without gradient and then yield many. The loop knows none of them by name.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlvid.config import RunConfig
from rlvid.models.base import VideoModel
from rlvid.reward.video import ImageReward


@dataclass(frozen=True)
class Batch:
    """A worker's share of a global batch, on the model's device.

    ``serials`` are the samples' places in the run's global order (step x batch size + place in the batch): the
    position that randomness is drawn at. ``latents_BCFhw`` are source latents (posterior samples).
    ``global_size`` is the number of videos over all workers.
    """

    step: int
    serials: list[int]
    prompts: list[str]
    text_BLD: Tensor
    latents_BCFhw: Tensor
    global_size: int

    def __len__(self) -> int:
        return len(self.serials)

    def split(self, size: int) -> Iterator["Batch"]:
        """Consecutive parts of at most ``size`` videos."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(
                self.step,
                self.serials[part],
                self.prompts[part],
                self.text_BLD[part],
                self.latents_BCFhw[part],
                self.global_size,
            )


@dataclass(frozen=True)
class Samples:
    """Generated videos with their scores, for the archive: everything detached and on the CPU.

    ``frames_BSCHW`` in [0, 1] holds the decoded frames, ``frames_BS`` says which they are; ``held_out_B`` is the
    reward of the same frames under the reward that is not trained on, if there is one.
    """

    serials: list[int]
    prompts: list[str]
    frames_BSCHW: Tensor
    frames_BS: Tensor
    scores_BS: Tensor
    reward_B: Tensor
    held_out_B: Tensor | None = None


@dataclass(frozen=True)
class Update:
    """One loss to back-propagate.

    Attributes:
        loss: scalar, already scaled so that the sum over accumulated updates is the worker's mean loss.
        step: whether the optimiser steps after this one.
        metrics: name -> (sum, count) over the worker's videos, to be averaged over all workers.
        samples: videos made on the way, if any.
    """

    loss: Tensor
    step: bool
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: Samples | None = None


class Stopwatch:
    """Seconds spent in named stages since the last ``read``; waits for the device at the borders of a stage."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block under it."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def read(self) -> dict[str, float]:
        """The sums, which then start again from nothing."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass
class Context:
    """What every method works with: the model, the reward trained on, an optional held-out one, the run's settings."""

    config: RunConfig
    model: VideoModel
    reward: ImageReward
    held_out: ImageReward | None
    stopwatch: Stopwatch


class Algorithm(ABC):
    """A method. Its own state (statistics, value networks, rollouts) goes into checkpoints."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def updates(self, batch: Batch) -> Iterator[Update]:
        """The losses of one batch, in order; the last one of each optimiser step has ``step`` set."""

    def state_dict(self) -> dict[str, Any]:
        """State to be saved; empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(state)[:3]}")


def totals(**values: Tensor) -> dict[str, tuple[float, float]]:
    """(sum, count) of each tensor, as metrics are passed on."""
    return {name: (float(v.detach().float().sum()), float(v.numel())) for name, v in values.items()}
