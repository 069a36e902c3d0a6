"""cluster.yaml is what `ray up` accepts, agrees with constraints.txt, and opens nothing to the world."""

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
