"""Makes the videos of a model and scores them, batch by batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlvid.config.guard import PIXELS_AT_ONCE
from rlvid.diffusion.generate import generate
from rlvid.evaluate import metrics
from rlvid.evaluate.clip import FrameTextModel
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.evaluate.reward_calls import RewardCaller
from rlvid.models.base import VideoModel
from rlvid.reward.motion import motion
from rlvid.reward.video import ImageReward
from rlvid.world.grade import grade

BATCH = 16
"""Most videos that are made or scored together, unless a prompt has more."""
_FEATURES = "features"


@dataclass(frozen=True)
class VideoBatch:
    """Videos that are made and scored together: ``copies`` of some prompts of a set, by one model in D steps.

    ``start`` is the place of the first prompt in its set.
    """

    model: str
    set: str
    steps: int
    start: int
    prompts: tuple[str, ...]
    copies: int

    @property
    def video_keys(self) -> list[tuple[int, int, str]]:
        """(index, copy, prompt) of each video; the videos of a prompt are neighbours."""
        numbered = enumerate(self.prompts, self.start)
        return [(index, copy, prompt) for index, prompt in numbered for copy in range(self.copies)]

    @property
    def texts(self) -> list[str]:
        """The prompt of each video."""
        return [prompt for _, _, prompt in self.video_keys]


def split(prompts: Sequence[str], copies: int, most: int = BATCH) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Parts a set into batches of up to ``most`` videos: (place of the first prompt, prompts) of each.

    The videos of a prompt stay together, or their diversity could not be measured.
    """
    size = max(1, most // copies)
    for start in range(0, len(prompts), size):
        yield start, tuple(prompts[start : start + size])


@dataclass(frozen=True)
class VideoScorer:
    """Scores videos by every metric.

    Attributes:
        reward: the image reward that was trained on.
        held_out: one that was not; without it, its scores are NaN.
        clip: measures CLIPSIM and consistency.
        use_oracle: grade videos by the oracle of the built-in world too.
        further: more rewards by the names of their metrics, ``reward_NAME``.
        call_reward: limits the time of a user's own reward; by default without a limit.
    """

    reward: ImageReward
    held_out: ImageReward | None
    clip: FrameTextModel
    use_oracle: bool
    further: Mapping[str, ImageReward] = field(default_factory=dict)
    call_reward: RewardCaller = field(default_factory=RewardCaller)

    @torch.no_grad()
    def scores(self, frames_BFCHW: Tensor, prompts: list[str], device: torch.device | None = None) -> dict[str, Tensor]:
        """Computes every metric of B videos in [0, 1]: name -> (B,), float32 on the CPU.

        All metrics of a video with a pixel that is not finite are NaN. Of large videos a part is scored at a time, so
        that memory is bounded.

        Args:
            frames_BFCHW: the videos.
            prompts: B of them.
            device: the scorers', to which the frames are moved part by part; default: where they are.

        Raises:
            RuntimeError: see ``RewardCaller``.
        """
        finite_B = torch.stack([frames_FCHW.isfinite().all() for frames_FCHW in frames_BFCHW]).cpu()
        scores = {name: torch.full((len(prompts),), torch.nan) for name in (*METRICS, *self.further)}
        if not finite_B.any():
            return scores
        frames = frames_BFCHW if finite_B.all() else frames_BFCHW[finite_B.to(frames_BFCHW.device)]
        finite_prompts = [prompt for prompt, finite in zip(prompts, finite_B.tolist(), strict=True) if finite]
        parts, start = list[dict[str, Tensor]](), 0
        for part in frames.split(_at_once(frames)):
            parts.append(self._scores_of_part(part.to(device=device), finite_prompts[start : start + len(part)]))
            start += len(part)
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        image_BFD = found.pop(_FEATURES)
        found |= {
            "clipsim": metrics.similarity(image_BFD, self.clip.text_features(finite_prompts)),
            "consistency": metrics.consistency(image_BFD),
            "consistency_all_pairs": metrics.consistency(image_BFD, "all_pairs"),
            "consistency_vbench": metrics.consistency(image_BFD, "vbench"),
            "diversity": metrics.diversity(image_BFD, finite_prompts),
        }
        for name, value in found.items():
            scores[name][finite_B] = value.float().cpu()
        return scores

    def _scores_of_part(self, frames_BFCHW: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Returns what needs the pixels of some videos: their features (B, F, D), and metrics (B,) by name."""
        found = {
            _FEATURES: self.clip.image_features(frames_BFCHW),
            "reward": self.call_reward(self.reward, frames_BFCHW, prompts),
            "motion": torch.cat([motion(one) for one in frames_BFCHW.split(1)]),  # which copies pixels
            "flickering": torch.cat([metrics.flickering(one) for one in frames_BFCHW.split(1)]),
        }
        if self.held_out is not None:
            found["held_out"] = self.call_reward(self.held_out, frames_BFCHW, prompts)
        found |= {name: self.call_reward(each, frames_BFCHW, prompts) for name, each in self.further.items()}
        if self.use_oracle:
            found |= {f"oracle_{name}": value for name, value in grade(frames_BFCHW, prompts).items()}
        return found

    @torch.no_grad()
    def features(self, frames_BFCHW: Tensor, device: torch.device | None = None) -> Tensor:
        """Returns the CLIP's features (B, F, D) of videos, part by part; ``device`` as for ``scores``."""
        parts = frames_BFCHW.split(_at_once(frames_BFCHW))
        return torch.cat([self.clip.image_features(part.to(device=device)) for part in parts])

    def rows(self, batch: VideoBatch, frames_BFCHW: Tensor, device: torch.device | None = None) -> list[Row]:
        """Scores the videos of a batch, which are in [0, 1]; ``device`` as for ``scores``.

        Raises:
            RuntimeError: see ``RewardCaller``.
        """
        scores = self.scores(frames_BFCHW, batch.texts, device)
        rows = []
        for place, (index, copy, prompt) in enumerate(batch.video_keys):
            values = {metric: value[place].item() for metric, value in scores.items()}
            extra = {metric: values.pop(metric) for metric in self.further}
            rows.append(Row(batch.model, batch.set, batch.steps, index, prompt, **values, copy=copy, extra=extra))
        return rows


def _at_once(frames_BFCHW: Tensor) -> int:
    """Returns how many of the videos are scored at once, 1 or more."""
    frames, _, height, width = frames_BFCHW.shape[1:]
    return max(1, PIXELS_AT_ONCE // (frames * height * width))


def make_videos(
    model: VideoModel, batch: VideoBatch, noise_of: Sequence[tuple[int, int]], guidance: float, final: str,
    reuse: int = 1,
) -> Tensor:  # fmt: skip
    """Returns frames_BFCHW of a batch, float32 in [0, 1], on the CPU; see ``rlvid.diffusion.generate.generate``."""
    texts = batch.texts
    return generate(
        model,
        texts,
        noise_of=noise_of,
        steps=batch.steps,
        guidance=guidance,
        final=final,
        reuse=reuse,
        batch=len(texts),
    )


def evaluate_model(
    model: VideoModel, batches: Iterable[VideoBatch], scorer: VideoScorer, *, seed: int, guidance: float, final: str
) -> list[Row]:
    """Makes and scores the videos of a model in memory; the model is on the rewards' device.

    Video v of a set, counted over prompts and copies, starts from noise (``seed``, v).

    Raises:
        RuntimeError: see ``RewardCaller``.
    """
    rows: list[Row] = []
    for batch in batches:
        noise_of = [(seed, index * batch.copies + copy) for index, copy, _ in batch.video_keys]
        rows += scorer.rows(batch, make_videos(model, batch, noise_of, guidance, final), model.device)
    return rows
