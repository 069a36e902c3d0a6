"""Starts Ray's worker processes on this machine as forks of one process that has imported the libraries.

The imports of a worker (torch, diffusers, transformers, peft, DeepSpeed) take several CPU seconds, and one training
starts about ten workers. The fork server imports them once, and every worker is a fork of it. Ray runs
``forked_worker.py`` in place of Python (``py_executable`` of the runtime environment). This client passes its
arguments, environment, folder, streams and limits to the server through a Unix socket, and ends with the fork.

A worker starts without a fork if no server answers, or if its environment differs from the server's in any variable but
``FREE`` and Ray's own. The server ends with the process that started it, whose pipe it reads. Machines with GPUs do not
use it, because a fork must not inherit a CUDA context.

Protocol: the client sends its three streams with one line of JSON (``Request``). The server answers ``PLAIN``, or the
fork answers ``FORKED``; the client confirms with one byte. The fork keeps the connection open until it ends.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from rlvid import interrupt

FORKED, PLAIN = b"F", b"P"
MODULES = (
    "torch", "torch._dynamo", "torch.utils.tensorboard",
    "pyarrow.parquet", "pandas", "scipy.stats", "fsspec", "requests", "aiohttp", "grpc", "google.protobuf",
    "diffusers.models.unets.unet_3d_condition", "diffusers.models.transformers.transformer_wan",
    "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.autoencoders.autoencoder_kl_wan",
    "transformers.models.clip.modeling_clip", "transformers.models.umt5.modeling_umt5",
    "peft", "open_clip", "deepspeed", "av", "pydantic", "rich.progress", "jsonschema", "matplotlib.pyplot",
)  # fmt: skip
"""Libraries that take long to import, and that most workers need. Ray is not among them, because its C++ part reads the
variables of a worker during the import."""
FREE = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "PWD", "OLDPWD", "SHLVL", "_", "SPT_NOENV", "PL_DISABLE_FORK")
"""Variables in which a worker may differ from the server, beside ``RAY_*``. A fork gives OMP_NUM_THREADS to torch and
OpenBLAS. DS_ACCELERATOR is ``cpu`` without a GPU; a shell, Ray's setproctitle and Ray Tune set the others."""
SOCKET_BYTES = 107
"""Largest number of bytes in the path of a Unix socket."""
_GPUS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
_OPENBLAS_OWN = ("OPENBLAS_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS", "GOTO_NUM_THREADS")
"""Variables that OpenBLAS prefers to OMP_NUM_THREADS."""
_OPENBLAS_SETTERS = tuple(
    f"{prefix}openblas_set_num_threads{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", "")
)
"""Names of its function: the wheels of numpy and scipy have a prefix, and builds with 64-bit integers a suffix."""
_REQUEST_S = 10.0  # how long a client may take to send its request, or to confirm
_WAITING = 256  # clients that may wait for the imports
_running: list[tuple[subprocess.Popen[bytes], Path]] = []  # the server of this process and its folder: at most one


def possible(folder: str) -> bool:
    """Returns whether this machine's workers may be forks of a server with its socket below a folder."""
    # Under `uv run`, Ray names a Python of its own.
    wanted = os.environ.get("RLVID_FORK_WORKERS", "1") != "0" and "UV_RUN_RECURSION_DEPTH" not in os.environ
    short = len(os.fsencode(_socket(Path(folder, "rlvid-12345678")))) <= SOCKET_BYTES
    return wanted and short and sys.platform == "linux" and not any(Path(device).exists() for device in _GPUS)


def start(folder: str) -> str:
    """Starts the server, which imports while Ray starts; ends an earlier one of this process.

    Args:
        folder: the server makes one of its own below it, which nobody else may enter.

    Returns:
        The command that Ray runs in place of Python.
    """
    end()
    path, nowhere = _socket(Path(tempfile.mkdtemp(prefix="rlvid-", dir=folder))), subprocess.DEVNULL
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, path],
        stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere,
        env={"DS_ACCELERATOR": "cpu"} | dict(os.environ), start_new_session=True,
    )  # fmt: skip
    _running.append((server, Path(path).parent))
    interrupt.spared.add(server.pid)  # it ends by itself, and deletes its folder
    return shlex.join([sys.executable, "-I", "-S", str(Path(__file__).with_name("forked_worker.py")), path])


@atexit.register
def end() -> None:
    """Ends the server of this process, if there is one; its forks go on."""
    while _running:
        server, folder = _running.pop()
        interrupt.spared.discard(server.pid)
        server.kill()
        server.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def _socket(folder: Path) -> str:
    return str(folder / "forks")


class Request(TypedDict):
    """What a client sends."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    niceness: int
    open_files: tuple[int, int]
    oom_score_adj: str


def main(path: str, modules: Sequence[str] = MODULES) -> None:
    """Serves until stdin ends; in a fork, runs its script.

    Args:
        path: of the socket, in a folder of its own, which is deleted at the end.
        modules: imported before the first fork.
    """
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of forks beside an allocator's thread
    request = _serve(path, modules)
    if request is not None:
        _become(request)
    else:
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def _serve(path: str, modules: Sequence[str]) -> Request | None:
    """Forks a process for each client until stdin ends; returns None then, and in a fork its request."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(_WAITING)
        before = dict(os.environ)  # imports add variables of their own, which a fork keeps
        for name in modules:
            with suppress(ImportError, OSError, RuntimeError):  # a worker that needs it will say so
                importlib.import_module(name)
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()
        gc.freeze()  # a fork's collector leaves these objects, and so their pages, alone
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for forks
        own = os.getpid()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return None
            with suppress(OSError, ValueError, KeyError):
                request = _answered(listener.accept()[0], before)
                if request is not None:
                    return request
            if os.getpid() != own:  # a fork that failed: there is one server
                os._exit(1)


def _answered(client: socket.socket, environment: Mapping[str, str]) -> Request | None:
    """Answers a client; returns its request in the fork, which has its streams and environment, else None."""
    with client:
        client.settimeout(_REQUEST_S)
        _, streams, _, _ = socket.recv_fds(client, 1, 3)
        try:
            with client.makefile("rb") as lines:
                request: Request = json.loads(lines.readline())
            if not may_fork(request["environment"], environment):
                client.sendall(PLAIN)
            elif _fork(client) == 0:
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                for name in environment:
                    os.environ.pop(name, None)
                os.environ.update(request["environment"])
                return request
        finally:
            for stream in streams:
                os.close(stream)
    return None


def _fork(client: socket.socket) -> int:
    """Forks, and returns in the fork once the client knows of it; a fork that nobody waits for ends."""
    try:
        pid = os.fork()
    except OSError:  # no more processes, or no memory
        client.sendall(PLAIN)
        return -1
    if pid == 0:
        try:
            client.sendall(FORKED)
            confirmed = client.recv(1)
        except OSError:
            confirmed = b""
        if not confirmed:
            os._exit(1)
        client.detach()  # open until this process ends
    return pid


def may_fork(wanted: Mapping[str, str], have: Mapping[str, str]) -> bool:
    """Returns whether a process with one environment may be a fork of a process with another one."""
    different = {name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name)}
    return all(name in FREE or name.startswith("RAY_") for name in different)


def _become(request: Request) -> None:
    """Runs the script of a request in this fork, as a new interpreter would."""
    import numpy

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray ends the group of a worker with the worker
    os.nice(max(0, request["niceness"] - os.nice(0)))
    os.chdir(request["folder"])
    with suppress(OSError, ValueError):  # lower limits than these may be fixed
        resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"], encoding="ascii")
    numpy.random.seed()  # a new process has other random numbers; Python's `random` does this by itself
    _follow_threads()
    sys.argv = request["arguments"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _follow_threads() -> None:
    """Gives OMP_NUM_THREADS to torch and OpenBLAS, which read it in the server, also where Ray sets it for a task."""
    import ray._private.utils
    import torch

    def set_threads() -> None:
        first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # OpenMP allows a number for each level
        if first.isdecimal() and int(first) > 0:
            torch.set_num_threads(int(first))
            if not {*_OPENBLAS_OWN} & os.environ.keys():
                _set_openblas_threads(min(int(first), len(os.sched_getaffinity(0))))  # as it limits itself when loaded

    set_if_unset = ray._private.utils.set_omp_num_threads_if_unset

    def set_both() -> bool:
        if was_set := set_if_unset():
            set_threads()
        return was_set

    set_threads()
    ray._private.utils.set_omp_num_threads_if_unset = set_both


def _set_openblas_threads(count: int) -> None:
    """Sets the threads of each OpenBLAS that this process has loaded: numpy and scipy bring one each."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    for path in {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "openblas" in line}:
        with suppress(OSError):
            library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
            for name in _OPENBLAS_SETTERS:
                if hasattr(library, name):
                    getattr(library, name)(ctypes.c_int(count))
                    break


if __name__ == "__main__":
    main(sys.argv[1])
