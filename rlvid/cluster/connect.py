"""Connects to a Ray cluster, or starts Ray on this machine."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlvid.cluster.address import check_session_folder, connection_error, reach
from rlvid.cluster.token import make_own_token
from rlvid.interrupt import starting_ray


def start_ray(address: str | None = None) -> None:
    """Connects to the cluster of ``address`` or RAY_ADDRESS, else starts Ray on this machine; quietly.

    Raises:
        ValueError: no cluster answers at the address, or it does not let us in, or has another Ray or Python; or the
            folder of Ray's session cannot be used.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    # Its watcher is a process more for each start of the workers; a machine that is the whole cluster tells nothing.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0" if target == "local" else "1")
    local: dict[str, Any] = {"include_dashboard": False} if target == "local" else {}
    if local:
        check_session_folder()
        make_own_token()
    else:
        target = reach(target)
    try:
        with _silent_stderr(), starting_ray():
            ray.init(address=target, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise connection_error(target, error) from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides what Ray's C++ parts write about themselves while they start; Python errors still come through."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
