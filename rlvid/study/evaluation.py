"""The videos and scores of an evaluation's folder, as a study needs them."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from pyarrow import parquet

from rlvid.evaluate.results.frames import decode_frames, open_frame
from rlvid.evaluate.results.read import read_about
from rlvid.evaluate.results.untrusted import KEY, open_table, read_table, rows_of, sound

_ANEW = "delete that file and run rlvid evaluate again"


@dataclass(frozen=True, order=True)
class Spot:
    """What two videos of a pair share: the prompt and the noise.

    ``index`` is the prompt's place in its set, ``steps`` the number D of DDIM steps, ``copy`` the number of the noise.
    """

    set: str
    steps: int
    index: int
    copy: int

    def __str__(self) -> str:
        return f"set {self.set}, D = {self.steps}, prompt {self.index}, copy {self.copy}"


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
        spots: prompts by spot.

    Raises:
        ValueError: there is no evaluation, it cannot be read, holds a video twice, or has an empty or repeated prompt.
    """

    def __init__(self, folder: Path):
        about, _ = read_about(folder)
        self.folder = folder
        self.models = {each.name: each.label or each.name for each in about.models}
        self.rewards = {metric: name for metric, name in (about.rewards or {}).items() if name}
        self.spots: dict[Spot, str] = {}
        self._places: dict[tuple[str, Spot], tuple[Path, int, int, float]] = {}
        self._without_frames: set[tuple[str, Spot]] = set()
        parts = sorted((folder / "videos").glob("part-*.parquet"))
        if not parts:
            raise ValueError(f"{folder}: its videos are missing (no videos/part-*.parquet); run rlvid evaluate again")
        for part in parts:
            for place, row, has_frames in _rows(folder, part):
                self._add(row, (part, *place, row["fps"]), has_frames)
        self._check_prompts()

    def _add(self, row: dict[str, Any], place: tuple[Path, int, int, float], has_frames: bool) -> None:
        spot = Spot(row["set"], row["steps"], row["index"], row["copy"])
        if (row["model"], spot) in self._places:
            raise ValueError(f"{place[0]}: the video of {row['model']!r} for {spot} is there twice")
        if self.spots.setdefault(spot, row["prompt"]) != row["prompt"]:
            raise ValueError(f"{place[0]}: models have different prompts for {spot}; such videos are no pair")
        self._places[row["model"], spot] = place
        if not has_frames:
            self._without_frames.add((row["model"], spot))

    def _check_prompts(self) -> None:
        seen: dict[tuple[str, str], int] = {}
        for spot, prompt in sorted(self.spots.items()):
            if not prompt.strip():
                raise ValueError(f"{self.folder}: prompt {spot.index} of set {spot.set} is empty; nobody can judge it")
            if seen.setdefault((spot.set, prompt), spot.index) != spot.index:
                raise ValueError(
                    f"{self.folder}: prompt {prompt!r} is in set {spot.set} twice, at {seen[spot.set, prompt]} and "
                    f"{spot.index}; evaluate with each prompt once (and several copies, if you like)"
                )

    def has(self, model: str, spot: Spot) -> bool:
        """Whether there is such a video, be it without frames."""
        return (model, spot) in self._places

    def has_frames(self, model: str, spot: Spot) -> bool:
        """Whether a video has frames; one of which a pixel was no number is kept without."""
        return self.has(model, spot) and (model, spot) not in self._without_frames

    def fps(self, model: str, spot: Spot) -> float:
        """Frames a second."""
        return self._places[model, spot][3]

    def frames(self, model: str, spot: Spot) -> list[bytes]:
        """The frames of a video, PNG each; raises UnreadableError if they cannot be read."""
        part, group, row, _ = self._places[model, spot]
        try:
            with open_table(self.folder, part, ["frames"]) as file, sound(part):
                frames = file.read_row_group(group, columns=["frames"]).slice(row, 1)
            return list(rows_of(part, frames)[0]["frames"])
        except (ValueError, IndexError) as error:
            raise UnreadableError(f"the video of {model!r} for {spot} cannot be read: {error}") from error

    def pixels(self, model: str, spot: Spot) -> np.ndarray:
        """The frames of a video, uint8 (F, H, W, 3); raises ValueError if they cannot be read."""
        return decode_frames(self.frames(model, spot), f"{self._places[model, spot][0]}: {model!r} for {spot}")

    def inspect(self, model: str, spot: Spot) -> tuple[str, str]:
        """What a video looks like ("8 frames of 32 x 32 at 8 a second"), and a digest of its frames.

        Raises:
            UnreadableError: it cannot be read.
            ValueError: it has no frames, a damaged one, or some of other sizes.
        """
        frames, digest, sizes = self.frames(model, spot), hashlib.blake2b(digest_size=16), set()
        named = f"{self._places[model, spot][0]}: the video of {model!r} for {spot}"
        for place, frame in enumerate(frames):
            digest.update(hashlib.blake2b(frame).digest())
            with open_frame(frame, f"{named}: frame {place}") as image:
                sizes.add(f"{image.width} x {image.height}")
                image.verify()
        if not sizes:
            raise ValueError(f"{named} has no frames, since a pixel was no number; compare others")
        if len(sizes) > 1:
            raise ValueError(f"{named} has frames of several sizes; {_ANEW}")
        return f"{len(frames)} frames of {sizes.pop()} at {self.fps(model, spot):g} a second", digest.hexdigest()


def _rows(folder: Path, part: Path) -> Iterator[tuple[tuple[int, int], dict[str, Any], bool]]:
    """(row group, row in it), the columns of each video but its frames, and whether it has any."""
    with open_table(folder, part, [*KEY, "prompt", "fps", "frames"]) as file:
        for group in range(file.num_row_groups):
            with sound(part):
                table = file.read_row_group(group, columns=[*KEY, "prompt", "fps"])
                empty = _without_frames(file, group)
            rows = rows_of(part, table)
            yield from (((group, row), values, row not in empty) for row, values in enumerate(rows))


def _without_frames(file: parquet.ParquetFile, group: int) -> set[int]:
    """The rows of a group that have no frames; these are read only where the file's statistics leave it open."""
    about = file.metadata.row_group(group)
    columns = (about.column(index) for index in range(about.num_columns))
    known = next(each.statistics for each in columns if each.path_in_schema.split(".")[0] == "frames")
    if known is not None and known.has_null_count and not known.null_count:  # an empty list counts as a null
        return set()
    lengths = pc.list_value_length(file.read_row_group(group, columns=["frames"]).column(0))
    return {row for row, length in enumerate(lengths.to_pylist()) if not length}


def read_scores(folder: Path) -> dict[str, dict[tuple[str, Spot], float]]:
    """Each metric of ``evaluation.parquet`` by (model, spot), without what is NaN; nothing where no such file is."""
    path = folder / "evaluation.parquet"
    if not path.is_file():
        return {}
    found: dict[str, dict[tuple[str, Spot], float]] = {}
    for row in read_table(folder, path, KEY, metrics=True):
        key = (row["model"], Spot(*(row[name] for name in KEY[1:])))
        for metric in row.keys() - set(KEY):
            if math.isfinite(row[metric]):
                found.setdefault(metric, {})[key] = row[metric]
    return found
