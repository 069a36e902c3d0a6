"""What every test stands on: the environment, a seed, tiers by folder, and one local Ray cluster."""

import gc
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_cluster import ask_for_token

ROOT = Path(__file__).resolve().parents[1]
TIERS = ("unit", "ray", "parity", "gpu")

# Read by libraries when they are imported, and inherited by the processes that tests start. setdefault: what you
# export before pytest wins.
for _name, _value in {
    "DS_ACCELERATOR": "cpu",  # DeepSpeed: the equivalence tests compare CPU runs, with or without a GPU beside them
    "HF_HUB_OFFLINE": "1",  # a test never downloads
    "MPLBACKEND": "Agg",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default of 2 s is also the pace of ray.train.report
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # by default 60, too little where others start beside them
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",  # by default 1 s: the next task would import all anew
    "RAY_prestart_worker_first_driver": "0",  # a process for each CPU, of which most would never work
    "RAY_worker_niceness": "0",  # by default 15: beside other tests they would starve
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)
ask_for_token()
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:  # threads that wait for one another would starve
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start, too


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make equivalence` and of CI."""
    parser.addoption("--equivalence", action="store_true", help="also the methods that other runs of the tests omit")
    parser.addoption("--until", type=float, default=math.inf, help="skip tests that would start after this Unix time")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Pause the garbage collector while tests import libraries, and keep it from visiting what they imported.

    Nearly a million objects stay to the end: each visit to all of them would take a second.
    """
    from rlvid.collection import collection_paused

    with collection_paused():
        found = yield
        gc.freeze()
        return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by its folder; skip those that need a GPU where there is none, omit those of --equivalence."""
    if not config.getoption("--equivalence"):
        omitted = [item for item in items if item.get_closest_marker("equivalence")]
        config.hook.pytest_deselected(items=omitted)
        items[:] = [item for item in items if item not in omitted]
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in TIERS:
            item.add_marker(folder)
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that comes too late, before its fixtures start anything."""
    if time.time() > item.config.getoption("--until"):
        pytest.skip("no time left (--until)")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say last how many tests of pages were skipped because no browser starts, and how to get one; CI reads it."""
    summary: Any = config.pluginmanager.get_plugin("terminalreporter")
    skipped = summary.stats.get("skipped", []) if summary else []
    if count := sum("NO BROWSER" in str(each.longrepr) for each in skipped):
        way = "apt install chromium, or make browser with a network"
        summary.write_line(f"NO BROWSER: {count} tests of pages were skipped; to have one: {way}")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(1, min(2, os.cpu_count() or 1) // processes))))


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Give threads back after a test that runs an actor's class in this process, which sets its own number of them.

    Threads beyond the cores wait for one another in every operation: all later tests would take tens of times as long.
    """
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rlvid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command, which must succeed, in this process; returns what it printed."""

    def command(*arguments: object) -> str:
        from rlvid.cli import main

        monkeypatch.setattr("sys.argv", ["rlvid", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        told = capsys.readouterr()
        assert not stopped.value.code, told.err
        return told.out

    return command


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Handlers of signals that a command installed in this process go with its test."""
    yield
    from rlvid import interrupt

    interrupt.unlisten()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in every test, in whatever order tests run.

    rlvid itself draws from generators of its own; this is for what tests make up.
    """
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _one_process() -> Iterator[None]:
    """A group of one process. DeepSpeed remembers the first one that it sees, so all tests share it."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def process_group(_one_process: None) -> Iterator[None]:
    """A group of one process, with the environment that DeepSpeed wants; torch is given back as it was."""
    from torch.nn import functional

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", functional.linear)  # ZeRO 3 puts its own there, for good
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A local Ray cluster with 8 logical CPUs, on however few real ones, like the one that `rlvid train` starts.

    Yields what `ray.init` returns.
    """
    import ray

    from rlvid.cluster import fork_server
    from rlvid.cluster.connect import UNREAD

    temp_dir = tempfile.mkdtemp(prefix="rlvid-", dir="/tmp")  # short: Unix socket paths end at 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", temp_dir)  # nothing lands in ~/ray_results or ~/.ray
        seen = [str(ROOT), str(ROOT / "tests" / "unit"), os.environ.get("PYTHONPATH")]  # by workers, too
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, seen)))
        for name, value in UNREAD.items():
            patch.setenv(name, value)
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # not another instance's on this host
            patch.delenv(name, raising=False)
        command = fork_server.start(temp_dir) if fork_server.possible(temp_dir) else None
        context = ray.init(
            address="local",
            num_cpus=8,
            num_gpus=0,
            object_store_memory=150 * 1024**2,
            include_dashboard=False,
            runtime_env={"py_executable": command} if command else None,
            _temp_dir=f"{temp_dir}/ray",
        )
        try:
            yield context
        finally:
            ray.shutdown()  # never `ray stop`: it would end every instance on the machine
            fork_server.end()
            shutil.rmtree(temp_dir, ignore_errors=True)
