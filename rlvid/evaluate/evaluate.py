"""Scores models video by video, sums the scores up, and compares two models sample by sample."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from rlvid.evaluate import metrics
from rlvid.evaluate.clip import FrameTextModel
from rlvid.evaluate.generate import generate
from rlvid.models.base import VideoModel
from rlvid.reward.clip import ClipReward
from rlvid.reward.video import ImageReward, mean_of_frames
from rlvid.toy import oracle

_SHOWN = 4  # frames of a video that are kept for pictures


@dataclass(frozen=True)
class Row:
    """One video and its scores; NaN where a metric does not apply or the video is not finite.

    ``reward`` is the mean over all frames of the image reward that was trained on, ``held_out`` that of the one that
    was not; ``consistency`` is of consecutive frames, the paper's, and two other definitions stand beside it (see
    ``rlvid.evaluate.metrics``); ``diversity`` compares the videos that a prompt has in one batch, where there are
    several. ``oracle_*`` are ``rlvid.toy.oracle.grade``'s. ``frames`` holds four frames (S, C, H, W), uint8, spread
    over the video, of those videos that were asked to be pictured.
    """

    model: str
    set: str
    steps: int
    index: int
    prompt: str
    reward: float
    held_out: float
    clipsim: float
    consistency: float
    consistency_all_pairs: float
    consistency_vbench: float
    motion: float
    flickering: float
    diversity: float
    oracle_subject: float
    oracle_colour: float
    oracle_background: float
    oracle_motion: float
    oracle_sharpness: float
    oracle_fidelity: float
    oracle_score: float
    frames: Tensor | None = field(default=None, repr=False, compare=False)


METRICS = tuple(each.name for each in fields(Row) if each.type is float)
"""Every metric of a ``Row``, by the name of its field."""


@dataclass(frozen=True)
class Summary:
    """All videos of one model, prompt set and number of steps.

    ``mean`` and ``std`` (of a sample, over videos) of every metric are over the ``used[metric]`` videos where it is
    finite, and NaN where there are none (std: fewer than two). ``broken`` videos of ``count`` have no finite reward.
    """

    model: str
    set: str
    steps: int
    count: int
    broken: int
    mean: dict[str, float]
    std: dict[str, float]
    used: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """What one metric gained from base to tuned, over the ``pairs`` of videos where both are finite.

    ``low`` and ``high`` bound the 95 % interval of ``difference`` (percentiles of a paired bootstrap; NaN with fewer
    than two pairs). ``in_base_std`` is the difference in units of the base's standard deviation over videos.
    """

    base: str
    tuned: str
    set: str
    steps: int
    metric: str
    pairs: int
    excluded: int
    difference: float
    low: float
    high: float
    in_base_std: float


@torch.no_grad()
def score_videos(
    frames_BFCHW: Tensor,
    prompts: list[str],
    *,
    reward: ImageReward,
    held_out: ImageReward | None,
    clip: FrameTextModel,
    use_oracle: bool,
) -> dict[str, Tensor]:
    """Every metric of B videos in [0, 1] on the rewards' device: name -> (B,), float32 on the CPU.

    All metrics of a video with a pixel that is not finite are NaN.
    """
    finite_B = frames_BFCHW.isfinite().flatten(1).all(1).cpu()
    scores = {name: torch.full((len(prompts),), torch.nan) for name in METRICS}
    if not finite_B.any():
        return scores
    frames = frames_BFCHW[finite_B.to(frames_BFCHW.device)]
    asked = [prompt for prompt, finite in zip(prompts, finite_B.tolist(), strict=True) if finite]
    image_BFD = clip.image_features(frames)
    found = {
        "reward": mean_of_frames(reward(frames, asked)),
        "clipsim": metrics.similarity(image_BFD, clip.text_features(asked)),
        "consistency": metrics.consistency(image_BFD),
        "consistency_all_pairs": metrics.consistency(image_BFD, "all_pairs"),
        "consistency_vbench": metrics.consistency(image_BFD, "vbench"),
        "motion": metrics.motion(frames),
        "flickering": metrics.flickering(frames),
        "diversity": metrics.diversity(image_BFD, asked),
    }
    if held_out is not None:
        found["held_out"] = mean_of_frames(held_out(frames, asked))
    if use_oracle:
        found |= {f"oracle_{name}": value for name, value in oracle.grade(frames, asked).items()}
    for name, value in found.items():
        scores[name][finite_B] = value.float().cpu()
    return scores


def evaluate_model(
    model: VideoModel,
    prompts_by_set: Mapping[str, list[str]],
    *,
    name: str,
    reward: ImageReward,
    held_out: ImageReward | None = None,
    clip: FrameTextModel | None = None,
    steps_list: Iterable[int] = (20, 50),
    guidance: float = 3.0,
    final: str = "exact",
    seed: int = 0,
    use_oracle: bool = True,
    batch: int = 16,
    pictured: int = 8,
    first_index: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Generates a video for every prompt and number of steps, and scores it.

    Args:
        model: on the same device as the rewards.
        prompts_by_set: prompts of each set; video ``index`` of every set starts from the same noise.
        name: of the model, as tables show it.
        reward: the image reward that was trained on.
        held_out: one that was not; without it, its scores are NaN.
        clip: measures CLIPSIM and consistency; default: ``held_out`` or else ``reward``, if they are CLIP models.
        steps_list: numbers of DDIM steps.
        guidance: classifier-free guidance g.
        final: see ``generate``.
        seed: of the noise.
        use_oracle: grade videos of the built-in world by the oracle too.
        batch: most videos that are made and scored at once.
        pictured: videos of each set and number of steps that keep frames for pictures.
        first_index: index of the first prompt of each set, where a set is evaluated in parts.
        progress: called with (videos done, all videos).

    Raises:
        ValueError: a set without prompts, ``batch`` below 1, or no CLIP model to measure with.
    """
    clip = clip or next((each for each in (held_out, reward) if isinstance(each, ClipReward)), None)
    if clip is None:
        raise ValueError("evaluate_model: neither reward is a CLIP model; give clip= for CLIPSIM and consistency")
    if batch < 1 or not all(prompts_by_set.values()):
        sizes = {each: len(prompts) for each, prompts in prompts_by_set.items()}
        raise ValueError(f"evaluate_model: batch = {batch}, prompts = {sizes}; each must be 1 or more, or be left out")
    steps_list = list(steps_list)
    total = len(steps_list) * sum(map(len, prompts_by_set.values()))
    rows: list[Row] = []
    for steps in steps_list:
        for set_name, prompts in prompts_by_set.items():
            for start in range(0, len(prompts), batch):
                part, index = prompts[start : start + batch], first_index + start
                settings = {"seed": seed, "steps": steps, "guidance": guidance, "final": final}
                frames = generate(model, part, batch=batch, first_index=index, **settings)
                scores = score_videos(
                    frames.to(model.device), part, reward=reward, held_out=held_out, clip=clip, use_oracle=use_oracle
                )
                rows += _rows(name, set_name, steps, index, part, scores, frames[: max(0, pictured - index)])
                if progress is not None:
                    progress(len(rows), total)
    return rows


def _rows(
    model: str, set_name: str, steps: int, start: int, prompts: list[str], scores: dict[str, Tensor], pictured: Tensor
) -> list[Row]:
    """The rows of a batch whose first video has index ``start``; the first ``len(pictured)`` of them keep frames."""
    rows = []
    for place, prompt in enumerate(prompts):
        values = {metric: value[place].item() for metric, value in scores.items()}
        kept = _shown(pictured[place]) if place < len(pictured) else None
        rows.append(Row(model, set_name, steps, start + place, prompt, **values, frames=kept))
    return rows


def _shown(frames_FCHW: Tensor) -> Tensor | None:
    """Four frames spread over a video, uint8; None when a pixel is not finite."""
    if not frames_FCHW.isfinite().all():
        return None
    count = len(frames_FCHW)
    chosen = torch.linspace(0, count - 1, min(_SHOWN, count)).round().long()
    return (frames_FCHW[chosen] * 255).round().to(torch.uint8)


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Mean, sample standard deviation and count of every metric for each (model, set, steps), in order of appearance.

    Scores that are not finite are left out and counted.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.set, row.steps), []).append(row)
    summaries = []
    for (model, set_name, steps), group in groups.items():
        mean, std, used = {}, {}, {}
        for metric in METRICS:
            values = np.array([getattr(row, metric) for row in group], dtype=np.float64)
            values = values[np.isfinite(values)]
            used[metric] = len(values)
            mean[metric] = float(values.mean()) if len(values) else float("nan")
            std[metric] = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        summaries.append(Summary(model, set_name, steps, len(group), len(group) - used["reward"], mean, std, used))
    return summaries


def compare(
    base_rows: Iterable[Row], tuned_rows: Iterable[Row], *, resamples: int = 2000, seed: int = 0
) -> list[Comparison]:
    """Differences tuned minus base of every metric for each (set, steps), paired by (set, steps, index).

    Args:
        base_rows: rows of one model.
        tuned_rows: rows of another model, from the same prompts, steps and seed.
        resamples: of the bootstrap over pairs.
        seed: of the bootstrap.

    Raises:
        ValueError: the two do not hold the same videos, or one holds more than one model.
    """
    base, tuned = _by_video(base_rows, "base"), _by_video(tuned_rows, "tuned")
    alone = sorted(base.keys() ^ tuned.keys())
    if alone:
        raise ValueError(
            f"compare: video (set, steps, index) = {alone[0]} has one model's row only; evaluate both alike"
        )
    groups: dict[tuple[str, int], list[tuple[Row, Row]]] = {}
    for key, row in base.items():
        if row.prompt != tuned[key].prompt:
            raise ValueError(f"compare: video {key} has two prompts, {row.prompt!r} and {tuned[key].prompt!r}")
        groups.setdefault(key[:2], []).append((row, tuned[key]))
    comparisons = []
    for (set_name, steps), pairs in groups.items():
        for metric in METRICS:
            before, after = (np.array([getattr(pair[i], metric) for pair in pairs], dtype=np.float64) for i in (0, 1))
            both = np.isfinite(before) & np.isfinite(after)
            gained = _paired(before[both], after[both], resamples, np.random.default_rng(seed))
            counts = (int(both.sum()), int((~both).sum()))
            comparisons.append(
                Comparison(pairs[0][0].model, pairs[0][1].model, set_name, steps, metric, *counts, *gained)
            )
    return comparisons


def _by_video(rows: Iterable[Row], side: str) -> dict[tuple[str, int, int], Row]:
    found: dict[tuple[str, int, int], Row] = {}
    for row in rows:
        if found.setdefault((row.set, row.steps, row.index), row) is not row:
            raise ValueError(f"compare: the {side} rows hold video ({row.set!r}, {row.steps}, {row.index}) twice")
    if len(models := {row.model for row in found.values()}) != 1:
        raise ValueError(f"compare: the {side} rows hold {len(models)} models; give the rows of one")
    return found


def _paired(
    before: np.ndarray, after: np.ndarray, resamples: int, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Mean difference, its 95 % interval by the paired bootstrap, and the difference in base standard deviations."""
    gain = after - before
    if len(gain) < 2:
        return (float(gain.mean()) if len(gain) else float("nan"), *[float("nan")] * 3)
    drawn = gain[generator.integers(0, len(gain), (resamples, len(gain)))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    std = before.std(ddof=1)
    return float(gain.mean()), float(low), float(high), float(gain.mean() / std) if std > 0 else float("nan")
