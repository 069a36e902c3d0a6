"""Workers of the Ray on this machine are forks of a process that has imported the libraries."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rlvid.cluster import fork_server

pytestmark = pytest.mark.skipif(not fork_server.possible(tempfile.gettempdir()), reason="workers are not forks here")


class Worker:
    """Says where it comes from."""

    def origin(self) -> dict[str, Any]:
        """Returns facts of its process before it imports anything."""
        loaded = "diffusers" in sys.modules
        import numpy
        import ray
        import torch

        return {
            "loaded": loaded,
            "parent": Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8"),
            "threads": torch.get_num_threads(),
            "identity": ray.get_runtime_context().get_worker_id(),
            "draw": float(numpy.random.rand()),
        }


def origin(**options: Any) -> dict[str, Any]:
    import ray

    found: dict[str, Any] = ray.get(ray.remote(Worker).options(**options).remote().origin.remote(), timeout=600)
    return found


def test_actors_are_forks_with_names_numbers_and_threads_of_their_own(ray_cluster: Any) -> None:
    one, two = origin(), origin(num_cpus=2)
    own = origin(runtime_env={"env_vars": {"OMP_NUM_THREADS": "3"}})
    for each in (one, two, own):
        assert each["loaded"]
        assert "rlvid.cluster.fork_server" in each["parent"]
    for name in ("identity", "draw"):
        assert len({each[name] for each in (one, two, own)}) == 3, name
    given = "OMP_NUM_THREADS" in os.environ  # else Ray sets it to the actor's CPUs
    assert given or (one["threads"], two["threads"]) == (1, 2)
    assert own["threads"] == 3


@pytest.mark.slow  # test_fork_server.py has a quick one
def test_an_actor_with_variables_of_its_own_is_a_new_process(ray_cluster: Any) -> None:
    other = origin(runtime_env={"env_vars": {"LC_ALL": "C"}})
    assert not other["loaded"]
    assert "raylet" in other["parent"]
