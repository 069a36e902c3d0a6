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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.config import RunConfig
from rlvid.diffusion.step import KERNELS, KernelOf
from rlvid.models.base import VideoModel
from rlvid.models.guidance import Guidance, LimitedGuidance
from rlvid.reward.video import ImageReward


@dataclass(frozen=True)
class Batch:
    """A worker's share of a global batch, on the model's device.

    ``serials`` are the samples' places in the run's global order (step x batch size + place in the batch): the
    position that randomness is drawn at. ``latents_BCFhw`` are source latents (posterior samples); None where
    the run has prompts and no clips. ``lost`` are the serials whose clip could not be read: another clip stands in
    their place, so that all workers compute alike, and it gets no reward.
    """

    step: int
    serials: list[int]
    prompts: list[str]
    text_BLD: Tensor
    latents_BCFhw: Tensor | None
    lost: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.serials)

    @property
    def readable_B(self) -> Tensor:
        """Which samples have their own clip, bool: no other one stands in its place."""
        return torch.tensor([serial not in self.lost for serial in self.serials], device=self.text_BLD.device)

    def split(self, size: int) -> Iterator["Batch"]:
        """Consecutive parts of at most ``size`` videos."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    def take(self, rows: Sequence[int]) -> "Batch":
        """Returns the videos at these places."""
        index = torch.as_tensor(list(rows), device=self.text_BLD.device)
        return Batch(
            self.step,
            [self.serials[row] for row in rows],
            [self.prompts[row] for row in rows],
            self.text_BLD[index],
            None if self.latents_BCFhw is None else self.latents_BCFhw[index],
            self.lost,
        )


@dataclass(frozen=True)
class Samples:
    """Generated videos with their scores, for the archive: all tensors detached and on the CPU.

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

    @staticmethod
    def join(parts: "list[Samples]") -> "Samples":
        """Several parts as one; at least one part."""
        held_out = [part.held_out_B for part in parts if part.held_out_B is not None]
        return Samples(
            [serial for part in parts for serial in part.serials],
            [prompt for part in parts for prompt in part.prompts],
            torch.cat([part.frames_BSCHW for part in parts]),
            torch.cat([part.frames_BS for part in parts]),
            torch.cat([part.scores_BS for part in parts]),
            torch.cat([part.reward_B for part in parts]),
            torch.cat(held_out) if held_out else None,
        )


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
    """Measures the seconds of named stages since the last ``read``; waits for the device at the borders of a stage."""

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
        """Returns the sums, which then start again from nothing."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: of tensors on a GPU, else of this process; 0 where it is unknown.

    A process that was forked counts the pages that it shares with its parent, such as imported libraries.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


class WorkerGroup:
    """The workers that compute together; by default a single one.

    What a method computes from several videos (statistics, a ranking) it computes from the global batch, or its result
    would depend on the number of workers.
    """

    rank: int = 0
    size: int = 1

    def gather(self, items: list[Any]) -> list[Any]:
        """Returns the items of all workers in the samples' global order: worker r holds every W-th one from r on."""
        return items

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over the workers."""


class Observer:
    """Receives failures and calls of rewards; this one ignores them."""

    def report(self, line: str) -> None:
        """Receives a line about a reward that failed."""

    @contextmanager
    def calling(self, reward: str) -> Iterator[None]:
        """Surrounds each call of the reward of that name."""
        yield


@dataclass
class Context:
    """The inputs of every method: the model, the trained reward, an optional held-out reward, the run's settings.

    ``measured_ceiling`` is the reward that ``reward.ceiling`` stands for where it is a quantile; None where nobody has
    computed it.
    """

    config: RunConfig
    model: VideoModel
    reward: ImageReward
    held_out: ImageReward | None
    stopwatch: Stopwatch
    workers: WorkerGroup = field(default_factory=WorkerGroup)
    observer: Observer = field(default_factory=Observer)
    measured_ceiling: float | None = None

    @property
    def ceiling(self) -> float | None:
        """The reward of a video above which more counts as no more."""
        ceiling = self.config.reward.ceiling
        return self.measured_ceiling if isinstance(ceiling, str) else ceiling

    @property
    def grid(self) -> Sequence[float]:
        """The points of the noise path that the run's whole chain visits, from noisy to clean."""
        return self.model.path.grid(self.config.sampling.steps)

    @property
    def guidance(self) -> Guidance:
        """Returns the guidance of training: of chains, replays and penalties, with and without gradient.

        Evaluation and generation guide at all levels: one sampler judges all runs, and exported pipelines have it.
        """
        sampling = self.config.sampling
        if sampling.guidance_interval is None:
            return sampling.guidance
        return LimitedGuidance(sampling.guidance, *sampling.guidance_interval)

    @property
    def kernel(self) -> KernelOf:
        """The kernel of the chain's random steps."""
        return KERNELS[self.config.sampling.kernel]

    def normal(self, purpose: str, batch: Batch, index: int = 0) -> Tensor:
        """Returns standard normal latents (B, C, F, h, w), a function of (seed, purpose, sample, index) alone."""
        positions = [(serial, index) for serial in batch.serials]
        draw = randomness.normal(self.model.latent_shape, self.config.seed, purpose, positions)
        return draw.to(self.model.device)


class Algorithm(ABC):
    """A method. Its own state (statistics, value networks) goes into checkpoints; ``method`` holds its settings."""

    method: Any

    def __init__(self, context: Context) -> None:
        self.context, self.method = context, context.config.method

    @abstractmethod
    def updates(self, batch: Batch) -> Iterator[Update]:
        """Yields the losses of one batch, in order; the last one of each optimiser step has ``step`` set."""

    def state_dict(self) -> dict[str, Any]:
        """State to be saved; empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of ``state_dict``."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(state)[:3]}")


def summed(parts: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Sums and counts added up, name by name."""
    result: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (total, count) in part.items():
            before = result.get(name, (0.0, 0.0))
            result[name] = (before[0] + total, before[1] + count)
    return result


def totals(**values: Tensor) -> dict[str, tuple[float, float]]:
    """(sum, count) of each tensor, as metrics are passed on."""
    return {name: (float(v.detach().double().sum()), float(v.numel())) for name, v in values.items()}
