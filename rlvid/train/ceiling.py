"""The ceiling of the reward as a quantile of the rewards of real clips: ``reward.ceiling=q0.9``.

    positions of clips, evenly --one Ray task--> their rewards --driver--> quantile, kept in ceiling.json of the run

The task rewards a clip as a worker rewards a video: the autoencoder decodes the clip's latents at SegVR's frames, and
TAR's weights make one number of their scores. A clip keeps its frames: they depend on the seed and on its place alone.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from rlvid.algorithms.base import Batch, Context, Observer, Stopwatch
from rlvid.algorithms.scoring import score
from rlvid.cluster.reward_actor import ActorCaller
from rlvid.collection import collection_paused
from rlvid.config.train import NOT_REAL
from rlvid.data.clips import DamagedPart
from rlvid.data.encoders import read_item
from rlvid.data.shares import tensors
from rlvid.data.training_set import TrainingSet
from rlvid.data.videos import VideoError
from rlvid.evaluate.scorers import Scorers
from rlvid.faults import describe
from rlvid.files import damaged, read_mapping, write_atomic
from rlvid.models.base import VideoModel
from rlvid.reward.load import trained_reward
from rlvid.train.job import Job
from rlvid.train.one_task import in_one_task
from rlvid.train.reporter import ended_after

FILE = "ceiling.json"
"""The file in a run's folder: ceiling, quantile, reward, number of clips with and without one."""
MOST_CLIPS = 256
"""Clips that are rewarded at most."""
_WAY_OUT = "bring back the file with which the run began, or choose another name=..."


@dataclass(frozen=True)
class ClipRewards:
    """The rewards of clips, in their order: NaN without one; ``fault`` says why the first of these has none."""

    rewards: list[float]
    fault: str | None = None

    def quantile(self, share: float) -> float:
        """Returns the quantile of the rewards that there are, between two of them by a straight line."""
        return float(np.nanquantile(self.rewards, share))

    @property
    def count(self) -> int:
        """The number of clips with a reward."""
        return sum(map(math.isfinite, self.rewards))


def run_ceiling(job: Job, clips: TrainingSet, console: Console) -> float | None:
    """Returns the reward that ``reward.ceiling`` stands for where it is a quantile, else None.

    A run that has begun keeps its ceiling. Any other start computes it, which needs the room of a worker.

    Args:
        job: of the run; its workers do not run yet.
        clips: the run's training set.
        console: prints the ceiling once it is computed.

    Raises:
        ValueError: no clip gets a reward, or the file of a run that has begun is gone or damaged.
        RuntimeError: the task failed.
    """
    reward, note = job.config.reward, job.run / FILE
    quantile = reward.ceiling_quantile
    if quantile is None:
        return None
    if (job.run / "archive").is_dir():
        return _read(note, quantile)
    real = real_clips(job.config.data.sources, clips)
    found = _on_ray(job, real, evenly(real.count, MOST_CLIPS))
    left_out = len(found.rewards) - found.count
    if not found.count:
        raise ValueError(
            f"reward.ceiling = {reward.ceiling!r}: none of the {left_out} real clips got a reward ({found.fault}); set "
            "reward.ceiling to a number, such as reward.ceiling=0.8, or correct the reward"
        )
    ceiling = found.quantile(quantile)
    facts = {"ceiling": ceiling, "quantile": quantile, "clips": found.count, "left_out": left_out}
    write_atomic(note, json.dumps({**facts, "reward": Scorers(reward).names["reward"]}, indent=2).encode())
    without = f"; {left_out} more got none ({found.fault})" if left_out else ""
    console.print(
        f"ceiling {ceiling:.3g}: the {quantile:g} quantile of the rewards of {found.count} clips{without}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return ceiling


def _read(note: Path, quantile: float) -> float:
    """Returns the ceiling with which a run began."""
    try:
        kept = read_mapping(note)
    except ValueError as error:
        raise ValueError(f"{error}; {_WAY_OUT}") from None
    ceiling = kept.get("ceiling")
    if kept.get("quantile") != quantile or not isinstance(ceiling, float) or not math.isfinite(ceiling):
        raise damaged(note, f"it holds no ceiling of the quantile {quantile:g}", _WAY_OUT)
    return ceiling


def real_clips(sources: Sequence[str], clips: TrainingSet) -> TrainingSet:
    """Returns the sources with real clips; videos also where a method needs their captions alone.

    Args:
        sources: names of the sources, as in ``data.source``.
        clips: the training set of these sources.
    """
    real = [each for name, each in zip(sources, clips.sources, strict=True) if name not in NOT_REAL]
    return TrainingSet(tuple(replace(source, kind=source.open().kind) for source in real))


def evenly(count: int, most: int) -> list[int]:
    """Returns ``most`` positions of ``count`` at equal distances, or all if there are no more."""
    taken = min(count, most)
    return [place * count // taken for place in range(taken)]


def _on_ray(job: Job, clips: TrainingSet, positions: list[int]) -> ClipRewards:
    """Rewards clips in one task that has the room of a worker; see ``reward_clips``."""
    lost = "killed, crashed, or a call of the reward longer than reward.timeout"
    return in_one_task(
        reward_clips, job, clips, positions, setting=f"reward.ceiling = {job.config.reward.ceiling!r}", lost=lost
    )


@torch.no_grad()
def reward_clips(job: Job, clips: TrainingSet, positions: Sequence[int]) -> ClipRewards:
    """Rewards clips with the run's reward, in batches of the size in which the run's workers sample.

    Args:
        job: of the run.
        clips: real clips, encoded or as videos.
        positions: of the clips to reward.

    Raises:
        ValueError: the model or the reward cannot be loaded, or the scores have another shape than allowed.
    """
    with collection_paused():
        from rlvid.models.load import load_video_model  # in the task alone: it takes seconds

    config, spec, listener = job.config, job.config.model, _Listener(job.config.reward.timeout)
    device = torch.device("cuda") if job.use_gpu else torch.device("cpu")
    spec = spec.model_copy(update={"path": job.model})
    model = load_video_model(spec, text=False, denoiser=False, device=device)
    model.denoiser = torch.nn.Identity()  # by far the largest part
    reward = trained_reward(job.reward, device, ActorCaller)
    context = Context(config, model, reward, None, Stopwatch(device), observer=listener)
    rewards, size = [math.nan] * len(positions), config.rollout_batch
    for start in range(0, len(positions), size):
        places = range(start, min(start + size, len(positions)))
        readable = dict[int, tuple[str, Tensor]]()
        try:
            for place, clip in zip(places, _read_clips(model, clips, [positions[i] for i in places]), strict=True):
                if isinstance(clip, str):
                    listener.report(clip)
                else:
                    readable[place] = clip
        except DamagedPart as error:
            listener.report(describe(error))
        if not readable:
            continue
        captions, latents = zip(*readable.values(), strict=True)
        serials = [place * config.videos_per_start for place in readable]  # each clip has frames of its own
        nowhere = torch.zeros(len(captions), 0, 0, device=device)  # no reward looks at embeddings
        batch = Batch(0, serials, list(captions), nowhere, torch.cat(latents).to(device))
        assert batch.latents_BCFhw is not None
        found = score(context, batch, batch.latents_BCFhw).samples.reward_B.tolist()
        for place, value in zip(readable, found, strict=True):
            rewards[place] = value if math.isfinite(value) else math.nan
    return ClipRewards(rewards, listener.fault)


def _read_clips(model: VideoModel, clips: TrainingSet, positions: Sequence[int]) -> Iterator[tuple[str, Tensor] | str]:
    """Yields caption and latents (1, C, F, h, w) of clips, the means of their posteriors; a fault where there are none.

    Raises:
        DamagedPart: the rows cannot be read.
    """
    rows = clips.rows(positions)
    for place in range(len(rows)):
        row = rows.slice(place, 1)
        if "key" in row.column_names and row["key"][0].as_py() is not None:  # a video, not encoded yet
            try:
                caption, frames_FCHW = read_item({name: row[name][0].as_py() for name in ("source", "caption")}, model)
            except VideoError as error:
                yield str(error)
                continue
            yield caption, model.encode_frames(frames_FCHW[None]).mean.float().cpu()
            continue
        (caption,), _, posterior = tensors(row)
        yield caption, posterior.mean


class _Listener(Observer):
    """Keeps the first failure; ends the process where a call of the reward takes longer than ``timeout`` seconds."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self.fault: str | None = None

    def report(self, line: str) -> None:
        self.fault = self.fault or line

    @contextmanager
    def calling(self, reward: str) -> Iterator[None]:
        with ended_after(self.timeout, sys.__stderr__) if self.timeout else nullcontext():
            yield
