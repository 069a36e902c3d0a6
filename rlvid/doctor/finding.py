"""A finding of the doctor: one line of its output."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rlvid.faults import describe

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """A check's name, its status, what it found, and (unless the status is ok) the way out."""

    name: str
    status: Status
    found: str
    way_out: str = ""


def finding(name: str, fine: bool, found: str, way_out: str, otherwise: Status = "error") -> Finding:
    """Returns a finding that is ok, or ``otherwise`` with the way out."""
    return Finding(name, "ok", found) if fine else Finding(name, otherwise, found, way_out)


Check = Callable[[], Iterator[Finding]]


def examine(name: str, check: Check, way_out: str) -> Iterator[Finding]:
    """Yields the findings of a check; a check that fails yields an error, and the next checks still run.

    ``way_out`` is for a failure for which the check itself has none.
    """
    try:
        yield from check()
    except Exception as error:  # any error is an answer to the user's question, and the other checks must still run
        yield Finding(name, "error", describe(error), way_out)


def examine_each(checks: Mapping[str, tuple[Check, str]]) -> Iterator[Finding]:
    """Yields the findings of checks, given by name with their way out: see ``examine``."""
    for name, (check, way_out) in checks.items():
        yield from examine(name, check, way_out)
