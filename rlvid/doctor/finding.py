"""One line of the doctor's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rlvid.faults import describe

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, what was found, and (unless it is ok) the way out."""

    name: str
    status: Status
    found: str
    way_out: str = ""


def judged(name: str, fine: bool, found: str, way_out: str, otherwise: Status = "error") -> Finding:
    """A finding that is ok, or ``otherwise`` with the way out."""
    return Finding(name, "ok", found) if fine else Finding(name, otherwise, found, way_out)


Check = Callable[[], Iterator[Finding]]


def examine(name: str, check: Check, way_out: str) -> Iterator[Finding]:
    """The findings of a check; one that fails is an error, and hides none that would follow.

    ``way_out`` is for a failure that the check itself has no word for.
    """
    try:
        yield from check()
    except Exception as error:  # any error is an answer to the user's question, and the other checks must still run
        yield Finding(name, "error", describe(error), way_out)
