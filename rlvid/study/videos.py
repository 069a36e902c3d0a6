"""The videos and scores of an evaluation, as a study needs them."""

import hashlib
import math
from pathlib import Path

import numpy as np

from rlvid.evaluate.results.about import Case, VideoKey, describe, read_about
from rlvid.evaluate.results.read import read_scores
from rlvid.evaluate.results.videos import decode_frames, find_videos, open_frame, read_frames


class UnreadableError(ValueError):
    """A video that was there when the evaluation was opened cannot be read, perhaps as it has been moved away."""


class Videos:
    """The videos that an evaluation's folder holds; frames are read when they are asked for.

    Args:
        folder: what `rlvid evaluate` wrote.

    Attributes:
        folder: the same.
        models: labels by name, in the evaluation's order.
        rewards: which rewards were the metrics ``reward`` and ``held_out``, as far as the evaluation says so.
        cases: prompts by case.

    Raises:
        ValueError: there is no evaluation, it cannot be read, holds a video twice, or has an empty or repeated prompt.
    """

    def __init__(self, folder: Path):
        self.folder, self._about = folder, read_about(folder)
        self.models = {each.name: each.label for each in self._about.models}
        self.rewards = {metric: name for metric, name in (self._about.rewards or {}).items() if name}
        for name, prompts in self._about.sets.items():
            seen: dict[str, int] = {}
            for number, prompt in enumerate(prompts, 1):
                if seen.setdefault(prompt, number) != number:
                    raise ValueError(
                        f"{folder}: prompt {prompt!r} is in set {name} twice, at {seen[prompt]} and {number}; evaluate "
                        "with each prompt once (and several copies, if you like)"
                    )
        self._videos = find_videos(folder, self._about)
        self.cases = {case: self._about.sets[case.set][case.index] for _, case in self._videos}

    def has(self, model: str, case: Case) -> bool:
        """Returns whether there is such a video, be it without frames."""
        return (model, case) in self._videos

    def has_frames(self, model: str, case: Case) -> bool:
        """Returns whether a video has frames; one of which a pixel was no number is kept without."""
        return self.has(model, case) and self._videos[model, case].has_frames

    def fps(self, model: str, case: Case) -> float:
        """Returns a video's number of frames a second."""
        return self._videos[model, case].fps

    def frames(self, model: str, case: Case) -> list[bytes]:
        """Returns the frames of a video, PNG each; raises UnreadableError if they cannot be read."""
        try:
            return next(read_frames([self._videos[model, case]]))
        except ValueError as error:
            raise UnreadableError(f"the video of {describe((model, case))} cannot be read: {error}") from error

    def pixels(self, model: str, case: Case) -> np.ndarray:
        """Returns the frames of a video, uint8 (F, H, W, 3); raises ValueError if they cannot be read."""
        return decode_frames(self.frames(model, case), self._named(model, case))

    def inspect(self, model: str, case: Case) -> tuple[str, str]:
        """Returns a video's shape in words ("8 frames of 32 x 32 at 8 a second"), and a digest of its frames.

        Raises:
            UnreadableError: it cannot be read.
            ValueError: it has no frames, a damaged one, or some of other sizes.
        """
        frames, digest, sizes = self.frames(model, case), hashlib.blake2b(digest_size=16), set()
        for place, frame in enumerate(frames):
            digest.update(hashlib.blake2b(frame).digest())
            with open_frame(frame, f"{self._named(model, case)}: frame {place}") as image:
                sizes.add(f"{image.width} x {image.height}")
                image.verify()
        if not sizes:
            raise ValueError(f"{self._named(model, case)} has no frames, since a pixel was no number; compare others")
        if len(sizes) > 1:
            raise ValueError(
                f"{self._named(model, case)} has frames of several sizes; delete that file and run rlvid evaluate again"
            )
        return f"{len(frames)} frames of {sizes.pop()} at {self.fps(model, case):g} a second", digest.hexdigest()

    def _named(self, model: str, case: Case) -> str:
        return f"{self._videos[model, case].path}: the video of {describe((model, case))}"

    def scores(self) -> dict[str, dict[VideoKey, float]]:
        """Returns each metric of ``evaluation.parquet`` where it is finite; nothing where there is no such file."""
        found: dict[str, dict[VideoKey, float]] = {}
        if (self.folder / "evaluation.parquet").is_file():
            for key, values in read_scores(self.folder, self._about).items():
                for metric, value in values.items():
                    if math.isfinite(value):
                        found.setdefault(metric, {})[key] = value
        return found
