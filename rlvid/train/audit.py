"""Audit of a run's folder: each sample once in the archive, each step once in TensorBoard."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlvid.config import RunConfig
from rlvid.data.archive import read_archive
from rlvid.runs.scalars import read_events


class Difference(NamedTuple):
    """The difference of found items from the expected ones; each field is sorted."""

    missing: list[Any]
    foreign: list[Any]
    repeated: list[Any]


def compare(expected: Iterable[Any], found: Iterable[Any]) -> Difference:
    """Compares items, each of which is expected once."""
    counts, wanted = Counter(found), set(expected)
    repeated = sorted(item for item, count in counts.items() if count > 1)
    return Difference(sorted(wanted - counts.keys()), sorted(counts.keys() - wanted), repeated)


def faults(run: Path, config: RunConfig, steps: int) -> list[str]:
    """Finds what is missing from a run's first ``steps`` steps, or is there twice; empty if all is well.

    Raises:
        ValueError: the archive has no parts, or a part or an event file cannot be read.
    """
    return archive_faults(run / "archive", config, steps) + tensorboard_faults(run / "tensorboard", steps)


def archive_faults(folder: Path, config: RunConfig, steps: int) -> list[str]:
    """Finds faults of the archive, which has a row for each (step, serial) of the archived steps."""
    size = config.train.batch_size
    expected = [
        (step, step * size + place) for step in range(0, steps, config.output.archive_every) for place in range(size)
    ]
    rows = read_archive(folder, ["step", "serial"]).to_pylist()
    return _lines("archive: (step, sample)", compare(expected, [(row["step"], row["serial"]) for row in rows]))


def tensorboard_faults(folder: Path, steps: int) -> list[str]:
    """Finds faults of TensorBoard, which has the trained reward of each step."""
    return step_faults(
        [step for step, _ in read_events(folder, "reward/trained".__eq__).get("reward/trained", [])], steps
    )


def step_faults(seen: Sequence[int], steps: int) -> list[str]:
    """Finds faults of the steps of one scalar: each of ``steps`` once, in order."""
    out_of_order = ["TensorBoard: steps are out of order"] if list(seen) != sorted(seen) else []
    return _lines("TensorBoard: step", compare(range(steps), seen)) + out_of_order


def starts(run: Path) -> int:
    """Counts the starts of a run's worker 0: the event files of each end alike."""
    return len({path.suffix for path in (run / "tensorboard").glob("events.out.tfevents.*")})


def _lines(what: str, difference: Difference) -> list[str]:
    words = ("missing", "not of this run", "more than once")
    faulty = zip(words, difference, strict=True)
    return [f"{what} {items[0]} {fault} ({len(items)} in all)" for fault, items in faulty if items]
