"""Checks of a cluster's nodes before a run, in seconds: room for its workers, the storage, the version of rlvid."""

import math
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from rlvid import __version__
from rlvid.config import RunConfig
from rlvid.storage import locate

Shape = dict[str, float]
BOOTSTRAP = Path.home() / "ray_bootstrap_config.yaml"
"""The file on the head with ``ray up``'s description of the cluster."""
_SHARED = "choose a folder that all nodes mount (NFS, EFS, FSx), or s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
_SECONDS = 120.0
"""Seconds that a node may take for its check."""


def workers_that_fit(nodes: list[tuple[Shape, float]], need: Shape) -> float:
    """Counts the workers that fit, each on one node: ``nodes`` are (resources, number of nodes of that shape)."""
    return sum(
        count * min(math.floor(have.get(name, 0) / amount + 1e-9) for name, amount in need.items())
        for have, count in nodes
        if all(have.get(name, 0) >= amount for name, amount in need.items())
    )


def nodes_now() -> list[tuple[Shape, float]]:
    """Returns the nodes that are there."""
    import ray

    return [(node["Resources"], 1.0) for node in ray.nodes() if node["Alive"]]


def nodes_possible(described: Path = BOOTSTRAP) -> list[tuple[Shape, float]]:
    """Returns the nodes that the autoscaler may bring the cluster to; without one, those that are there.

    What the autoscaler may do stands in a file on the head, where the drivers of jobs run. A driver elsewhere, and one
    under KubeRay, which keeps no such file, goes by the nodes that are there.
    """
    if not described.is_file():
        return nodes_now()
    cluster = yaml.safe_load(described.read_text(encoding="utf-8"))
    head, most = cluster["head_node_type"], cluster.get("max_workers", math.inf)
    nodes = []
    for name, kind in cluster["available_node_types"].items():
        count = 1 if name == head else min(most, kind.get("max_workers", most))
        nodes.append((kind.get("resources", {}), float(count)))
    return nodes


def guard_gpus(config: RunConfig, use_gpu: bool) -> float:
    """Returns the GPUs that the guard reserves: ``guard.gpus``, by default one where workers have GPUs."""
    if not config.guard.every:
        return 0.0
    return float(use_gpu) if config.guard.gpus is None else config.guard.gpus


def worker_gpus(config: RunConfig) -> float:
    """Returns the GPUs that a worker reserves: one, less the parts that the guard and an encoder may share."""
    share = guard_gpus(config, True)
    return 1 - (share if share < 1 else 0) - config.data.encoder_gpus


def _check_encoders(config: RunConfig, use_gpu: bool) -> None:
    """Checks that the encoders find room on the GPUs of the workers, each on another one.

    Raises:
        ValueError: they do not.
    """
    data, guard = config.data, guard_gpus(config, True) % 1
    if not data.encoder_gpus:
        return
    if not use_gpu:
        raise ValueError(
            f"data.encoder_gpus = {data.encoder_gpus:g}: the workers have no GPUs to share; set data.encoder_gpus=0"
        )
    if data.encoders > config.train.workers:
        raise ValueError(
            f"data.encoders = {data.encoders} at data.encoder_gpus = {data.encoder_gpus:g} each: an encoder shares the "
            f"GPU of a worker, and there are {config.train.workers}; set data.encoders to at most that many"
        )
    several = config.train.workers > 1  # Ray puts two workers of half a GPU on the same one
    if worker_gpus(config) < 0.01 or (several and worker_gpus(config) <= 0.5 + 1e-9):
        rest = "not more than half of a worker's GPU, so two workers could share one" if several else "nothing"
        raise ValueError(
            f"data.encoder_gpus = {data.encoder_gpus:g}{f' and guard.gpus = {guard:g}' if guard else ''} leave the "
            f"worker {rest}; lower them"
        )


def needed(config: RunConfig, use_gpu: bool) -> Shape:
    """Returns the resources that one worker reserves."""
    return {"CPU": config.train.cpus_per_worker} | ({"GPU": worker_gpus(config)} if use_gpu else {})


def fits_now(config: RunConfig, use_gpu: bool) -> bool:
    """Returns whether the nodes that are there, were they free, hold all workers."""
    return workers_that_fit(nodes_now(), needed(config, use_gpu)) >= config.train.workers


def check_resources(config: RunConfig) -> bool:
    """Returns whether workers get a GPU each.

    Raises:
        ValueError: the cluster is too small for the workers, even with all nodes that its autoscaler may bring.
    """
    nodes, train = nodes_possible(), config.train
    use_gpu = _choose_gpu(train.workers, train.use_gpu, nodes, "train.")
    _check_encoders(config, use_gpu)
    _check_cores(train.workers, train.cpus_per_worker, nodes, "train.")
    _check_reward_actors(config, use_gpu, nodes)
    _check_places(train.workers, needed(config, use_gpu), nodes, "train.")
    return use_gpu


def check_workers(workers: int, cpus: float, use_gpu: bool | None) -> bool:
    """Returns whether workers of ``cpus`` cores get a GPU each; None takes them where there are enough.

    Raises:
        ValueError: the cluster is too small, even with all nodes that its autoscaler may bring.
    """
    nodes = nodes_possible()
    gpus = _choose_gpu(workers, use_gpu, nodes)
    _check_cores(workers, cpus, nodes)
    _check_places(workers, {"CPU": cpus} | ({"GPU": 1.0} if gpus else {}), nodes)
    return gpus


def _choose_gpu(workers: int, use_gpu: bool | None, nodes: list[tuple[Shape, float]], section: str = "") -> bool:
    """Returns whether workers get a GPU each; ValueError if they must and there are too few."""
    gpus = sum(shape.get("GPU", 0) * count for shape, count in nodes)
    if use_gpu and gpus < workers:
        raise ValueError(
            f"{section}workers = {workers} with {section}use_gpu=true needs {workers} GPUs; the cluster has {gpus:g}"
        )
    return gpus >= workers if use_gpu is None else use_gpu


def _check_cores(workers: int, cpus: float, nodes: list[tuple[Shape, float]], section: str = "") -> None:
    there = sum(shape.get("CPU", 0) * count for shape, count in nodes)
    if workers * cpus > there:
        raise ValueError(
            f"{section}workers = {workers} at {section}cpus_per_worker = {cpus:g} needs {workers * cpus:g} CPU cores; "
            f"the cluster has {there:g}; set {section}workers to at most {int(there // cpus)}"
        )


def _check_places(workers: int, need: Shape, nodes: list[tuple[Shape, float]], section: str = "") -> None:
    fit = workers_that_fit(nodes, need)
    if fit < workers:
        each = ", ".join(f"{count:g} x ({_shape(shape)})" for shape, count in nodes)
        raise ValueError(
            f"{section}workers = {workers} at {_shape(need)} each: only {fit:g} fit, as a worker lies on one node, and "
            f"the nodes are {each}; lower {section}cpus_per_worker or {section}workers"
        )


def _check_reward_actors(config: RunConfig, use_gpu: bool, nodes: list[tuple[Shape, float]]) -> None:
    """Raises ValueError where the cluster has no room for an actor of the reward beside each worker."""
    remote, train = config.reward.remote, config.train
    if remote is None or remote.where != "actor":
        return
    worker = needed(config, use_gpu)
    actor = {name: amount for name, amount in (("CPU", remote.cpus), ("GPU", remote.gpus)) if amount}
    if not actor:
        return
    guard = 1 if config.guard.every else 0  # which scores its own videos
    there = {name: sum(shape.get(name, 0) * count for shape, count in nodes) for name in actor}
    wanted = {name: train.workers * (worker.get(name, 0) + actor[name]) + guard * actor[name] for name in actor}
    if any(wanted[name] > there[name] for name in wanted) or workers_that_fit(nodes, actor) < train.workers + guard:
        raise ValueError(
            f"reward.remote takes {_shape(actor)} beside each of {train.workers} workers"
            f"{' and the guard' * guard}: {_shape(wanted)} in all, each actor on one node; the cluster has "
            f"{_shape(there)}; lower reward.remote.cpus, reward.remote.gpus or train.workers"
        )


def _shape(shape: Shape) -> str:
    return ", ".join(f"{shape[name]:g} {name}" for name in ("CPU", "GPU") if shape.get(name))


def check_nodes(storage: str, run: str, setting: str = "output.storage", way_out: str = _SHARED) -> None:
    """Checks that every node for a worker sees the driver's files in the storage, can write, and has this rlvid.

    Args:
        storage: absolute folder, or URI, that holds runs.
        run: the run's name; its place is there already.
        setting: that names the storage.
        way_out: what to do where a node does not see it.

    Raises:
        ValueError: one does not, or does not answer.
    """
    import ray

    own = ray.get_runtime_context().get_node_id()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU") and n["NodeID"] != own]
    if not nodes:
        return
    store, root = locate(storage, run)
    marker = f".seen-{uuid.uuid4().hex[:12]}"
    _write(store, f"{root}/{marker}")
    try:
        answers, failed, silent = ask_nodes(visit, {n["NodeID"]: (storage, run, marker) for n in nodes}, _SECONDS)
    finally:
        store.delete_file(f"{root}/{marker}")
    address = {n["NodeID"]: f"node {n['NodeManagerAddress']} of the cluster" for n in nodes}
    if silent:
        raise ValueError(f"{address[silent[0]]} does not answer within {_SECONDS:g} s; look at it")
    for node, why in failed.items():
        raise ValueError(f"{address[node]} cannot run rlvid ({why}); install it there with its dependencies")
    for node, (version, problem) in answers.items():
        if version != __version__:
            raise ValueError(f"{address[node]} has rlvid {version} and the driver {__version__}; use one")
        if problem:
            raise ValueError(f"{setting}: {address[node]} {problem}: {storage}; {way_out}")


def check_files(files: Iterable[str], setting: str) -> None:
    """Checks that every node sees files that this one sees.

    Args:
        files: their absolute paths.
        setting: that names them.

    Raises:
        ValueError: a node does not see one.
    """
    import ray

    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")}
    own = ray.get_runtime_context().get_node_id()
    for file in files:
        answers, _, _ = ask_nodes(os.path.isfile, {node: (file,) for node in nodes if node != own}, _SECONDS)
        if blind := [nodes[node] for node, seen in answers.items() if not seen]:
            raise ValueError(
                f"{setting}: node {blind[0]} of the cluster does not see {file}; put it into a folder that all nodes "
                "mount (NFS, EFS, FSx)"
            )


def ask_nodes(
    ask: Callable[..., Any], arguments: dict[str, tuple[Any, ...]], seconds: float
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Calls a function on nodes, each in a process of its own that reserves nothing.

    Args:
        ask: the function.
        arguments: its arguments by the id of the node.
        seconds: that the nodes may take.

    Returns:
        The answers by node, the reasons of nodes where the process failed, and the nodes that were silent.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, asked = ray.remote(ask), {}
    for node, given in arguments.items():
        pinned = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[task.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned).remote(*given)] = node
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
    answers, failed = dict[str, Any](), dict[str, str]()
    for each in done:
        try:
            answers[asked[each]] = ray.get(each)
        except ray.exceptions.RayError as error:
            failed[asked[each]] = str(error).strip().splitlines()[-1].strip()
    return answers, failed, [asked[each] for each in late]


def visit(storage: str, run: str, marker: str, patience: float = 5.0) -> tuple[str, str | None]:
    """Returns a node's version of rlvid, and the fault of its storage, if there is one."""
    until = time.monotonic() + patience  # a network file system may tell others of a new file a little later
    try:
        store, root = locate(storage, run)
        while store.get_file_info(f"{root}/{marker}").type != fs.FileType.File:
            if time.monotonic() > until:
                return __version__, "does not see what the driver writes there"
            time.sleep(0.2)
        own = f"{root}/{marker}-{uuid.uuid4().hex[:12]}"
        _write(store, own)
        store.delete_file(own)
    except (OSError, ValueError) as error:
        return __version__, f"cannot use it ({' '.join(str(error).split())})"
    return __version__, None


def _write(store: fs.FileSystem, name: str) -> None:
    with store.open_output_stream(name) as file:
        file.write(b"rlvid")
