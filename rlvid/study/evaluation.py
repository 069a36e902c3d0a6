"""The videos and scores of an evaluation's folder, as a study needs them."""

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from PIL import Image
from pyarrow import parquet

KEYS = ["model", "set", "steps", "index", "copy"]
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
        description = folder / "evaluation.yaml"
        if not description.is_file():
            raise ValueError(f"{folder}: no evaluation there (no evaluation.yaml); rlvid evaluate writes one")
        self.folder = folder
        try:
            content = yaml.safe_load(description.read_text(encoding="utf-8"))
            self.models = {str(each["name"]): str(each.get("label") or each["name"]) for each in content["models"]}
            self.rewards = {metric: str(name) for metric, name in (content.get("rewards") or {}).items() if name}
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{description}: not what rlvid evaluate writes; its models or rewards cannot be read"
            ) from error
        self.spots: dict[Spot, str] = {}
        self._places: dict[tuple[str, Spot], tuple[Path, int, int, float]] = {}
        self._without_frames: set[tuple[str, Spot]] = set()
        parts = sorted((folder / "videos").glob("part-*.parquet"))
        if not parts:
            raise ValueError(f"{folder}: its videos are missing (no videos/part-*.parquet); run rlvid evaluate again")
        for part in parts:
            for place, row, has_frames in _rows(part):
                self._add(row, (part, *place, float(row["fps"])), has_frames)
        self._check_prompts()

    def _add(self, row: dict[str, Any], place: tuple[Path, int, int, float], has_frames: bool) -> None:
        spot = Spot(row["set"], row["steps"], row["index"], row["copy"])
        if (row["model"], spot) in self._places:
            raise ValueError(f"{place[0]}: the video of {row['model']!r} for {spot} is there twice")
        if self.spots.setdefault(spot, row["prompt"] or "") != (row["prompt"] or ""):
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
            frames = parquet.ParquetFile(part).read_row_group(group, columns=["frames"]).column(0)[row].as_py()
        except (OSError, IndexError, pa.ArrowException) as error:
            raise UnreadableError(f"{part}: the video of {model!r} for {spot} cannot be read: {error}") from error
        return list(frames or [])

    def inspect(self, model: str, spot: Spot) -> tuple[str, str]:
        """What a video looks like ("8 frames of 32 x 32 at 8 a second"), and a digest of its frames.

        Raises:
            UnreadableError: it cannot be read.
            ValueError: it has no frames, a damaged one, or some of other sizes.
        """
        frames, digest, sizes = self.frames(model, spot), hashlib.blake2b(digest_size=16), set()
        named = f"{self._places[model, spot][0]}: the video of {model!r} for {spot}"
        for frame in frames:
            digest.update(hashlib.blake2b(frame).digest())
            try:
                with Image.open(io.BytesIO(frame)) as image:
                    sizes.add(f"{image.width} x {image.height}")
                    image.verify()
            except (OSError, SyntaxError) as error:  # Pillow raises both for a damaged PNG
                raise ValueError(f"{named} has a damaged frame; {_ANEW}") from error
        if not sizes:
            raise ValueError(f"{named} has no frames, since a pixel was no number; compare others")
        if len(sizes) > 1:
            raise ValueError(f"{named} has frames of several sizes; {_ANEW}")
        return f"{len(frames)} frames of {sizes.pop()} at {self.fps(model, spot):g} a second", digest.hexdigest()


def _rows(part: Path) -> Iterator[tuple[tuple[int, int], dict[str, Any], bool]]:
    """(row group, row in it), the columns of each video but its frames, and whether it has any."""
    try:
        with parquet.ParquetFile(part) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=[*KEYS, "prompt", "fps"])
                missing = {*KEYS, "prompt", "fps", "frames"} - set(file.schema_arrow.names)
                if missing:
                    raise ValueError(f"{part}: no column {', '.join(sorted(missing))}; rlvid evaluate writes it")
                empty = _without_frames(file, group)
                yield from (((group, row), values, row not in empty) for row, values in enumerate(table.to_pylist()))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{part}: damaged, or no Parquet; delete it and run rlvid evaluate again") from error


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
    try:
        table = parquet.read_table(path)
        keys = [(row["model"], Spot(*(row[key] for key in KEYS[1:]))) for row in table.select(KEYS).to_pylist()]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not what rlvid evaluate writes ({error})") from error
    metrics = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    columns = {metric: zip(keys, table.column(metric).to_pylist(), strict=True) for metric in metrics}
    found = {
        metric: {key: value for key, value in column if value is not None and math.isfinite(value)}
        for metric, column in columns.items()
    }
    return {metric: values for metric, values in found.items() if values}
