"""The scalars of a run, as TensorBoard's event files hold them."""

import math
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlvid.files import damaged

_DAMAGED = (DecodeError, MemoryError, OSError)  # the length of a record may be any number


def read_events(folder: Path, wanted: Callable[[str], bool]) -> dict[str, list[tuple[int, float]]]:
    """Reads tag -> (step, value) of a run's scalars, in the order in which they were written.

    Args:
        folder: of the event files; without it there are no scalars.
        wanted: which tags are read.

    Raises:
        ValueError: an event file is damaged, by name; one that was cut off gives what it has.
    """
    if not folder.is_dir():
        return {}
    try:
        events = _events(folder)
    except _DAMAGED as error:
        reason = str(error) or "a record of impossible length"
        raise damaged(_damaged_file(folder), reason, "delete it: logs/ has the numbers too") from None
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if wanted(tag)
    }


def _events(place: Path) -> EventAccumulator:
    """Returns the events of a folder or of one file."""
    events = EventAccumulator(str(place), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    return events.Reload()


def _damaged_file(folder: Path) -> str:
    """Returns the event file of a folder that cannot be read."""
    for path in sorted(folder.glob("*tfevents*")):
        try:
            _events(path)
        except _DAMAGED:
            return str(path)
    return f"an event file in {folder}"


def read_scalars(folder: Path, wanted: Callable[[str], bool]) -> dict[str, dict[int, float]]:
    """Reads tag -> step -> value of the finite scalars of a run; see ``read_events``."""
    found = read_events(folder, wanted)
    return {tag: {step: value for step, value in each if math.isfinite(value)} for tag, each in found.items()}
