"""Checks of a cluster: start of Ray, resources, versions and storage of its nodes, results of its workers."""

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import fs

from rlvid.doctor.finding import Finding, examine_each, finding
from rlvid.doctor.machine import reason, scratch
from rlvid.doctor.selftest import build_algorithm, one_step, reference_step, share, tiny_config
from rlvid.models.trained import trained_state
from rlvid.storage import is_uri, locate

_ALIKE = ("ray", "torch", "deepspeed", "diffusers", "peft")
_PATIENCE = 60.0
"""Seconds that a node may take to answer."""
_WORKERS = 2
_MIB = 2**20


def check_cluster(address: str | None, storage: str) -> Iterator[Finding]:
    """Starts Ray, or connects to a cluster, and checks it."""
    import ray

    from rlvid.cluster.connect import start_ray

    try:
        start_ray(address)
    except (ValueError, RuntimeError, OSError, TimeoutError) as error:
        found = " ".join(str(error).split())[:300]
        way = "check the address, that the cluster runs the same Ray and Python, and its token (ray get-auth-token)"
        yield Finding("ray", "error", found, way)
        return
    where = address or os.environ.get("RAY_ADDRESS") or "started on this machine"
    yield Finding("ray", "ok", f"{ray.__version__}, {where}")
    yield from examine_each(
        {
            "resources": (check_resources, "ray status says what the cluster is doing"),
            "nodes": (lambda: check_nodes(storage), "ray list nodes says what became of them"),
            "workers": (
                lambda: check_workers(storage),
                f"the logs are in {storage}; rlvid doctor --quick leaves Ray out",
            ),
        }
    )


def check_resources() -> Iterator[Finding]:
    """Checks the cluster's resources, and which of them are free."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    store = have.get("object_store_memory", 0) / _MIB
    found = (
        f"{nodes} node{'s' * (nodes > 1)}, {have.get('CPU', 0):g} CPU cores ({free.get('CPU', 0):g} free), "
        f"{have.get('GPU', 0):g} GPUs ({free.get('GPU', 0):g} free), object store {store:,.0f} MiB"
    )
    ways = []
    if have.get("CPU", 0) < 2:
        ways.append("training and the encoding of clips need a core each: ray start --num-cpus=2")
    if free.get("CPU", 0) < 1:
        ways.append("all cores are reserved: another run holds them (ray status), and a new one would wait")
    if store < 75:
        ways.append("give Ray an object store of 150 MiB or more: ray start --object-store-memory=...")
    yield finding("resources", not ways, found, "; ".join(ways), "warning")


def probe(place: str, name: str) -> dict[str, Any]:
    """Returns what a node sees in the storage, and its versions; called on the node."""
    seen, trouble = False, ""
    try:
        store, root = locate(place, ".")
        seen = store.get_file_info(f"{root}/driver").type == fs.FileType.File
        with store.open_output_stream(f"{root}/{name}") as file:
            file.write(name.encode())
    except (OSError, ValueError, pa.ArrowException) as error:
        trouble = reason(error)
    free = shutil.disk_usage(place).free if Path(place).is_dir() else 0
    return {"host": socket.gethostname(), "seen": seen, "trouble": trouble, "versions": versions(), "free": free}


def versions() -> dict[str, str]:
    """Returns the versions of this process that all nodes must share."""
    return {package: metadata.version(package) for package in _ALIKE} | {"python": platform.python_version()}


def check_nodes(storage: str) -> Iterator[Finding]:
    """Checks that every node runs the same versions, and reads and writes the same storage."""
    import ray

    from rlvid.cluster.nodes import ask_nodes

    with scratch(storage) as (place, store, root):
        with store.open_output_stream(f"{root}/driver") as file:
            file.write(b"rlvid")
        alive = {node["NodeID"]: (place, node["NodeID"]) for node in ray.nodes() if node["Alive"]}
        answers, failed, silent = ask_nodes(probe, alive, _PATIENCE)
        arrived = {each.base_name for each in store.get_file_info(fs.FileSelector(root))}
    if lost := [*(node[:8] for node in silent), *(f"{node[:8]} ({why})" for node, why in failed.items())]:
        way = "look at that node's logs; it must have rlvid and its packages (a job's working_dir brings rlvid alone)"
        yield Finding("nodes", "error", f"no answer from node {', '.join(lost)}", way)
    yield from versions_alike(answers)
    yield from storage_shared(answers, arrived, storage)


def versions_alike(answers: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Whether all nodes have the packages of the driver."""
    here = versions()
    other = [
        f"{answer['host']}: {package} {answer['versions'][package]}, here {version}"
        for answer in answers.values()
        for package, version in here.items()
        if answer["versions"][package] != version
    ]
    if other:
        way = "give all nodes the same image or environment (cluster.yaml: docker.image, setup_commands)"
        yield Finding("nodes", "error", "; ".join(other), way)
    elif answers:
        named = ", ".join(f"{package} {here[package]}" for package in ("python", "ray", "torch"))
        yield Finding("nodes", "ok", f"{len(answers)} of {len(answers)} run {named}")


def storage_shared(answers: dict[str, dict[str, Any]], arrived: set[str], storage: str) -> Iterator[Finding]:
    """Checks that all nodes read the driver's file, and the driver theirs."""
    bad = []
    for node, answer in answers.items():
        if answer["trouble"]:
            bad.append(f"{answer['host']} cannot write ({answer['trouble']})")
        elif not answer["seen"] or node not in arrived:
            bad.append(f"{answer['host']} has another folder of that name")
    if bad:
        way = "choose a folder that all nodes mount (NFS, EFS, a bucket's mount): output.storage=..., here --storage"
        yield Finding("shared storage", "error", f"{storage}: {'; '.join(bad)}", way)
    elif answers:
        free = min(answer["free"] for answer in answers.values()) / 2**30
        nodes = f"{len(answers)} node{'s' * (len(answers) > 1)}"
        room = "" if is_uri(storage) else f", {free:.1f} GiB free"
        yield Finding("shared storage", "ok", f"{nodes} read and write {storage}{room}")


def worker_step(job: dict[str, Any]) -> dict[str, Any]:
    """Takes a training step of the tiny model on one of several workers; returns the results of all workers."""
    import ray.train
    from torch import distributed

    from rlvid.train.engine import DeepSpeedEngine
    from rlvid.train.group import TorchWorkerGroup

    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = tiny_config(job["method"], world)
    method = build_algorithm(config, TorchWorkerGroup(rank, world))
    network = method.context.model.denoiser
    engine = DeepSpeedEngine(network, config.optimizer, config.train, config.micro_batch)
    method.context.model.denoiser = engine.module
    done = one_step(method, engine, share(method, rank, world))
    everyone: list[Any] = [None] * world
    state = {name: tensor.tolist() for name, tensor in trained_state(network, config.model).items()}
    distributed.all_gather_object(everyone, done | {"state": state})
    return {"workers": everyone}


def check_workers(storage: str) -> Iterator[Finding]:
    """Checks that two workers compute the step of one: the same gradient, weights, and noise of each sample."""
    import ray.train
    from ray.train.torch import TorchTrainer

    with scratch(storage) as (place, _, _):
        result = TorchTrainer(
            worker_step,
            train_loop_config={"method": "instructvideo"},
            scaling_config=ray.train.ScalingConfig(num_workers=_WORKERS, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(
                name="workers",
                storage_path=place,
                failure_config=ray.train.FailureConfig(controller_failure_limit=1),
                worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}},
            ),
        ).fit()
    yield from compare_workers(result.return_value["workers"])


def compare_workers(workers: list[dict[str, Any]]) -> Iterator[Finding]:
    """Compares the results of workers with one process that computed the whole batch in plain torch."""
    one, start, reference = reference_step("instructvideo")
    way = "do not train on this cluster until this is corrected: compare versions (packages, nodes), then report it"
    norms = [worker["norm"] / one["norm"] - 1 for worker in workers]
    moved = max((reference[name] - tensor).abs().max().item() for name, tensor in start.items())
    apart = max(
        (torch.tensor(worker["state"][name]) - tensor).abs().max().item()
        for worker in workers
        for name, tensor in reference.items()
    )
    fine = max(map(abs, norms)) < 1e-4 and apart < 0.1 * moved
    found = (
        f"{len(workers)} workers against plain torch: norm differs by {max(map(abs, norms)):.1e}, weights by "
        f"{apart:.1e} of {moved:.1e} moved"
    )
    yield finding("gradient of workers", fine, found, way)
    noise = {serial: digest for worker in workers for serial, digest in worker["noise"].items()}
    fine = noise == one["noise"] and len(set(noise.values())) == len(noise)
    found = f"{len(set(noise.values()))} of {len(noise)} samples of workers differ, "
    found += "each as in one process" if noise == one["noise"] else "and NOT as in one process"
    yield finding("samples of workers", fine, found, way)
