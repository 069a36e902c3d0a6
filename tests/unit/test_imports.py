"""Modules that an import loads: the core no Ray, the feed no models (the command: test_cli.py)."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def loaded_by(*names: str, then: str = "") -> set[str]:
    """Top-level modules loaded in a fresh interpreter that imports `names`, and then runs a line of code."""
    code = (  # without garbage collection, which would take a fifth of the time
        "import gc, importlib, sys\ngc.disable()\n"
        f"for name in sys.argv[1:]: importlib.import_module(name)\n{then}\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {module.split(".")[0] for module in done.stdout.splitlines()[-1].split()}


def test_importing_the_core_loads_no_ray_deepspeed_arrow_or_tensorboard() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (pure,) = (contract for contract in contracts if contract["name"] == "the core is pure torch")
    names = []
    for room in pure["source_modules"]:
        for path in sorted((ROOT / room.replace(".", "/")).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] != "__main__":  # importing a script would run it
                names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert len(names) > 60
    assert loaded_by(*names) & set(pure["forbidden_modules"]) == set()


def test_the_processes_of_the_feed_load_no_models() -> None:
    """They start with every training: nothing that they import needs torch."""
    assert loaded_by("rlvid.data.batches") & {"torch", "ray"} == set()
    heavy = {"torch", "peft", "transformers", "diffusers", "deepspeed"}
    assert loaded_by("rlvid.data.feed", "rlvid.train.feeding") & heavy == set()


def test_the_driver_of_a_training_and_a_trial_of_a_sweep_load_no_models() -> None:
    """Their imports take seconds, before Ray starts and before the workers do."""
    heavy = {"peft", "transformers", "diffusers", "deepspeed", "open_clip", "scipy", "matplotlib", "tensorboard"}
    code = (
        "from rlvid.config import load_config; from rlvid.train.preflight import check; check(load_config('toy', []))"
    )
    assert loaded_by("rlvid.train.launch", "rlvid.train.guard", "tuning.trial", then=code) & heavy == set()


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["by default", "as the user says", "as the user's policy says"],
)
def test_threads_wait_for_one_another_without_a_core_of_their_own(given: dict[str, str], expected: str) -> None:
    code = "import sys, rlvid, os; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    free = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=free | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
