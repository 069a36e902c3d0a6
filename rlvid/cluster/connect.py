"""Connects to a Ray cluster, or starts Ray on this machine."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rlvid.cluster import fork_server
from rlvid.cluster.address import connection_error, reach
from rlvid.cluster.token import make_own_token
from rlvid.interrupt import starting_ray

UNREAD = {
    "LOG_NAME_UPDATE_INTERVAL_S": "86400",  # of the log monitor, which lists all files ten times a second by default
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # files from which this interval counts
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # of the agent, which measures each process every five seconds by default
}
"""Settings of two processes of Ray's, by environment variable, where nobody reads what they gather.

Without a driver that shows log lines and without a dashboard they take 5 % of a core for nothing, the more the longer.
"""

_START = 120.0
"""Seconds that a local Ray may take to start. Ray itself gives up after 30, too few for a machine with other work."""


def start_ray(address: str | None = None) -> None:
    """Connects to the cluster of ``address`` or RAY_ADDRESS, else starts Ray on this machine; quietly.

    Raises:
        ValueError: no cluster answers at the address, or it does not let us in, or has another Ray or Python; or the
            folder of Ray's session cannot be used; or Ray does not start in time.
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
        for name, value in UNREAD.items():
            os.environ.setdefault(name, value)
        if fork_server.possible(session_folder()):
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # they would not be forks, and idle
            local["runtime_env"] = {"py_executable": fork_server.start(session_folder())}
    else:
        target = reach(target)
    try:
        with _silent_stderr(), starting_ray(), _group_of_its_own(), _patience() if local else nullcontext():
            ray.init(address=target, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        fork_server.end()
        raise connection_error(target, error) from error
    except Exception as error:  # Ray has no class of its own for it
        if "timed out during startup" not in str(error):
            raise
        fork_server.end()
        raise ValueError(
            f"Ray did not start on this machine within {_START:.0f} s; too many other processes compute here, as a "
            "rule: repeat the command, or use a Ray that runs already (`ray start --head`, then RAY_ADDRESS=auto)"
        ) from error


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


@contextmanager
def _group_of_its_own() -> Iterator[None]:
    """Gives the processes of a Ray that starts in the block a process group of their own.

    A signal to the group of the command (``timeout``, a batch system) would end them at once, and a checkpoint needs
    them. Ray ends them with the process that started it, however that ends.
    """
    from ray._private import services

    plain = services.ConsolePopen
    services.ConsolePopen = partial(plain, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = plain


@contextmanager
def _patience() -> Iterator[None]:
    """Makes a Ray that starts in the block wait for its own node as long as ``_START`` says."""
    from ray._private import services

    plain, until = services.get_node, time.monotonic() + _START

    def patient(*given: Any) -> Any:
        while True:
            try:
                return plain(*given)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    services.get_node = patient
    try:
        yield
    finally:
        services.get_node = plain


def session_folder() -> str:
    """Returns the folder below which the Ray of this machine keeps its sockets and logs."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def session_room() -> int:
    """Returns how many bytes longer the path of ``session_folder`` may be; below 0 if it is too long for a socket."""
    below = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    return fork_server.SOCKET_BYTES - len(os.fsencode(session_folder())) - len(below)


def check_session_folder() -> None:
    """Raises ValueError where the Ray of this machine could not keep its sockets and logs, which it waits for long."""
    folder, why = session_folder(), None
    if session_room() < 0:
        why = f"it is too long for a socket, whose path ends at {fork_server.SOCKET_BYTES} bytes"
    try:
        Path(folder, "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(folder, "ray")) as file:
            file.write(bytes(2**20))
    except OSError as error:
        why = why or error.strerror
    if why:
        raise ValueError(
            f"Ray cannot keep its session in {folder!r} (RAY_TMPDIR, else TMPDIR, else /tmp): {why}; set RAY_TMPDIR to "
            "a short path of a folder that you may write to and that has room, such as RAY_TMPDIR=/tmp"
        )
