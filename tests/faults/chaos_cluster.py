"""A Ray cluster of several nodes on this machine, and the processes of it that train."""

import atexit
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def ask_for_token() -> None:
    """Has a cluster that this process starts ask for a token, as Ray listens on every interface of the machine.

    Call it before Ray is imported. A token of the user's is kept; else there is one in a file that goes with this
    process.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        folder = tempfile.mkdtemp(prefix="rlvid-token-")  # readable by its owner alone
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        file = Path(folder, "auth_token")
        file.write_text(secrets.token_hex(32), encoding="ascii")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)


class LocalCluster:
    """A head without CPUs, where the drivers are, and two nodes with room for all workers each."""

    def __init__(self, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        self._folder = tempfile.mkdtemp(prefix="chaos-", dir="/tmp")  # short: paths of Unix sockets end at 107 bytes
        self._cpus = cpus
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": f"{self._folder}/ray"}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        for _ in range(2):
            self.add_node()

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_node(self) -> None:
        self._cluster.add_node(num_cpus=self._cpus, temp_dir=f"{self._folder}/ray")

    def kill_raylet_of(self, worker: int, notice_s: int | None = None) -> None:
        """Kills the raylet that a worker process belongs to, cleans up behind it, and adds a node.

        With ``notice_s`` that many seconds go by between an announcement, as of a spot node, and the end.
        """
        ancestry = set(ancestors(worker))
        for node in list(self._cluster.worker_nodes):
            pid = node.all_processes["raylet"][0].process.pid
            if pid in ancestry:
                if notice_s is not None:
                    self._announce(node.node_id, notice_s)
                    self.add_node()  # as an autoscaler would
                    time.sleep(notice_s)
                os.kill(pid, signal.SIGKILL)
                self._cluster.remove_node(node, allow_graceful=False)
                if notice_s is None:
                    self.add_node()
                return
        raise ProcessLookupError(worker)

    def _announce(self, node: str, notice_s: int) -> None:
        command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", self.address, "--node-id", node]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
        subprocess.run(
            [*command, "--deadline-remaining-seconds", str(notice_s)], check=True, capture_output=True, text=True
        )


def ancestors(pid: int) -> list[int]:
    """The process itself, its parent, and so on; empty if it is gone."""
    found: list[int] = []
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            break
        found.append(pid)
        pid = int(stat.rpartition(")")[2].split()[1])
    return found


def train_workers() -> list[int]:
    """Processes that train in a cluster which this process started; others on the machine are left alone."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"RayTrainWorker" in title and os.getpid() in ancestors(int(entry.name)):
                found.append(int(entry.name))
    return sorted(found)
