"""Whether a run left what it should have: each sample once in the archive, each step once in TensorBoard."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlvid.config import RunConfig
from rlvid.data.archive import read_archive
from rlvid.runs.scalars import read_events


def faults(run: Path, config: RunConfig, steps: int) -> list[str]:
    """What is missing from a run's traces of its first ``steps`` steps, or there twice; empty if all is well.

    Raises:
        ValueError: the archive has no parts, or a part or an event file cannot be read.
    """
    return archive_faults(run / "archive", config, steps) + tensorboard_faults(run / "tensorboard", steps)


def archive_faults(folder: Path, config: RunConfig, steps: int) -> list[str]:
    """The archive's part of ``faults``: a row for each (step, serial) of the archived steps."""
    size = config.train.batch_size
    expected = [
        (step, step * size + place) for step in range(0, steps, config.output.archive_every) for place in range(size)
    ]
    rows = read_archive(folder, ["step", "serial"]).to_pylist()
    return _compare("archive: (step, sample)", expected, [(row["step"], row["serial"]) for row in rows])


def tensorboard_faults(folder: Path, steps: int) -> list[str]:
    """TensorBoard's part of ``faults``: one value of the trained reward for each step, in order."""
    seen = [step for step, _ in read_events(folder, "reward/trained".__eq__).get("reward/trained", [])]
    out_of_order = ["TensorBoard: steps are out of order"] if seen != sorted(seen) else []
    return _compare("TensorBoard: step", list(range(steps)), seen) + out_of_order


def starts(run: Path) -> int:
    """How often worker 0 of a run started: each start has an event file of its own."""
    return len(list((run / "tensorboard").glob("events.out.tfevents.*")))


def _compare(what: str, expected: Iterable[Any], found: list[Any]) -> list[str]:
    counts, wanted = Counter(found), set(expected)
    told = {
        "missing": sorted(wanted - counts.keys()),
        "not of this run": sorted(counts.keys() - wanted),
        "more than once": sorted(item for item, count in counts.items() if count > 1),
    }
    return [f"{what} {items[0]} {fault} ({len(items)} in all)" for fault, items in told.items() if items]
