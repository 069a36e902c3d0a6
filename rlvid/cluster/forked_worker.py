"""Asks the fork server for a worker of Ray's and waits for its end; see ``fork_server``.

Ray runs it in place of Python, once for each worker, so it imports little:
``python -I -S forked_worker.py SOCKET SCRIPT ARGUMENTS``.
"""

import json
import os
import socket
import sys


def main() -> None:
    """Runs SCRIPT with ARGUMENTS in a fork of the server, or else in this process."""
    path, *arguments = sys.argv[1:]
    request = {
        "arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "niceness": os.nice(0),
    }  # fmt: skip
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(path)
            socket.send_fds(server, [b"\n"], [0, 1, 2])
            server.sendall(json.dumps(request).encode() + b"\n")
            if server.recv(1) == b"F":
                server.recv(1)  # nothing is sent: the connection ends with the fork
                sys.exit()
    except OSError:
        pass  # there is no server
    os.execv(_python(), [_python(), *arguments])


def _python() -> str:
    """Returns the Python of the virtual environment that Ray made for this worker, else the one that runs this."""
    own = os.path.join(os.environ.get("VIRTUAL_ENV", ""), "bin")
    active = os.environ.get("PATH", "").split(os.pathsep)[0]
    python = os.path.join(own, "python")
    return python if active == own and os.path.isfile(python) else sys.executable


main()
