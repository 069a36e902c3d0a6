"""Checks of the machine: Python, packages, accelerator, memory, disk, and the storage of runs."""

import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pyarrow import fs

import rlvid
from rlvid.doctor.finding import Finding, finding
from rlvid.storage import home, is_uri, locate, run_uri

_ROOT = Path(rlvid.__file__).resolve().parents[1]
_GIB = 2**30
_REINSTALL = "make venv, or: pip install -c constraints.txt -e ."


def wanted(root: Path = _ROOT) -> tuple[str, list[Requirement]]:
    """Returns the allowed Python versions and rlvid's requirements, of the clone or of the package."""
    project = root / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        return table["requires-python"], [Requirement(text) for text in table["dependencies"]]
    about = metadata.metadata("rlvid")
    needed = [Requirement(text) for text in metadata.requires("rlvid") or []]
    return about["Requires-Python"], [each for each in needed if not (each.marker and "extra" in str(each.marker))]


def check_python() -> Iterator[Finding]:
    """Checks that rlvid supports this Python."""
    allowed, here = wanted()[0], platform.python_version()
    fits = SpecifierSet(allowed).contains(here)
    way = "make a new environment with another Python: make venv PYTHON=python3.11"
    yield finding("python", fits, f"{here} (allowed {allowed}), {sys.executable}", way)


def check_packages() -> Iterator[Finding]:
    """Checks that every package is installed and within bounds, and warns of versions that were not tested."""
    wrong, other, needed = [], [], wanted()[1]
    tested = pins()
    for each in needed:
        try:
            here = Version(metadata.version(each.name))
        except metadata.PackageNotFoundError:
            wrong.append(f"{each.name} is missing (needs {each.specifier})")
            continue
        pin = tested.get(_plain(each.name))
        if not each.specifier.contains(here, prereleases=True):
            wrong.append(f"{each.name} {here} (needs {each.specifier})")
        elif pin is not None and Version(pin).public != here.public:
            other.append(f"{each.name} {here} (tested {pin})")
    if wrong:
        yield Finding("packages", "error", ", ".join(wrong), _REINSTALL)
    if other:
        yield Finding("packages", "warning", f"not the tested versions: {', '.join(other)}", _REINSTALL)
    if not wrong and not other:
        yield Finding("packages", "ok", f"rlvid {rlvid.__version__}, {len(needed)} packages within bounds")


def pins() -> dict[str, str]:
    """Returns the pins of constraints.txt where rlvid runs from a clone; else none."""
    file = _ROOT / "constraints.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {_plain(name): pin for name, _, pin in (line.partition("==") for line in lines) if pin}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_accelerator() -> Iterator[Finding]:
    """Checks which devices torch can use; warns of a GPU that torch does not see."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = (number / _GIB for number in torch.cuda.mem_get_info(index))
            found = (
                f"{torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GiB free, CUDA {torch.version.cuda}"
            )
            way = "another process holds its memory (nvidia-smi), or it is small: rlvid plan CONFIG"
            yield finding("accelerator", free >= 8, found, way, "warning")
    elif Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi"):
        found = f"there is an NVIDIA driver, and torch {torch.__version__} sees no GPU"
        way = "install a torch for this driver's CUDA (nvidia-smi shows it), or unset CUDA_VISIBLE_DEVICES"
        yield Finding("accelerator", "warning", found, way)
    else:
        yield Finding("accelerator", "ok", f"no GPU; {os.cpu_count()} CPU cores, which do for the built-in model")


def check_memory() -> Iterator[Finding]:
    """Checks the free memory, and the shared memory for Ray's objects."""
    listed = Path("/proc/meminfo")
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", listed.read_text("utf-8"), re.M)) if listed.is_file() else {}
    if "MemAvailable" in found:
        free, total = (int(found[key]) * 1024 / _GIB for key in ("MemAvailable", "MemTotal"))
        way = "end other processes; a worker of the built-in model needs 1.5 GiB (rlvid plan CONFIG)"
        yield finding(
            "memory", free >= 4, f"{free:.1f} of {total:.1f} GiB free", way, "error" if free < 2 else "warning"
        )
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total / _GIB
        way = "start the container with --shm-size=8g: Ray's object store falls back to disk"
        yield finding("shared memory", shared >= 1, f"/dev/shm of {shared:.1f} GiB", way, "warning")


def check_storage(storage: str) -> Iterator[Finding]:
    """Checks that the storage of runs can be written and has room."""
    way = "choose a place that you may write to: output.storage=..., here --storage"
    try:
        with scratch(storage) as (_, store, root), store.open_output_stream(f"{root}/file") as file:
            file.write(b"x" * 2**20)
    except (OSError, ValueError, pa.ArrowException) as error:
        yield Finding("storage", "error", f"{storage} cannot be written ({reason(error)})", way)
        return
    if is_uri(storage):
        yield Finding("storage", "ok", f"{storage} can be written")
        return
    folder = home(storage)
    free = shutil.disk_usage(folder).free / _GIB
    way = "free some space, or choose another folder: output.storage=... (rlvid plan CONFIG says how much)"
    yield finding(
        "storage", free >= 5, f"{folder} can be written, {free:.1f} GiB free", way, "error" if free < 0.2 else "warning"
    )


def reason(error: Exception) -> str:
    """Returns the reason of a file system's error, without the address that pyarrow puts before it."""
    return " ".join(str(error).split()).rpartition("Detail: ")[2] or type(error).__name__


@contextmanager
def scratch(storage: str) -> Iterator[tuple[str, fs.FileSystem, str]]:
    """Yields a temporary folder below a folder or URI: its name for messages, its file system, its path there.

    Raises:
        ValueError: the URI is not one that can be reached.
        OSError: it cannot be made.
    """
    name = f".doctor-{uuid4().hex[:8]}"
    place = run_uri(storage, name) if is_uri(storage) else str(home(storage) / name)
    store, root = locate(place, ".")
    if store.type_name == "local":  # an object store has no folders
        store.create_dir(root)
    try:
        yield place, store, root
    finally:
        with suppress(OSError, pa.ArrowException):
            store.delete_dir(root)
