"""Writes a study's answers as preference pairs: chosen and rejected frames in one Parquet file."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from rlvid.files import atomic_file
from rlvid.study.pairs import Pair
from rlvid.study.store import Answer, Study
from rlvid.study.videos import UnreadableError, Videos

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()), ("chosen", pa.list_(pa.binary())), ("rejected", pa.list_(pa.binary())),
        ("axis", pa.string()), ("annotator", pa.string()), ("chosen_model", pa.string()),
        ("rejected_model", pa.string()), ("set", pa.string()), ("steps", pa.int32()), ("index", pa.int32()),
        ("copy", pa.int32()), ("fps", pa.float32()),
    ]
)  # fmt: skip
"""One row an answer that is no tie; frames are PNG files."""


def difference(pair: Pair, videos: Videos) -> str | None:
    """Returns how a pair's videos differ from those at the study's start; None if equal; ValueError if damaged."""
    models = (pair.first, pair.second)
    try:
        if all(videos.has_frames(model, pair.case) for model in models) and pair.digest == "".join(
            videos.inspect(model, pair.case)[1] for model in models
        ):
            return None
    except UnreadableError as error:
        return str(error)
    return f"{videos.folder}: the videos for {pair.case} are missing, or not those that people saw"


def check_same(study: Study, videos: Videos) -> None:
    """Raises ValueError unless the videos are still those that people saw."""
    for pair in study.pairs:
        if reason := difference(pair, videos):
            raise ValueError(
                f"{reason}; evaluate with the settings of then ({study.settings}), or name another copy with "
                "--evaluation"
            )


def write_preferences(path: Path, study: Study, answers: Sequence[Answer], videos: Videos) -> int:
    """Writes the file atomically, without attention checks and ties; returns its number of rows."""
    decided: dict[Pair, list[Answer]] = defaultdict(list)
    pairs = {pair.number: pair for pair in study.pairs}
    for answer in answers:
        if answer.chosen != "tie" and not pairs[answer.pair].check:
            decided[pairs[answer.pair]].append(answer)
    with atomic_file(path) as part, parquet.ParquetWriter(part, SCHEMA, compression="zstd") as file:
        for pair, each in decided.items():
            file.write_table(pa.Table.from_pylist(_rows(pair, each, videos), SCHEMA))
    return sum(map(len, decided.values()))


def _rows(pair: Pair, answers: Sequence[Answer], videos: Videos) -> list[dict[str, object]]:
    models = {"first": pair.first, "second": pair.second}
    frames = {name: videos.frames(model, pair.case) for name, model in models.items()}
    rows = []
    for answer in answers:
        chosen, rejected = ("first", "second") if answer.chosen == "first" else ("second", "first")
        rows.append(
            {
                "prompt": pair.prompt, "chosen": frames[chosen], "rejected": frames[rejected], "axis": answer.axis,
                "annotator": answer.annotator, "chosen_model": models[chosen], "rejected_model": models[rejected],
                "set": pair.case.set, "steps": pair.case.steps, "index": pair.case.index, "copy": pair.case.copy,
                "fps": videos.fps(pair.first, pair.case),
            }
        )  # fmt: skip
    return rows
