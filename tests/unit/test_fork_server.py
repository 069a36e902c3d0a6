"""The fork server of Ray's workers: a fork is as good as a new process, and where it is not, a new process starts."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlvid import interrupt
from rlvid.cluster import fork_server
from rlvid.cluster.fork_server import may_fork, possible

CLIENT = str(Path(fork_server.__file__).with_name("forked_worker.py"))
SCRIPT = """
import ctypes, json, os, resource, sys
import numpy, random
threads = __import__("torch").get_num_threads() if "RAY_MINE" in os.environ else None  # torch takes seconds
blas = [ctypes.CDLL(path) for path in {line.split()[-1] for line in open("/proc/self/maps") if "openblas" in line}]
asks = [f"scipy_openblas_get_num_threads{end}" for end in ("64_", "")]
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "mine": os.environ.get("MINE"), "ray": os.environ.get("RAY_MINE"),
    "parent": os.getppid(), "group": os.getpgid(0) == os.getpid(), "loaded": "colorsys" in sys.modules,
    "path": sys.path[0], "name": __name__, "threads": threads, "read": sys.stdin.read(),
    "draws": [random.random(), numpy.random.rand()], "niceness": os.nice(0), "beside": "RAY_GONE" in os.environ,
    "blas": [getattr(each, ask)() for each in blas for ask in asks if hasattr(each, ask)],
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "oom": int(open("/proc/self/oom_score_adj").read()),
}))
print("said", file=sys.stderr)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")


def variables(**given: str) -> dict[str, str]:
    """The environment, without the variable that pytest changes within a test."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | given


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that imports one small module, which nothing else does, and two libraries with threads."""
    (tmp_path / "own").mkdir()
    program = "import sys; from rlvid.cluster.fork_server import main; main(sys.argv[1], sys.argv[2:])"
    modules = ["colorsys", "no_such", "numpy", "scipy.linalg"]
    command = [sys.executable, "-c", program, str(tmp_path / "own" / "forks"), *modules]
    made = subprocess.Popen(command, stdin=subprocess.PIPE, env=variables(OMP_NUM_THREADS="2", RAY_GONE="1"))
    while not (tmp_path / "own" / "forks").exists():
        assert made.poll() is None
        time.sleep(0.05)
    yield made
    made.kill()
    made.communicate()


def asked(tmp_path: Path, *, before: str = "", **environment: str) -> Any:
    """What the script prints when it is run through the client, after commands of a shell."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-I", "-S", CLIENT, str(tmp_path / "own" / "forks"), str(tmp_path / "script.py"), "one"]
    run = subprocess.run(
        ["sh", "-c", before + 'exec "$@"', "sh", *command], input="through stdin", capture_output=True, text=True,
        check=True, cwd=tmp_path, timeout=120, env=variables(OMP_NUM_THREADS="1,2", **environment),
    )  # fmt: skip
    assert "said" in run.stderr
    return json.loads(run.stdout)


def test_a_fork_is_what_a_new_process_would_be(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    before = "ulimit -S -n 99; echo 700 > /proc/self/oom_score_adj; renice -n 3 $$ >/dev/null; "
    found = [asked(tmp_path, RAY_MINE="1", before=before) for _ in range(2)]
    for each in found:
        assert each["loaded"], "it has what the server had imported"
        assert each["parent"] == server.pid
        assert each["arguments"] == [str(tmp_path / "script.py"), "one"]
        assert (each["folder"], each["path"], each["name"]) == (str(tmp_path), str(tmp_path), "__main__")
        assert (each["ray"], each["beside"], each["read"]) == ("1", False, "through stdin")
        assert each["threads"] == 1
        assert each["blas"] == [1, 1], "of numpy and of scipy"
        assert each["group"]
        assert (each["files"], each["oom"]) == (99, 700)
        assert each["niceness"] >= 3
    assert not set(found[0]["draws"]) & set(found[1]["draws"]), "random numbers of its own"


def test_a_fork_begins_once_its_client_confirms(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    mark = tmp_path / "began"
    (tmp_path / "script.py").write_text(f"open({str(mark)!r}, 'w').close()")
    request = {
        "arguments": [str(tmp_path / "script.py")], "environment": variables(OMP_NUM_THREADS="2"), "niceness": 0,
        "folder": str(tmp_path), "open_files": (99, 99), "oom_score_adj": "0",
    }  # fmt: skip
    for confirms in (False, True):
        with socket.socket(socket.AF_UNIX) as client, open(os.devnull) as nowhere:
            client.connect(str(tmp_path / "own" / "forks"))
            socket.send_fds(client, [b"\n"], 3 * [nowhere.fileno()])
            client.sendall(json.dumps(request).encode() + b"\n")
            assert client.recv(1) == fork_server.FORKED
            if confirms:
                client.sendall(b"F")
                assert client.recv(1) == b"", "open as long as the fork lives"
        assert mark.exists() == confirms
    assert server.poll() is None


def test_another_environment_gets_a_new_process(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    found = asked(tmp_path, MINE="1")
    assert not found["loaded"]
    assert found["parent"] != server.pid
    assert (found["mine"], found["arguments"][1:], found["read"]) == ("1", ["one"], "through stdin")


def test_a_worker_starts_without_a_server_in_the_environment_that_ray_made(tmp_path: Path) -> None:
    assert not asked(tmp_path)["loaded"]
    made = tmp_path / "made" / "bin"
    made.mkdir(parents=True)
    (made / "python").write_text(f"#!/bin/sh\necho said >&2\nexec {sys.executable} -c 'print(1)'\n")
    (made / "python").chmod(0o755)
    path = os.pathsep.join([str(made), os.environ["PATH"]])
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        assert asked(tmp_path, PATH=path, **{name: str(made.parent)}) == 1
    assert asked(tmp_path, VIRTUAL_ENV=str(made.parent))["arguments"], "it is not the active one"


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    assert server.wait(60) == 0
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("wanted", "same"),
    [
        ({"A": "1"}, True),
        ({"A": "2"}, False),
        ({}, False),
        ({"A": "1", "B": ""}, False),
        ({"A": "1", "OMP_NUM_THREADS": "4", "RAY_JOB_ID": "1"}, True),
        ({"A": "1", "LD_PRELOAD": "some.so"}, False),
    ],
)
def test_only_variables_that_no_library_reads_at_its_import_may_differ(wanted: dict[str, str], same: bool) -> None:
    assert may_fork(wanted, {"A": "1"}) == same


def test_forks_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_GPUS", ("/no/such/device",))
    assert possible("/tmp")
    assert not possible("/tmp/" + 90 * "x"), "no socket has such a path"
    monkeypatch.setattr(fork_server, "_GPUS", ("/dev/null",))
    assert not possible("/tmp")
    monkeypatch.setattr(fork_server, "_GPUS", ())
    for name, value in (("RLVID_FORK_WORKERS", "0"), ("UV_RUN_RECURSION_DEPTH", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not possible("/tmp")


def test_a_second_server_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        fork_server.start(str(tmp_path))
        assert len([*tmp_path.iterdir()]) == 1
        (pid,) = interrupt.spared
    fork_server.end()
    assert not [*tmp_path.iterdir()]
    assert not interrupt.spared
    assert not Path(f"/proc/{pid}").exists()
