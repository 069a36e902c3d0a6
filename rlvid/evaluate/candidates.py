"""Scores checkpoints on fixed prompts from fixed noise, and measures the distance of their videos from the base's."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rlvid.config.guard import AT_ONCE
from rlvid.evaluate.results.rows import Row
from rlvid.evaluate.score import VideoBatch, VideoScorer, make_videos, split
from rlvid.models.base import VideoModel
from rlvid.runs.recommendation import DISTANCE


class CandidateScorer:
    """Makes and scores the same videos with every state of a model; the first call is for the base model.

    The distance of a video is 1 - v . b, with v and b the normalised mean CLIP features of its frames and of the
    frames of the base model's video from the same noise; it is in [0, 2], under ``distance`` in a row's ``extra``.

    Args:
        model: on the scorer's device.
        scorer: of the videos; its CLIP measures the distance.
        prompts: distinct ones.
        copies: videos of each prompt.
        steps: sampling steps of a video.
        seed: of the noise; video v, counted over prompts and copies, starts from noise (seed, v).
        guidance: of the sampling.
        final: as ``sampling.final_level``.
        reuse: as ``sampling.reuse``.
    """

    def __init__(
        self, model: VideoModel, scorer: VideoScorer, prompts: Sequence[str], copies: int, steps: int, *,
        seed: int, guidance: float, final: str, reuse: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.scorer, self.seed, self.guidance, self.final = model, scorer, seed, guidance, final
        self.reuse = reuse
        self._batches = [
            VideoBatch("guard", "guard", steps, start, part, copies)
            for start, part in split(prompts, copies, most=AT_ONCE)
        ]
        self._base_ND: Tensor | None = None

    def rows(self) -> list[Row]:
        """Makes and scores all videos with the model's present weights; those of a prompt are neighbours.

        Raises:
            RuntimeError: see ``RewardCaller``.
        """
        rows, features = list[Row](), list[Tensor]()
        for batch in self._batches:
            scored, found_BD = self._score(batch)
            rows += scored
            features.append(found_BD)
        found_ND = torch.cat(features)
        if self._base_ND is None:
            self._base_ND = found_ND
        distance_N = (1 - (found_ND * self._base_ND).sum(1)).clamp(min=0)
        each = zip(rows, distance_N.tolist(), strict=True)
        return [replace(row, extra=row.extra | {DISTANCE: distance}) for row, distance in each]

    @torch.no_grad()
    def _score(self, batch: VideoBatch) -> tuple[list[Row], Tensor]:
        """Makes and scores the videos of a batch, and lets their frames go; the rows, and a feature of each video."""
        noise_of = [(self.seed, index * batch.copies + copy) for index, copy, _ in batch.video_keys]
        frames = make_videos(self.model, batch, noise_of, self.guidance, self.final, self.reuse)
        device = self.model.device
        features_BD = F.normalize(self.scorer.features(frames, device).mean(1), dim=1).float().cpu()
        return self.scorer.rows(batch, frames, device), features_BD
