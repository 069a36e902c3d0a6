"""Checkpoints: what is trained, the engine's state, the method's state, and where the run stands.

Layout of a checkpoint folder, the same for any number of workers::

    adapter/adapter_model.safetensors, adapter_config.json    all that evaluation needs; PEFT loads it
    unet/diffusion_pytorch_model.safetensors, config.json     the same, of full fine-tuning; diffusers loads it
    engine/                                                   DeepSpeed's files, one set a worker
    algorithm.pt                                              the method's own state, when it has any
    state.json                                                step, seed, config, versions, sizes of worker 0's files

A folder is copied file by file, so a kill or a full disk may leave a part of one: ``is_whole`` tells.
"""

import json
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rlvid.algorithms.base import Algorithm
from rlvid.config import RunConfig, parse_config
from rlvid.models.trained import holds_trained, save_trained, trained_state
from rlvid.train.engine import Engine
from rlvid.train.resume import carries_over

_SIGNS_OF_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error")
"""In what torch.save says, as a RuntimeError, when a file cannot be written."""
_TO_RESUME = re.compile(r"engine/|algorithm\.pt$")
"""Files that only a resumed run needs."""
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk: its folder and the number of batches behind it."""

    folder: Path
    step: int


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` batches."""
    return f"step-{step:06d}"


def save_checkpoint(
    folder: Path,
    rank: int,
    standing: dict[str, float],
    config: RunConfig,
    engine: Engine,
    algorithm: Algorithm,
    denoiser: nn.Module,
) -> None:
    """Writes this worker's part of a checkpoint; every worker must call it, each with a folder of its own.

    ``standing``: finished ``step``s, ``workers``, steps ``skipped`` as non-finite, ``seconds`` of training and
    ``videos`` rewarded.
    """
    (folder / "engine").mkdir(parents=True)
    engine.save(folder / "engine")
    with engine.gathered():
        state = trained_state(denoiser, config.model) if rank == 0 else {}
    if rank != 0:
        return
    save_trained(state, denoiser, config.model, folder)
    if own := algorithm.state_dict():
        torch.save(own, folder / "algorithm.pt")
    packages = {name: version(name) for name in ("torch", "ray", "deepspeed", "diffusers", "peft")}
    description = {
        **standing,
        "hardware": hardware(next(denoiser.parameters()).device),
        "seed": config.seed,
        "fingerprint": config.fingerprint,
        "config": config.model_dump(mode="json"),
        "versions": packages,
        "files": {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()},
    }
    (folder / "state.json").write_text(json.dumps(description, indent=2), encoding="utf-8")


def hardware(device: torch.device) -> str:
    """Name of the processor that a worker computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listed.read_text("utf-8"), re.M) if listed.is_file() else None
    threads = torch.get_num_threads()
    return f"CPU ({found[1] if found else platform.machine()}, {threads} thread{'s' * (threads > 1)})"


@contextmanager
def told_if_unwritable(step: int, run: Path) -> Iterator[None]:
    """Around the writing of a checkpoint after ``step``.

    Raises:
        OSError: it could not be written, whichever library says so, for torch and safetensors have their own errors.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _SIGNS_OF_TORCH):
            raise
        raise OSError(
            getattr(error, "errno", None), f"checkpoint after step {step} could not be written "
            f"({' '.join(str(error).split())[:200]}); make room in {run} and {tempfile.gettempdir()}, earlier "
            "checkpoints are whole"
        ) from error  # fmt: skip


def load_checkpoint(folder: Path, config: RunConfig, engine: Engine, algorithm: Algorithm) -> dict[str, float]:
    """Restores a run; returns the standing that ``save_checkpoint`` was given.

    Where only the weights carry over (see ``rlvid.train.resume.carries_over``), they must have been loaded before the
    engine was made, and the optimiser's state stays behind.

    Raises:
        ValueError: the checkpoint is of another config, or of a split of the work that cannot be carried over.
    """
    state = read_state(folder)
    if carries_over(parse_config(state["config"]), config) == "all":
        engine.load(folder / "engine")
    if (folder / "algorithm.pt").is_file():
        algorithm.load_state_dict(torch.load(folder / "algorithm.pt", weights_only=True))
    return {name: state[name] for name in ("step", "workers", "skipped", "seconds", "videos")}


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def is_whole(folder: Path, resumable: bool = True) -> bool:
    """Whether all of a checkpoint is there that worker 0 wrote, or without ``resumable`` all that evaluation needs."""
    try:
        files = read_state(folder).get("files", {})  # none in a checkpoint of an earlier version
        if not resumable:
            files = {name: size for name, size in files.items() if not _TO_RESUME.match(name)}
        return holds_trained(folder) and all((folder / name).stat().st_size == size for name, size in files.items())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return False


def find_checkpoints(run: Path, resumable: bool = True) -> list[Found]:
    """The whole checkpoints of a run's folder, oldest first; see ``is_whole``."""
    found = []
    for folder in run.iterdir() if run.is_dir() else []:
        match = _NAME.fullmatch(folder.name)
        if match and is_whole(folder, resumable):
            found.append(Found(folder, int(match[1])))
    return sorted(found, key=lambda each: each.step)
