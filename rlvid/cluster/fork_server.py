"""Starts Ray's worker processes on this machine as forks of one process that has imported the libraries.

The imports of a worker (torch, diffusers, transformers, peft, DeepSpeed) take several CPU seconds, and one training
starts about ten workers. The fork server imports them once, and every worker is a fork of it. Ray runs
``forked_worker.py`` in place of Python (``py_executable`` of the runtime environment), which passes its arguments,
environment, folder and streams to the server through a Unix socket, and ends when the fork ends.

A worker starts without a fork if no server answers, or if its environment differs in a variable that a library may
read while it is imported. The server ends with the process that started it, whose pipe it reads. Machines with GPUs do
not use it, because a fork must not inherit a CUDA context.

Protocol: the client sends its three streams with one line of JSON, ``{"arguments", "environment", "folder",
"niceness"}``. The server answers ``FORKED`` or ``PLAIN``. The fork keeps the connection open until it ends.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

FORKED, PLAIN = b"F", b"P"
MODULES = (
    "torch", "torch._dynamo", "torch.utils.tensorboard",
    "pyarrow.parquet", "pandas", "scipy.stats", "fsspec", "requests", "aiohttp", "grpc", "google.protobuf",
    "diffusers.models.unets.unet_3d_condition", "diffusers.models.transformers.transformer_wan",
    "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.autoencoders.autoencoder_kl_wan",
    "transformers.models.clip.modeling_clip", "transformers.models.umt5.modeling_umt5",
    "peft", "open_clip", "deepspeed", "av", "pydantic", "rich.progress", "jsonschema", "matplotlib.pyplot",
)  # fmt: skip
"""Libraries that take long to import, and that most workers need. Ray is none: its C++ part reads a worker's variables
while it is imported."""
FREE = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "PWD", "OLDPWD", "SHLVL", "_", "SPT_NOENV", "PL_DISABLE_FORK")
"""Variables in which a worker may differ from the server, beside Ray's own (``RAY_*``): a fork imports Ray itself."""
SOCKET_BYTES = 107
"""Largest number of bytes in the path of a Unix socket."""
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_REQUEST_S = 10.0  # how long a client may take to send its request
_WAITING = 256  # clients that may wait for the imports


def possible(folder: str) -> bool:
    """Returns whether this machine's workers may be forks of a server with its socket below a folder."""
    wanted = os.environ.get("RLVID_FORK_WORKERS", "1") != "0"
    short = len(os.fsencode(_socket(Path(folder, "rlvid-12345678")))) <= SOCKET_BYTES
    return wanted and short and sys.platform == "linux" and not any(Path(device).exists() for device in _GPUS)


def start(folder: str) -> str:
    """Starts a server, which imports while Ray starts, and ends it at the end of this process.

    Args:
        folder: the server makes one of its own below it.

    Returns:
        The command that Ray runs in place of Python.
    """
    path, nowhere = _socket(Path(tempfile.mkdtemp(prefix="rlvid-", dir=folder))), subprocess.DEVNULL
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, path],
        stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere,
        env={"DS_ACCELERATOR": "cpu"} | dict(os.environ), start_new_session=True,
    )  # fmt: skip
    atexit.register(_end, server, Path(path).parent)
    return shlex.join([sys.executable, "-I", "-S", str(Path(__file__).with_name("forked_worker.py")), path])


def _socket(folder: Path) -> str:
    return str(folder / "forks")


def _end(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.kill()
    server.communicate()
    shutil.rmtree(folder, ignore_errors=True)


def main(path: str, modules: Sequence[str] = MODULES) -> None:
    """Serves until stdin ends; in a fork, runs its script.

    Args:
        path: of the socket, in a folder of its own, which is deleted at the end.
        modules: imported before the first fork.
    """
    request = _serve(path, modules)
    if request is not None:
        _become(request)
    else:
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def _serve(path: str, modules: Sequence[str]) -> dict[str, Any] | None:
    """Forks a process for each client until stdin ends; returns None then, and in a fork its request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(_WAITING)
        before = dict(os.environ)  # imports add variables of their own, which a fork keeps
        for name in modules:
            with suppress(ImportError):  # a worker that needs it will say so
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # a fork's collector leaves these objects, and so their pages, alone
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return None
            with suppress(OSError, ValueError, KeyError):
                request = _answered(listener.accept()[0], before)
                if request is not None:
                    for name in before:
                        os.environ.pop(name, None)
                    os.environ.update(request["environment"])
                    return request


def _answered(client: socket.socket, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Answers a client; returns its request in the fork, with the client's streams, else None."""
    with client:
        client.settimeout(_REQUEST_S)
        _, streams, _, _ = socket.recv_fds(client, 1, 3)
        try:
            with client.makefile("rb") as lines:
                request: dict[str, Any] = json.loads(lines.readline())
            forks = may_fork(request["environment"], environment)
            client.sendall(FORKED if forks else PLAIN)
            if forks and os.fork() == 0:
                client.detach()  # open until this process ends
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                return request
        finally:
            for stream in streams:
                os.close(stream)
    return None


def may_fork(wanted: Mapping[str, str], have: Mapping[str, str]) -> bool:
    """Returns whether a process with one environment may be a fork of a process with another one."""
    different = {name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name)}
    return all(name in FREE or name.startswith("RAY_") for name in different)


def _become(request: dict[str, Any]) -> None:
    """Runs the script of a request in this fork, as a new interpreter would."""
    import numpy

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray ends a worker's group with the worker
    os.nice(max(0, request["niceness"] - os.nice(0)))
    os.chdir(request["folder"])
    numpy.random.seed()  # a new process has numbers of its own; `random` sees to it itself
    _follow_threads()
    sys.argv = request["arguments"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _follow_threads() -> None:
    """Sets torch's threads to OMP_NUM_THREADS, which OpenMP read long ago, also where Ray sets it for a task."""
    import ray._private.utils
    import torch

    def set_threads() -> None:
        if threads := os.environ.get("OMP_NUM_THREADS", ""):
            torch.set_num_threads(int(threads))

    set_if_unset = ray._private.utils.set_omp_num_threads_if_unset

    def set_both() -> bool:
        if was_set := set_if_unset():
            set_threads()
        return was_set

    set_threads()
    ray._private.utils.set_omp_num_threads_if_unset = set_both


if __name__ == "__main__":
    main(sys.argv[1])
