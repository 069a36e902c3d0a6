"""Imports run one way, the core stays pure torch, and importing rlvid stays cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each room of the house, and the other rooms it may import. A room is a package or module right under rlvid/, or one
# of the script folders beside it. Anyone may import rlvid itself, for its version.
_BASE = {"config", "credentials", "escape", "faults", "files", "interrupt", "shapes", "randomness", "stats", "text"}
_CORE = _BASE | {"models", "diffusion", "reward", "algorithms", "toy", "world"}
_PACKAGE = _CORE | {"train", "evaluate", "data", "cluster", "runs", "plots", "storage"}
MAY_IMPORT = {
    "rlvid": set(),
    "config": {"credentials", "files", "shapes"},
    "credentials": set(),
    "files": set(),
    "storage": {"credentials"},
    "shapes": set(),
    "randomness": {"shapes"},
    "stats": set(),
    "text": set(),
    "interrupt": set(),
    "faults": {"text"},
    "models": _BASE,
    "world": _BASE,
    "diffusion": _BASE | {"models"},
    "reward": _BASE | {"models", "world"},
    "toy": _BASE | {"models", "diffusion", "reward", "world"},
    "algorithms": _CORE,
    "plan": _CORE,
    "escape": set(),
    "runs": _BASE,
    "plots": _BASE | {"data"},
    "cluster": _BASE | {"storage", "terminal"},
    "train": _PACKAGE,
    "evaluate": _PACKAGE,
    "data": _PACKAGE,
    "export": _PACKAGE,
    "report": _PACKAGE,
    "terminal": {"faults", "interrupt", "text"},
    "actions": _PACKAGE | {"report", "terminal"},
    "doctor": _PACKAGE | {"terminal"},
    "study": {"data", "escape", "evaluate", "files", "interrupt", "stats", "terminal"},
    "cli": _PACKAGE | {"actions", "doctor", "export", "plan", "report", "study", "terminal"},
    "__main__": {"cli", "interrupt"},
    "jobs": _PACKAGE | {"actions", "cli", "doctor", "export", "plan", "report", "study", "terminal", "tuning"},
    "tuning": _PACKAGE | {"actions", "export", "jobs", "terminal"},
}
PURE = _CORE | {"plan"}
NOT_IN_PURE = {"ray", "deepspeed", "pyarrow", "tensorboard", "tensorboardX", "torch.utils.tensorboard"}
DEEPSPEED_HOME = "rlvid/train/engine.py"


def modules(root: Path) -> dict[str, Path]:
    """Every module of rlvid, jobs and tuning under `root`, by dotted name."""
    found = {}
    for top in ("rlvid", "jobs", "tuning"):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, wherever in the file, by statement or by import_module.

    `from a import b` gives "a.b": whether b is a module or a name in one, its room is the same.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def room(dotted: str, known: set[str]) -> str | None:
    """The room that a dotted name belongs to; None outside the house."""
    top, _, rest = dotted.partition(".")
    if top != "rlvid":
        return top if top in ("jobs", "tuning") else None
    child = rest.partition(".")[0]
    return child if f"rlvid.{child}" in known or child in MAY_IMPORT else "rlvid"  # else a name in rlvid/__init__.py


def violations(root: Path) -> list[str]:
    """Every import under `root` that the rules above forbid, as "file:line: what is wrong"."""
    found = []
    every = modules(root)
    for name, path in every.items():
        where, here = path.relative_to(root).as_posix(), room(name, set(every))
        if here not in MAY_IMPORT:
            found.append(f"{where}:1: {here} has no place yet: give it a line in MAY_IMPORT")
            continue
        for line, target in imported(name, path):
            there = room(target, set(every))
            if there is not None and there not in (here, "rlvid") and there not in MAY_IMPORT[here]:
                found.append(f"{where}:{line}: {here} must not import {there}")
            if here in PURE and any(f"{target}.".startswith(f"{library}.") for library in NOT_IN_PURE):
                found.append(f"{where}:{line}: {here} is pure torch and must not import {target}")
            elif target.split(".")[0] == "deepspeed" and where != DEEPSPEED_HOME:
                found.append(f"{where}:{line}: deepspeed belongs in {DEEPSPEED_HOME} alone")
    return found


def loaded_by(*names: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter that imports `names`."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {module.split(".")[0] for module in done.stdout.splitlines()[-1].split()}


def test_imports_run_one_way() -> None:
    assert "rlvid" in modules(ROOT)
    assert violations(ROOT) == []


def test_importing_the_core_loads_no_ray_deepspeed_arrow_or_tensorboard() -> None:
    every = modules(ROOT)
    # __main__ modules are scripts: importing one would run it
    pure = [name for name in every if room(name, set(every)) in PURE and not name.endswith("__main__")]
    assert loaded_by(*pure) & {"ray", "deepspeed", "pyarrow", "tensorboard", "tensorboardX"} == set()


@pytest.mark.parametrize("name", ["rlvid", "rlvid.cli"])
def test_importing_the_package_and_its_command_is_cheap(name: str) -> None:
    assert (
        loaded_by(name) & {"torch", "ray", "diffusers", "transformers", "deepspeed", "pyarrow", "matplotlib"} == set()
    )


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("rlvid/models/bad.py", "import ray", "models is pure torch and must not import ray"),
        ("rlvid/reward/bad.py", "def f():\n    from pyarrow import parquet", "bad.py:2: reward is pure torch"),
        (
            "rlvid/shapes.py",
            "import importlib\nimportlib.import_module('deepspeed.comm')",
            "must not import deepspeed.comm",
        ),
        ("rlvid/config/__init__.py", "from torch.utils.tensorboard import SummaryWriter", "config is pure torch"),
        ("rlvid/config/__init__.py", "from torch.utils import tensorboard", "config is pure torch"),
        ("rlvid/toy/deep/bad.py", "import ray.data as data", "toy is pure torch"),
        ("rlvid/diffusion/bad.py", "import rlvid.reward.video", "diffusion must not import reward"),
        ("rlvid/reward/bad.py", "from rlvid import diffusion", "reward must not import diffusion"),
        ("rlvid/models/bad.py", "from ..algorithms import base", "models must not import algorithms"),
        ("rlvid/models/__init__.py", "from ..algorithms import base", "models must not import algorithms"),
        ("rlvid/models/base.py", "from rlvid.world import render", "models must not import world"),
        ("rlvid/algorithms/bad.py", "from rlvid.train.loop import run", "algorithms must not import train"),
        ("rlvid/train/bad.py", "if True:\n    from rlvid import cli", "train must not import cli"),
        ("rlvid/cli.py", "def main():\n    from jobs.submit import main", "cli must not import jobs"),
        ("rlvid/evaluate/bad.py", "import tuning", "evaluate must not import tuning"),
        ("rlvid/__init__.py", "from rlvid.models import base", "rlvid must not import models"),
        ("rlvid/train/loop.py", "import deepspeed", "deepspeed belongs in rlvid/train/engine.py alone"),
        ("jobs/submit.py", "from deepspeed.comm import barrier", "deepspeed belongs in rlvid/train/engine.py alone"),
        ("rlvid/attic.py", "", "attic has no place yet"),
    ],
)
def test_the_checker_finds_an_offence(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    _write(tmp_path, path, source)
    (found,) = violations(tmp_path)
    assert found.startswith(path)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rlvid/train/engine.py", "import deepspeed\nimport ray.train"),
        ("rlvid/algorithms/draft.py", "from rlvid.diffusion import chain\nfrom rlvid.reward.video import VideoReward"),
        ("rlvid/models/unet3d.py", "from .base import VideoModel\nfrom rlvid.shapes import check\nimport raylib"),
        (
            "rlvid/toy/world.py",
            "from rlvid import __version__\nfrom ..models import base\nfrom rlvid.reward import clip",
        ),
        ("rlvid/cli.py", "from rlvid.train import launch"),
        ("jobs/submit.py", "import ray\nfrom rlvid.train import launch\nfrom tuning import space"),
    ],
)
def test_the_checker_lets_the_rest_pass(tmp_path: Path, path: str, source: str) -> None:
    _write(tmp_path, path, source)
    assert violations(tmp_path) == []


def _write(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source, encoding="utf-8")
