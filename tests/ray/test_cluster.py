"""Jobs on a cluster of three nodes, each a raylet of its own, with a token: what a user of a real cluster does.

Runs are kept in a store behind a URI, and each node has a cache of its own, so that nothing but the store is shared.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import HANG, started
from safetensors.torch import load_file

from rlvid.cluster.connect import UNREAD
from rlvid.data.archive import read_archive
from rlvid.evaluate.load import load_run
from rlvid.runs.checkpoints import read_settings
from rlvid.toy.tiny import save_tiny_model
from rlvid.train.audit import faults
from rlvid.train.record import RECORD

pytestmark = pytest.mark.slow  # three nodes take half a minute to start; test_submit.py needs none
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TOKEN = "a-token-of-the-tests-0123456789abcdef"
STEPS, EVERY, BATCH = 6, 2, 2
CAN_HIDE = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
"""Whether this user may make mount namespaces."""


REWARD = """
import time
from pathlib import Path
home = Path(__file__).parent
def score(frames, prompts):
    while (home / "hold").exists() and (home / "store" / "mine" / "step-000002").exists():
        time.sleep(0.05)
    return frames.mean((2, 3, 4))
"""
"""Holds the run ``mine`` after its first checkpoint, while there is a file ``hold``: for as long as a test likes."""


@dataclass(frozen=True)
class Cluster:
    """A head with one CPU and two nodes with two; ``hidden`` is a folder that the last node does not see."""

    home: Path
    address: str
    environment: dict[str, str]

    @property
    def store(self) -> Path:
        return self.home / "store"

    @property
    def hidden(self) -> Path:
        return self.home / "hidden"

    def settings(self, name: str, *overrides: str) -> list[str]:
        """A run of seconds whose two workers must lie on two nodes."""
        return [
            "train", "toy", f"name={name}", f"model.path={self.home / 'tiny'}", "model.frames=4", "model.size=16",
            "data.count=4", f"output.storage=file://{self.store}", "sampling.steps=4", "reward.segments=2",
            f"train.batch_size={BATCH}", "train.workers=2", "train.cpus_per_worker=1.5", "train.zero_stage=2",
            "optimizer.warmup=0", f"train.steps={STEPS}", f"output.checkpoint_every={EVERY}", "output.videos_every=0",
            "reward.name=custom", f"reward.path={self.home / 'held.py'}:score", "reward.held_out=null", *overrides,
        ]  # fmt: skip

    def start(self, *command: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """A command as a user of the cluster would start it."""
        return started(
            command, env=self.environment | {"PYTHONPATH": str(ROOT)} | environment, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def submit(self, *arguments: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """jobs/submit.py, started."""
        return self.start(sys.executable, "jobs/submit.py", "--address", self.address, *arguments, **environment)

    def ray_job(self, verb: str, *arguments: str) -> str:
        """Runs `ray job` to its end."""
        command = (str(BIN / "ray"), "job", verb, "--address", self.address, *arguments)
        with self.start(*command, RAY_AUTH_MODE="token") as process:
            out, error = process.communicate(timeout=HANG)
        assert process.returncode == 0, out + error
        return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pids_that_name(text: str) -> list[int]:
    """Processes with a text in their command line or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(prefix="rlvid-", dir="/tmp"))  # short: Unix socket paths end at 107 bytes
    port, dashboard = free_port(), free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    environment = kept | {
        "HOME": str(home), "PATH": f"{BIN}{os.pathsep}{kept['PATH']}", "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": TOKEN, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "NO_PROXY": "127.0.0.1,localhost",
        "RAY_prestart_worker_first_driver": "0", "RAY_worker_niceness": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    } | UNREAD  # fmt: skip
    made = Cluster(home, f"http://127.0.0.1:{dashboard}", environment)
    made.store.mkdir()
    made.hidden.mkdir()
    save_tiny_model(home / "tiny")
    (home / "held.py").write_text(REWARD)
    nodes: list[subprocess.Popen[bytes]] = []

    def node(number: int, cpus: int, *options: str) -> None:
        command = [  # with a folder and an address of its own, as the machine that it stands for has
            str(BIN / "ray"), "start", "--block", f"--num-cpus={cpus}", "--num-gpus=0",
            f"--object-store-memory={100 * 2**20}", "--disable-usage-stats", f"--temp-dir={home}/{number}",
            f"--node-ip-address=127.0.0.{number + 1}", "--dashboard-agent-listen-port=0", *options,
        ]  # fmt: skip
        if number == 2 and CAN_HIDE:  # a mount namespace in which something else lies over the hidden folder
            command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(made.hidden), *command]
        own = {"RAY_AUTH_MODE": "token", "RLVID_CACHE": str(home / f"cache-{number}")}
        log = home / f"node-{number}.log"
        for _ in range(3):  # Ray gives a node 30 s to start, however slow the machine is
            with open(log, "wb") as file:
                process = subprocess.Popen(
                    command, env=environment | own, stdout=file, stderr=file, start_new_session=True
                )
            nodes.append(process)
            _wait(partial(_started_or_ended, process, log), log.stem)
            if process.poll() is None:
                return
        raise AssertionError(f"{log.stem} does not start: {log.read_text('utf-8')[-2000:]}")

    try:
        node(
            0, 1, "--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            "--include-dashboard=true", f"--ray-client-server-port={free_port()}",
        )  # fmt: skip
        for number in (1, 2):
            node(number, 2, f"--address=127.0.0.1:{port}")
        _wait(lambda: _listens(dashboard), "the dashboard")
        yield made
    finally:
        print(*(f"{log}\n{log.read_text()[-2000:]}" for log in sorted(home.glob("node-*.log"))), sep="\n")  # noqa: T201
        for process in nodes:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 8
        while (left := pids_that_name(str(home))) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in nodes:
            process.wait()
        shutil.rmtree(home, ignore_errors=True)


def _started_or_ended(node: subprocess.Popen[bytes], log: Path) -> bool:
    return node.poll() is not None or "Ray runtime started" in log.read_text("utf-8")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + HANG
    while not done():
        assert time.monotonic() < deadline, f"{what} was not there within {HANG:g} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> dict[str, torch.Tensor]:
    """The adapter of a run in a folder that all nodes see, without an interruption."""
    storage = cluster.home / "shared"
    with cluster.submit(*cluster.settings("whole", f"output.storage={storage}")) as process:
        out, error = process.communicate(timeout=HANG)
    assert process.returncode == 0, out + error
    assert "job whole submitted" in error
    assert f"step {STEPS}/{STEPS}" in out
    check_traces(storage / "whole")
    return adapter(storage / "whole")


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / f"step-{STEPS:06d}" / "adapter" / "adapter_model.safetensors")


def check_traces(run: Path) -> None:
    """The archive has every sample once, from both workers; TensorBoard has every step once and in order."""
    config = read_settings(run)
    assert (config.train.batch_size, config.output.archive_every) == (BATCH, 1)
    assert faults(run, config, STEPS) == []
    assert set(read_archive(run / "archive", ["rank"])["rank"].to_pylist()) == {0, 1}


def test_a_stopped_job_resumes_on_machines_that_have_nothing_to_the_same_adapter(
    cluster: Cluster, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings, hold = cluster.store / "mine", cluster.settings("mine"), cluster.home / "hold"
    hold.touch()
    cluster.ray_job(
        "submit", "--submission-id", "mine", "--no-wait", "--working-dir", str(ROOT), "--",
        "python", "-m", "rlvid.cli", *settings,
    )  # fmt: skip
    with cluster.submit(*settings) as follower:
        record = run / RECORD
        _wait(lambda: record.is_file() and f"step-{EVERY:06d}" in record.read_text("utf-8"), "the first checkpoint")
        cluster.ray_job("stop", "mine")
        out, error = follower.communicate(timeout=HANG)
    assert "job mine is running already; this follows it" in error
    assert "job mine was stopped" in error
    assert "run mine: instructvideo on the reward" in out
    assert follower.returncode == 1
    assert [path.name for path in run.glob("step-*")] == [f"step-{EVERY:06d}"]
    hold.unlink()
    caches = [cluster.home / f"cache-{number}" for number in range(3)]
    assert all((cache / "storage").is_dir() for cache in caches), "a node had no cache of its own"
    for cache in caches:
        shutil.rmtree(cache)

    with cluster.submit(*settings) as again:
        out, error = again.communicate(timeout=HANG)
    assert again.returncode == 0, out + error
    assert "job mine-2 submitted" in error
    assert "rlvid evaluate" in out
    log = (run / "logs" / "worker-00.log").read_text(encoding="utf-8")
    assert f"continues after step {EVERY}" in log
    found = adapter(run)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    check_traces(run)
    monkeypatch.setenv("RLVID_CACHE", str(cluster.home / "cache-of-the-user"))
    assert load_run(f"file://{cluster.store}/mine").checkpoint.step == STEPS
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "clips.txt", "before-after.png", "reward.png"}


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("thick", "train.cpus_per_worker=2.5", "only 0 fit, as a worker lies on one node"),
        pytest.param(
            "hidden", "output.storage={hidden}", "does not see what the driver writes there",
            marks=pytest.mark.skipif(not CAN_HIDE, reason="makes no mount namespaces"),
        ),
    ],
    ids=["a worker that no node has room for", "storage that a node does not see"],
)  # fmt: skip
def test_what_can_never_run_is_said_at_once_and_its_exit_code_passed_on(
    cluster: Cluster, name: str, override: str, words: str
) -> None:
    with cluster.submit(*cluster.settings(name, override.format(hidden=cluster.hidden))) as job:
        out, error = job.communicate(timeout=HANG)
    assert words in " ".join(out.split()), out + error
    assert "Traceback" not in out
    assert f"job {name} failed with exit code 2" in error
    assert job.returncode == 2


def test_a_wrong_token_and_an_address_where_nobody_is_are_one_line(cluster: Cluster) -> None:
    settings = cluster.settings("never")
    nobody = ("jobs/submit.py", "--address", f"http://127.0.0.1:{free_port()}", *settings)
    for job, expected in (
        (cluster.submit(*settings, RAY_AUTH_TOKEN="wrong"), "refuses the token of this machine"),
        (cluster.submit(*settings, RAY_AUTH_TOKEN=""), "asks for a token and there is none here"),
        (cluster.start(sys.executable, *nobody), "no Ray cluster answers at"),
    ):
        with job as process:
            out, error = process.communicate(timeout=HANG)
        assert process.returncode == 2
        assert expected in error
        assert len((out + error).strip().splitlines()) == 1
