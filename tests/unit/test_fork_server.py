"""The fork server of Ray's workers: a fork is as good as a new process, and where it is not, a new process starts."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlvid.cluster import fork_server
from rlvid.cluster.fork_server import may_fork, possible

CLIENT = str(Path(fork_server.__file__).with_name("forked_worker.py"))
SCRIPT = """
import json, os, sys
import numpy, random, torch
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "mine": os.environ.get("MINE"), "ray": os.environ.get("RAY_MINE"),
    "parent": os.getppid(), "group": os.getpgid(0) == os.getpid(), "loaded": "colorsys" in sys.modules,
    "path": sys.path[0], "name": __name__, "threads": torch.get_num_threads(), "read": sys.stdin.read(),
    "draws": [random.random(), numpy.random.rand()], "niceness": os.nice(0), "beside": "RAY_GONE" in os.environ,
}))
print("said", file=sys.stderr)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")


def variables(**given: str) -> dict[str, str]:
    """The environment, without the variable that pytest changes within a test."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | given


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that imports one small module, which nothing else does."""
    (tmp_path / "own").mkdir()
    program = "import sys; from rlvid.cluster.fork_server import main; main(sys.argv[1], ['colorsys', 'no_such'])"
    command = [sys.executable, "-c", program, str(tmp_path / "own" / "forks")]
    made = subprocess.Popen(command, stdin=subprocess.PIPE, env=variables(OMP_NUM_THREADS="2", RAY_GONE="1"))
    while not (tmp_path / "own" / "forks").exists():
        assert made.poll() is None
        time.sleep(0.05)
    yield made
    made.kill()
    made.communicate()


def asked(tmp_path: Path, *, niceness: int = 0, **environment: str) -> Any:
    """What the script prints when it is run through the client."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-I", "-S", CLIENT, str(tmp_path / "own" / "forks"), str(tmp_path / "script.py"), "one"]
    run = subprocess.run(
        ["nice", "-n", str(niceness), *command], input="through stdin", capture_output=True, text=True, check=True,
        cwd=tmp_path, timeout=120, env=variables(OMP_NUM_THREADS="1", **environment),
    )  # fmt: skip
    assert "said" in run.stderr
    return json.loads(run.stdout)


def test_a_fork_is_what_a_new_process_would_be(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    found = [asked(tmp_path, RAY_MINE="1", niceness=3) for _ in range(2)]
    for each in found:
        assert each["loaded"], "it has what the server had imported"
        assert each["parent"] == server.pid
        assert each["arguments"] == [str(tmp_path / "script.py"), "one"]
        assert (each["folder"], each["path"], each["name"]) == (str(tmp_path), str(tmp_path), "__main__")
        assert (each["ray"], each["beside"], each["read"]) == ("1", False, "through stdin")
        assert each["threads"] == 1
        assert each["group"]
        assert each["niceness"] >= 3
    assert not set(found[0]["draws"]) & set(found[1]["draws"]), "random numbers of its own"


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
    assert asked(tmp_path, PATH=path, VIRTUAL_ENV=str(made.parent)) == 1
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
    monkeypatch.setenv("RLVID_FORK_WORKERS", "0")
    assert not possible("/tmp")
