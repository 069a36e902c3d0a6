"""cluster.yaml and kuberay.yaml are what `ray up` and KubeRay accept, agree with constraints.txt, and open nothing."""

import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """Check a cluster description as `ray up` does, offline. Ray has no public door to this."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def pinned(package: str) -> str:
    """The version of `package` in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (version,) = (line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))
    return version


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = validate(cluster)
    assert prepared["available_node_types"]["gpu"]["resources"]["GPU"] > 0
    assert "3.0.0.dev0" not in str(prepared), "Ray's own set-up commands, for its development build, slipped in"


@pytest.mark.parametrize("place", [(), ("docker",), ("available_node_types", "gpu")])
def test_a_misspelt_key_is_rejected_by_name(cluster: dict[str, Any], place: tuple[str, ...]) -> None:
    section = cluster
    for key in place:
        section = section[key]
    section["max_wokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate(cluster)


def test_images_carry_the_tested_ray(cluster: dict[str, Any]) -> None:
    for image in (cluster["docker"]["image"], cluster["docker"]["head_image"]):
        assert image.startswith(f"rayproject/ray:{pinned('ray')}-py311-")


def test_the_cluster_is_closed(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]
    (start,) = (command for command in cluster["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in start


def test_nodes_share_memory_and_a_disk_and_are_spot(cluster: dict[str, Any]) -> None:
    options = cluster["docker"]["run_options"]
    (shm,) = (int(o.partition("=")[2].removesuffix("g")) for o in options if o.startswith("--shm-size="))
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    stores = [int(n) for each in starts for n in re.findall(r"--object-store-memory=(\d+)", each)]
    assert len(stores) == 2
    assert all(store < shm * 2**30 for store in stores)
    assert "--volume /mnt/shared:/mnt/shared" in options
    assert any("nfs4" in command and "/mnt/shared" in command for command in cluster["initialization_commands"])
    assert cluster["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_the_autoscaler_is_believed(cluster: dict[str, Any], tmp_path: Path) -> None:
    from rlvid.cluster.nodes import nodes_possible, workers_that_fit

    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(yaml.safe_dump(validate(cluster)), encoding="utf-8")
    nodes = nodes_possible(path)
    assert sorted(count for _, count in nodes) == [1, 4]
    assert workers_that_fit(nodes, {"CPU": 1, "GPU": 1}) == 16
    assert workers_that_fit(nodes, {"CPU": 48, "GPU": 1}) == 4
    assert workers_that_fit(nodes, {"CPU": 49}) == 0


# -------------------------------------------------------------------------------------------------- kuberay.yaml


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "kuberay.yaml").read_text(encoding="utf-8"))


def test_the_manifest_has_the_tested_ray_a_token_shared_memory_and_a_disk(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned("ray")
    text = (ROOT / "kuberay.yaml").read_text(encoding="utf-8")
    assert re.findall(r"FROM (\S+)", text) == [f"rayproject/ray:{pinned('ray')}-py311-gpu"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"shm": "/dev/shm", "shared": "/mnt/shared"}
        shm = next(each for each in pod["volumes"] if each["name"] == "shm")["emptyDir"]
        assert shm["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) < int(shm["sizeLimit"].removesuffix("Gi")) * 2**30


def test_the_manifests_job_is_a_run_that_fits_its_pods(job: dict[str, Any]) -> None:
    from rlvid.config import load_config

    program, verb, config, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (program, verb) == ("rlvid", "train")
    run = load_config(config, overrides)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert run.train.workers <= group["minReplicas"]
    assert run.output.storage.startswith("/mnt/shared/")


# --------------------------------------------------------------------------------------------------- .rayignore


def test_what_travels_with_a_job_is_small_and_enough(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, include_parent_dir=False, excludes=[])
    names = zipfile.ZipFile(package).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops.isdisjoint({".git", ".venv", ".cache", ".ci", "runs", "tests", "docs", ".mypy_cache", ".ruff_cache"})
    code = {
        path.relative_to(ROOT).as_posix() for top in ("rlvid", "jobs", "tuning") for path in (ROOT / top).rglob("*.py")
    }
    assert code | {"rlvid/configs/toy.yaml", "tuning/sweep.py"} <= set(names), "a folder of the package is left at home"
    assert any(name.startswith("rlvid/toy/weights/") and name.endswith(".safetensors") for name in names)
    assert package.stat().st_size < 40 * 2**20  # of which weights may be 30 MB
    excluded = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["rsync_exclude"]
    assert all(pattern.startswith("/") for pattern in excluded), "rsync leaves out such a folder at every depth"
