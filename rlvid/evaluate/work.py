"""The work of an evaluation: its shards, and the files of their videos and scores.

==========================  ==========================================================================================
``evaluation.yaml``         what it is: models, prompt sets, steps, seed; ``complete`` once its tables are written
``videos/part-00000...``    the videos of a shard: up to 16 of one model, set and number of steps
``videos/.others/``         parts of earlier evaluations in this folder: nothing that was made is thrown away
``.scores/``                the scores of a shard, named after its videos and scorers
==========================  ==========================================================================================
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rlvid.data.clips import digest
from rlvid.evaluate.cache import copy_part, identity_of, labels_of, read_rows, shape_of
from rlvid.evaluate.models import EvaluatedModel
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.evaluate.score import BATCH, VideoBatch, split
from rlvid.evaluate.scorers import Scorers
from rlvid.files import write_atomic


@dataclass(frozen=True)
class Shard(VideoBatch):
    """A batch whose videos and scores are kept on disk; ``source`` is the model."""

    source: EvaluatedModel

    @property
    def labels(self) -> list[dict[str, Any]]:
        """The columns of each video besides its frames."""
        common = {"model": self.model, "set": self.set, "steps": self.steps, "fps": float(self.source.shape.fps)}
        return [{**common, "index": index, "copy": copy, "prompt": prompt} for index, copy, prompt in self.video_keys]


@dataclass(frozen=True)
class Evaluation:
    """The plan of an evaluation, and its folder.

    Attributes:
        folder: of the evaluation.
        models: the first one is the base.
        sets: prompts of each set.
        steps: numbers of sampling steps.
        seed: of the noise; copy k of a prompt starts from that of ``seed`` + k.
        copies: videos of a prompt.
        guidance: classifier-free guidance g, of all models.
        final: see ``rlvid.diffusion.generate.generate``.
        scorers: what videos are scored with.
        shards: the work, in the order of the rows.
        identities: sixteen hex digits for each shard, over all that its videos depend on.
    """

    folder: Path
    models: tuple[EvaluatedModel, ...]
    sets: dict[str, tuple[str, ...]]
    steps: tuple[int, ...]
    seed: int
    copies: int
    guidance: float
    final: str
    scorers: Scorers
    shards: tuple[Shard, ...]
    identities: tuple[str, ...]

    @staticmethod
    def of(
        models: Sequence[EvaluatedModel],
        prompts_by_set: Mapping[str, Sequence[str]],
        *,
        steps_list: Sequence[int],
        folder: Path | None = None,
        seed: int = 0,
        copies: int = 1,
        scorers: Scorers | None = None,
    ) -> "Evaluation":
        """Plans an evaluation; guidance, final step and, by default, what is measured are of the first run.

        Args:
            models: as ``rlvid.evaluate.models.find_models`` gives them.
            prompts_by_set: prompts of each set.
            steps_list: numbers of sampling steps.
            folder: default: the first run's.
            seed: of the noise.
            copies: videos of a prompt, from 1 to 16.
            scorers: what videos are scored with.

        Raises:
            ValueError: an empty set, a prompt that a set has twice, or ``copies`` out of range.
        """
        if not 1 <= copies <= BATCH:
            raise ValueError(f"--copies {copies}: allowed are 1 to {BATCH} videos of a prompt")
        sets = {name: tuple(prompts) for name, prompts in prompts_by_set.items()}
        for name, prompts in sets.items():
            check_distinct(name, prompts)
        config = models[0].config
        sampling = config.sampling
        scorers = scorers or Scorers.of(config)
        shards = tuple(
            Shard(model.name, set_name, steps, start, part, copies, source=model)
            for model in models
            for steps in steps_list
            for set_name, prompts in sets.items()
            for start, part in split(prompts, copies)
        )
        how = [seed, sampling.guidance, sampling.final_level]
        identities = tuple(digest([p.source.made_of, how, p.steps, p.start, p.prompts, copies]) for p in shards)
        place = (folder or models[0].run).expanduser().resolve()
        return Evaluation(
            place, tuple(models), sets, tuple(steps_list), seed, copies, sampling.guidance, sampling.final_level,
            scorers.movable(), shards, identities,
        )  # fmt: skip

    @property
    def videos(self) -> Path:
        """The folder of the videos."""
        return self.folder / "videos"

    @property
    def stale_dir(self) -> Path:
        """Where parts lie that are not of this evaluation."""
        return self.videos / ".others"

    @property
    def count(self) -> int:
        """How many videos there are in all."""
        return self.count_of(range(len(self.shards)))

    def count_of(self, indices: Sequence[int]) -> int:
        """Counts the videos of some shards."""
        return sum(len(self.shards[index].video_keys) for index in indices)

    def part(self, index: int) -> Path:
        """Returns the file of a shard's videos."""
        return self.videos / f"part-{index:05d}.parquet"

    def scores(self, index: int) -> Path:
        """Returns the file of a shard's scores."""
        return self.folder / ".scores" / f"{digest([self.identities[index], self._scorers_identity])}.parquet"

    @cached_property
    def _scorers_identity(self) -> str:
        return self.scorers.identity

    def adopt_cached(self) -> None:
        """Moves cached videos of this evaluation into videos/ and all others to videos/.others.

        Raises:
            ValueError: a part is damaged.
        """
        self.stale_dir.mkdir(parents=True, exist_ok=True)
        for path in self.videos.glob(".part-*"):
            path.unlink(missing_ok=True)  # of a process that was killed while it wrote
        wanted = {self.part(index): identity for index, identity in enumerate(self.identities)}
        for path in sorted(self.videos.glob("part-*.parquet")):
            identity = identity_of(path)
            if wanted.get(path) != identity:
                os.replace(path, self.stale_dir / f"{identity or path.stem}.parquet")
        for index, identity in enumerate(self.identities):
            kept, part = self.stale_dir / f"{identity}.parquet", self.part(index)
            if kept.is_file() and not part.is_file():
                os.replace(kept, part)
            if part.is_file() and labels_of(part) != self.shards[index].labels:
                copy_part(part, part, self.shards[index].labels)  # the same videos under another name

    def missing_videos(self) -> list[int]:
        """Returns the shards whose videos are missing; of two shards with the same videos, the first."""
        first = {identity: index for index, identity in reversed(list(enumerate(self.identities)))}
        made = self._present()
        return sorted(index for identity, index in first.items() if identity not in made)

    def present_videos(self) -> list[int]:
        """Returns the shards whose videos are there, be it under another name."""
        made = self._present()
        return [index for index, identity in enumerate(self.identities) if identity in made]

    def _present(self) -> dict[str, Path]:
        """Returns the file of each identity whose videos exist."""
        parts = ((identity, self.part(index)) for index, identity in enumerate(self.identities))
        return {identity: path for identity, path in parts if path.is_file()}

    def copy_duplicates(self) -> None:
        """Copies videos to the shards that have the same ones as another shard."""
        made = self._present()
        for index, identity in enumerate(self.identities):
            if not self.part(index).is_file():
                copy_part(made[identity], self.part(index), self.shards[index].labels)

    def missing_scores(self) -> list[int]:
        """Returns the shards whose scores are missing; as ``missing_videos`` where two have the same."""
        missing = {self.scores(index): index for index in reversed(range(len(self.shards)))}
        return sorted(index for path, index in missing.items() if not path.is_file())

    def rows(self) -> list[Row]:
        """Returns all rows, once no scores are missing."""
        return [row for index in range(len(self.shards)) for row in self._rows_of(index)]

    def _rows_of(self, index: int) -> list[Row]:
        shard = self.shards[index]
        kept = read_rows(self.scores(index))
        return [replace(row, model=shard.model, set=shard.set, steps=shard.steps) for row in kept]

    def describe(self, *, complete: bool) -> None:
        """Writes ``evaluation.yaml``."""
        parts = sorted(self.videos.glob("part-*")) if complete else []  # else they may be of others, or damaged
        shape = next((found for path in parts if (found := shape_of(path))), None)
        planned = self.models[0].shape
        fps, frames, width, height = shape or (float(planned.fps), planned.frames, planned.width, planned.height)
        about = {
            "name": self.folder.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self.seed,
            "copies": self.copies,
            "steps": list(self.steps),
            "clip": self.scorers.clip,
            "models": [model.describe() for model in self.models],
            "sets": {name: list(prompts) for name, prompts in self.sets.items()},
            "fps": fps,
            "frames": frames,
            "size": width if width == height else [height, width],
            "guidance": self.guidance,
            "metrics": [*METRICS, *self.scorers.metrics],
            "rewards": self.scorers.names,
            "complete": complete,
        }
        text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=120)
        write_atomic(self.folder / "evaluation.yaml", text.encode())

    def mark_complete(self) -> None:
        """Marks the tables as written, and deletes scores that are not in them."""
        used = {self.scores(index) for index in range(len(self.shards))}
        for path in (self.folder / ".scores").glob("*.parquet"):
            if path not in used:
                path.unlink()
        self.describe(complete=True)

    def clear(self) -> None:
        """Removes videos and scores."""
        for folder in (self.videos, self.folder / ".scores"):
            shutil.rmtree(folder, ignore_errors=True)


def check_distinct(name: str, prompts: Sequence[str]) -> None:
    """Raises ValueError where a set has no prompts, an empty one, or one of them twice."""
    if not prompts:
        raise ValueError(f"prompt set {name!r} has no prompts; give it at least one")
    places: dict[str, int] = {}
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt set {name!r}: prompt {number} is empty; write one or remove it")
        before = places.setdefault(prompt, number)
        if before != number:
            raise ValueError(
                f"prompt set {name!r} has {prompt[:60]!r} twice, as prompts {before} and {number}; remove one "
                "(--copies N makes N videos of each prompt)"
            )
