"""The scalars of a run, as TensorBoard's event files hold them."""

import math
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_scalars(folder: Path, wanted: Callable[[str], bool]) -> dict[str, dict[int, float]]:
    """Tag -> step -> value of the finite scalars of a run.

    Args:
        folder: of the event files; without it there are no scalars.
        wanted: which tags are read.

    Raises:
        ValueError: an event file is damaged; one that was cut off gives what it has.
    """
    if not folder.is_dir():
        return {}
    try:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True)
        events.Reload()
        return {
            tag: {event.step: event.value for event in events.Scalars(tag) if math.isfinite(event.value)}
            for tag in events.Tags()["scalars"]
            if wanted(tag)
        }
    except (DecodeError, MemoryError, OSError) as error:  # the length of a record may be any number
        why = " ".join(str(error).split())[:200] or "a record of impossible length"
        raise ValueError(f"{folder}: an event file is damaged ({why}); delete it: logs/ has the numbers too") from None
