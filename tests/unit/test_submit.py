"""jobs/submit.py before anything travels: names, paths, and a cluster that does not answer, let in, or fit."""

import io
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from aiohttp import ServerDisconnectedError

from jobs import submit
from rlvid import interrupt
from rlvid.cluster.address import check_cluster, connection_error, reach
from rlvid.cluster.connect import check_session_folder
from rlvid.cluster.token import auth_token, make_own_token

PYTHON = ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        ("train", "toy name=mine output.storage=/mnt/runs", "mine"),
        ("train", "toy output.storage=s3://bucket/runs", "toy"),
        ("evaluate", "/mnt/runs/mine --steps 20", "evaluate-mine"),
        ("evaluate", "s3://bucket/runs/mine", "evaluate-mine"),
        ("evaluate", "--base toy --trust name=mine --out /mnt/base", "evaluate-mine-base"),
        ("evaluate", "a=/mnt/runs/mine@best*0.5 /mnt/runs/b --out /mnt/both", "evaluate-mine-best-0.5"),
        ("export", "/mnt/runs/mine --out /mnt/model", "export-mine"),
        ("generate", "builtin prompt --out=/mnt/videos", "generate-builtin"),
        ("encode", "/mnt/videos /mnt/clips --workers 4", "encode-clips"),
        ("sweep", "methods storage=/mnt/sweeps", "methods"),
        ("evaluate", "s3://bucket/runs/mine?endpoint_override=host:9000", "evaluate-mine"),
        ("train", "toy name=mine --address auto output.storage=/mnt/runs", "mine"),
        ("encode", "--workers 4 /mnt/videos /mnt/clips --config=toy", "encode-clips"),
        ("sweep", "toy storage=/mnt/sweeps name=lambda", "lambda"),
        ("sweep", "storage=/mnt/sweeps", "toy-sweep"),
        ("reward", "fit --outside /mnt/votes.parquet kind=video --out /mnt/liked", "fit-liked"),
    ],
)
def test_a_job_is_named_after_its_run(command: str, arguments: str, name: str) -> None:
    assert submit.job_name(command, arguments.split()) == name
    assert submit.job_name(command, arguments.split(), "other") == "other"


@pytest.mark.parametrize(
    ("command", "arguments", "complaint"),
    [
        ("train", "toy name=mine", "output.storage = 'runs' would lie in the job's own folder"),
        ("train", "toy name=mine output.storage=../runs", "output.storage = '../runs' would lie"),
        ("train", "", "train: name a description first"),
        ("train", "toy trian.steps=3", "unknown key trian"),
        ("train", "toy output.storage=ftp://host/runs", "must be a folder"),
        ("evaluate", "mine", "evaluate: the run = 'mine' would lie"),
        ("evaluate", "--steps 20 /mnt/runs/mine", "evaluate: name the run first"),
        ("evaluate", "/mnt/runs/mine a=other --out /mnt/both", "evaluate: the run = 'other' would lie"),
        ("evaluate", "/mnt/runs/mine /mnt/runs/b", "evaluate: --out = '' would lie"),
        ("evaluate", "--base toy --steps 20", "evaluate --base: --out = '' would lie"),
        ("evaluate", "--base toy --out /mnt/base model.paths=x", "unknown key"),
        ("export", "/mnt/runs/mine --out model", "export: --out = 'model' would lie"),
        ("generate", "builtin prompt", "generate: --out = '' would lie"),
        ("encode", "videos /mnt/clips", "encode: the source = 'videos' would lie"),
        ("reward", "fit kind=video --out /mnt/liked", "reward: name the votes first"),
        ("reward", "fit votes.csv --out /mnt/liked", "reward fit: the pairs = 'votes.csv' would lie"),
        ("reward", "fit /mnt/votes.csv", "reward fit: --out = '' would lie"),
        (
            "reward",
            "fit /mnt/votes.csv backbone.name=clip backbone.path=clip --out /mnt/liked",
            "backbone.path = 'clip' would lie",
        ),
        ("reward", "fit /mnt/votes.csv stepz=3 --out /mnt/liked", "unknown key stepz"),
        ("sweep", "toy", "sweep: storage = 'runs' would lie"),
        ("sweep", "toy storage=/mnt/sweeps space.reward.segmints=[1]", "segmints"),
    ],
)
def test_what_cannot_work_on_a_cluster_is_refused_here(command: str, arguments: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        submit.job_name(command, arguments.split())
    assert "\n" not in str(caught.value)


def test_a_name_that_no_job_can_have_is_refused() -> None:
    with pytest.raises(ValueError, match="--name 'a b'"):
        submit.job_name("sweep", ["toy", "storage=/mnt/x"], "a b")


def test_a_description_that_does_not_travel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("output: {storage: /mnt/runs}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own.yaml' is not in .*, which is all that travels"):
        submit.job_name("train", [str(path)])


class Quiet(BaseHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(handler: type[Quiet]) -> Iterator[str]:
    """An HTTP server on this machine; yields its address."""
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def dashboard(ray: str, python: str, token: str | None = None) -> AbstractContextManager[str]:
    """An HTTP server that answers as Ray's dashboard does to the questions that come before a job."""

    class Answers(Quiet):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization")
            known = {
                "/api/version": {"ray_version": ray},
                "/api/v0/cluster_metadata": {"data": {"pythonVersion": python}},
            }
            code = 200 if self.path in known else 404
            if token is not None and given != f"Bearer {token}":
                code = 403 if given else 401
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(known.get(self.path) if code == 200 else None).encode())

    return serving(Answers)


@pytest.fixture(autouse=True)
def _no_token_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("no_proxy", "example.org")  # is added to


def test_the_same_versions_are_let_pass() -> None:
    major_minor = PYTHON.rpartition(".")[0]
    with dashboard(version("ray"), f"{major_minor}.99") as address:
        assert check_cluster(address) == {}


@pytest.mark.parametrize(
    ("ray", "python", "complaint"),
    [
        ("2.58.0", PYTHON, "runs Ray 2.58.0 and this machine Ray"),
        (version("ray"), "3.9.1", "runs Python 3.9.1 and this machine Python"),
    ],
)
def test_other_versions_are_one_line(ray: str, python: str, complaint: str) -> None:
    with dashboard(ray, python) as address, pytest.raises(ValueError, match=complaint):
        check_cluster(address)


def test_a_token_is_asked_for_shown_and_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with dashboard(version("ray"), PYTHON, token="right") as address:
        with pytest.raises(ValueError, match="asks for a token and there is none here"):
            check_cluster(address)
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("wrong\n", encoding="utf-8")
        with pytest.raises(ValueError, match="refuses the token of this machine") as caught:
            check_cluster(address)
        assert "wrong" not in str(caught.value)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        assert check_cluster(address) == {"Authorization": "Bearer right"}


def elsewhere(to: str) -> AbstractContextManager[str]:
    """An HTTP server that sends everybody on to another address."""

    class Sends(Quiet):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"{to}{self.path}")
            self.end_headers()

    return serving(Sends)


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with (
        dashboard(version("ray"), PYTHON, token="right") as other,
        elsewhere(other) as address,
        pytest.raises(ValueError, match=rf"302.*{other}"),
    ):
        check_cluster(address)


def test_a_proxy_is_passed_by_on_the_way_to_this_machine(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port}")
    with dashboard(version("ray"), PYTHON) as address:
        assert check_cluster(address) == {}


@contextmanager
def cluster(token: str | None = None) -> Iterator[str]:
    """A gRPC server that answers as Ray's GCS does to the question whether it is there."""

    class Answers(grpc.GenericRpcHandler):
        def service(self, call: Any) -> Any:
            given = dict(call.invocation_metadata).get("authorization")

            def answer(request: bytes, context: Any) -> bytes:
                if token is not None and given != f"Bearer {token}":
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
                return b""

            known = call.method == "/ray.rpc.NodeInfoGcsService/CheckAlive"
            return grpc.unary_unary_rpc_method_handler(answer) if known else None

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Answers()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_driver_shows_the_token_where_a_cluster_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    with cluster() as open_to_all:
        assert reach(open_to_all) == open_to_all
        assert "RAY_AUTH_MODE" not in os.environ
    with cluster("right") as address:
        with pytest.raises(ValueError, match=r"asks for a token and there is none here.*RAY_AUTH_TOKEN_PATH"):
            reach(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-one")
        with pytest.raises(ValueError, match="refuses the token") as caught:
            reach(address)
        assert "wrong-one" not in str(caught.value)
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        (tmp_path / "token").write_text("right\nand a second line", encoding="utf-8")
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(ValueError, match="RAY_AUTH_MODE = 'disabled'"):
            reach(address)
        monkeypatch.delenv("RAY_AUTH_MODE")
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert reach("auto") == address
        assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # restored after the test


@pytest.mark.parametrize("held", ["two\nlines", "tést", "a\rb", "  "])
def test_a_token_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", held)
    with (
        dashboard(version("ray"), PYTHON, token="right") as address,
        pytest.raises(ValueError, match="RAY_AUTH_TOKEN") as caught,
    ):
        check_cluster(address)
    assert held.strip() == "" or held not in str(caught.value)


def test_a_token_path_without_a_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with cluster("right") as address, pytest.raises(ValueError, match="RAY_AUTH_TOKEN_PATH = '/nowhere/token'"):
        reach(address)


def test_a_ray_of_our_own_has_a_token_with_and_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_own_token()
    file = tmp_path / ".ray" / "auth_token"
    assert auth_token() == file.read_text("ascii")
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]
    (tmp_path / "file").touch()
    for home in ("/proc/nohome", str(tmp_path / "file"), ""):
        monkeypatch.setenv("HOME", home)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "")
        make_own_token()
        assert len(auth_token() or "") == 64
        assert os.environ["RAY_AUTH_TOKEN"] == auth_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    make_own_token()
    assert auth_token() is None


@pytest.mark.parametrize("folder", ["/proc/nothing", "file", "long-" * 20])
def test_a_folder_that_ray_cannot_use_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / folder))
    with pytest.raises(ValueError, match="RAY_TMPDIR"):
        check_session_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_session_folder()


@pytest.mark.parametrize(
    "address",
    ["http://user:hunter2@127.0.0.1:8265", "user:hunter2@127.0.0.1:6379", "http://127.0.0.1:8265?token=hunter2"],
)
def test_an_address_with_a_password_is_refused_without_it(address: str) -> None:
    for ask in (check_cluster, reach):
        with pytest.raises(ValueError, match="--address") as caught:
            ask(address)
        assert "hunter2" not in str(caught.value)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_there_is_one_line(closed_port: int) -> None:
    with pytest.raises(ValueError, match=r"no Ray cluster answers at .*\(Connection refused\)"):
        check_cluster(f"http://127.0.0.1:{closed_port}")
    with pytest.raises(ValueError, match=r"no Ray cluster answers at '127.0.0.1:\d+' \(Connection refused\)"):
        reach(f"127.0.0.1:{closed_port}")


@pytest.mark.parametrize(
    ("ask", "address", "complaint"),
    [
        (check_cluster, "127.0.0.1:8265", "give the dashboard's address"),
        (check_cluster, "http://127.0.0.1:abc", "is no Ray dashboard"),
        (check_cluster, "http://bad host:8265", "is no Ray dashboard"),
        (reach, "http://127.0.0.1:8265", "is a dashboard, which takes jobs"),
        (reach, "no-such-host.invalid:6379", "no Ray cluster answers"),
        (reach, "ray://127.0.0.1:10001", "ray://127.0.0.1:10001"),
        (reach, "127.0.0.1", "expected HOST:PORT"),
    ],
)
def test_the_wrong_kind_of_address_is_one_line(ask: Callable[[str], object], address: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ask(address)


def test_rays_own_words_become_one_line() -> None:
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "2.50.0", "python_version": PYTHON}, "process")
    found = str(connection_error("head:6379", caught.value))
    assert found.startswith("the cluster at head:6379 runs Ray 2.50.0 and this")


@pytest.mark.parametrize(
    ("typed", "meant"), [("s", "stop"), ("Stop", "stop"), ("", "detach"), ("d", "detach"), ("c", "continue")]
)
def test_ctrl_c_asks(monkeypatch: pytest.MonkeyPatch, typed: str, meant: str) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert submit.interrupted("mine", lambda _: typed) == meant


def test_ctrl_c_with_nobody_to_ask_leaves_the_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert submit.interrupted("mine", lambda _: pytest.fail("asked")) is None


def test_ctrl_c_is_answered_and_another_signal_says_that_the_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's answer ends the interruption; SIGTERM asks nothing."""

    def sends(number: int) -> Any:
        def get_job_status(job: str) -> Any:
            signal.raise_signal(number)

        return SimpleNamespace(tail_job_logs=Client([[]], []).tail_job_logs, get_job_status=get_job_status)

    typed = io.StringIO("d\n")
    monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", typed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest was started with &
    interrupt.listen()
    try:
        assert submit.follow(sends(signal.SIGINT), "mine", "http://head:8265") == 0
        assert interrupt.received() is None
        with pytest.raises(KeyboardInterrupt):
            submit.follow(sends(signal.SIGTERM), "mine", "http://head name:8265")
        assert re.search("job mine .*ray job stop --address 'http://head name:8265' mine", interrupt.line())
        assert interrupt.exit_code() == 143
    finally:
        interrupt.unlisten()
        signal.signal(signal.SIGINT, before)


class Client:
    """A jobs client whose connection breaks: each list of texts is what one connection brings before it does."""

    def __init__(self, connections: list[list[str]], statuses: list[str]) -> None:
        self._connections, self._statuses = connections, statuses

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in self._connections.pop(0):
            yield text
        if self._connections:
            raise ServerDisconnectedError

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(is_terminal=lambda: True)

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=SimpleNamespace(value=self._statuses[0]), driver_exit_code=3)


def test_a_broken_connection_goes_on_where_it_ended_and_the_exit_code_is_the_job_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    client = Client([["one\n", "tw"], [], ["one\ntwo\n", "three\n"]], ["FAILED"])
    assert submit.follow(client, "mine", "http://head:8265") == 3
    told = capsys.readouterr()
    assert told.out == "one\ntwo\nthree\n"
    assert "job mine failed with exit code 3" in told.err
    gone = Client([[] for _ in range(9)], ["RUNNING"])
    with pytest.raises(RuntimeError, match=r"job mine .* the same command follows it"):
        submit.follow(gone, "mine", "http://head:8265")


def test_a_ray_that_does_not_start_in_time_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from rlvid.cluster import connect

    def late(*_: Any, **__: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(os, "environ", dict(os.environ))  # so that its settings go with the test
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(connect.fork_server, "possible", lambda folder: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"^Ray did not start on this machine within 120 s; .* repeat the command"):
        connect.start_ray()


def test_a_slow_machine_has_more_time_to_start_ray_than_ray_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    from rlvid.cluster import connect

    asked = list[str]()

    def slow(address: str, node: str) -> str:
        asked.append(node)
        if len(asked) < 3:
            raise RuntimeError("there is no such node")
        return "node"

    monkeypatch.setattr(services, "get_node", slow)
    with connect._patience():
        assert services.get_node("address", "id") == "node"
    assert asked == ["id"] * 3
    assert services.get_node is slow
    asked.clear()
    monkeypatch.setattr(connect, "_START", -1.0)
    with pytest.raises(RuntimeError, match="no such node"), connect._patience():
        services.get_node("address", "id")
