"""Writes a study's answers as preference pairs, with the frames of both videos, in one Parquet file."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from rlvid.data.pairs import PAIRS
from rlvid.files import atomic_file
from rlvid.study.pairs import Pair
from rlvid.study.store import Answer, Study
from rlvid.study.videos import UnreadableError, Videos

PREFERENCES = {"first": 1.0, "tie": 0.5, "second": 0.0}


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


def write_preferences(path: Path, study: Study, answers: Sequence[Answer], videos: Videos) -> tuple[int, int]:
    """Writes the file atomically, without attention checks; returns the numbers of its rows and of ties among them."""
    given: dict[Pair, list[Answer]] = defaultdict(list)
    pairs = {pair.number: pair for pair in study.pairs}
    for answer in answers:
        if not pairs[answer.pair].check:
            given[pairs[answer.pair]].append(answer)
    with atomic_file(path) as part, parquet.ParquetWriter(part, PAIRS, compression="zstd") as file:
        for pair, each in given.items():
            file.write_table(pa.Table.from_pylist(_rows(pair, each, videos), PAIRS))
    written = [answer.chosen for each in given.values() for answer in each]
    return len(written), written.count("tie")


def _rows(pair: Pair, answers: Sequence[Answer], videos: Videos) -> list[dict[str, object]]:
    common = {
        "prompt": pair.prompt, "a": videos.frames(pair.first, pair.case), "b": videos.frames(pair.second, pair.case),
        "a_model": pair.first, "b_model": pair.second, "set": pair.case.set, "steps": pair.case.steps,
        "index": pair.case.index, "copy": pair.case.copy, "fps": videos.fps(pair.first, pair.case),
    }  # fmt: skip
    return [
        common | {"preference": PREFERENCES[each.chosen], "axis": each.axis, "annotator": each.annotator}
        for each in answers
    ]
