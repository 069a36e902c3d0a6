"""Asks the fork server for a worker of Ray's and waits for its end; see ``fork_server``.

Ray runs it in place of Python, once for each worker, so it imports little:
``python -I -S forked_worker.py SOCKET SCRIPT ARGUMENTS``.
"""

import json
import os
import resource
import socket
import sys
from contextlib import suppress

_ANSWER_S = 120.0  # the server may still import
_OOM = "/proc/self/oom_score_adj"


def main() -> None:
    """Runs SCRIPT with ARGUMENTS in a fork of the server, or else in this process."""
    path, *arguments = sys.argv[1:]
    oom_score_adj = "0"
    with suppress(OSError), open(_OOM, encoding="ascii") as file:
        oom_score_adj = file.read()
    request = {
        "arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "niceness": os.nice(0),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE), "oom_score_adj": oom_score_adj,
    }  # fmt: skip
    server = socket.socket(socket.AF_UNIX)
    try:
        server.settimeout(_ANSWER_S)
        server.connect(path)
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        forked = server.recv(1) == b"F"
        if forked:
            server.sendall(b"F")
    except OSError:
        forked = False  # there is no server, or it ended: no fork begins without the confirmation
    if not forked:
        os.execv(_python(), [_python(), *arguments])
    with suppress(OSError), open(_OOM, "w", encoding="ascii") as file:
        file.write("0")  # the fork has the score that Ray gave this process
    server.settimeout(None)
    server.recv(1)  # nothing is sent: the connection ends with the fork


def _python() -> str:
    """Returns the Python of the environment that Ray made for this worker (pip, uv, conda), else this one."""
    active = os.environ.get("PATH", "").split(os.pathsep)[0]
    python = os.path.join(active, "python")
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if active == os.path.join(os.environ.get(name, ""), "bin") and os.path.isfile(python):
            return python
    return sys.executable


main()
