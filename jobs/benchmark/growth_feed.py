"""The processes of Ray in the benchmark of growth: a worker that reads its shares, and the memory of all workers."""

import os
from pathlib import Path
from typing import Any


def read_shares(shard: Any, steps: int) -> int:
    """Reads a worker's shares of ``steps`` steps as training does; returns the number of clips."""
    from rlvid.data.feed import rows
    from rlvid.data.shares import Share

    return sum(len(Share.of(row, step, 0).serials) for step, row in zip(range(steps), rows(shard), strict=False))


def largest_worker() -> int:
    """Returns the largest peak resident set, in bytes, of the Ray workers that this process has started."""
    parents, peaks = dict[int, int](), dict[int, int]()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
            command = (place / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        pid = int(place.name)
        parents[pid] = int(status["PPid"])
        if command.startswith(b"ray::") and "VmHWM" in status:
            peaks[pid] = int(status["VmHWM"].split()[0]) * 1024
    return max((peak for pid, peak in peaks.items() if _is_descendant(pid, parents)), default=0)


def _is_descendant(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != os.getpid():
        pid = parents[pid]
    return pid == os.getpid()
