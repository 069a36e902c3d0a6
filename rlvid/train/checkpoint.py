"""Writes checkpoints, and restores a worker from one; their layout is that of ``rlvid.runs.checkpoints``."""

import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed, nn

from rlvid.algorithms.base import Algorithm
from rlvid.config import RunConfig
from rlvid.files import sha256, write_error
from rlvid.models.trained import save_trained, trained_state
from rlvid.runs.checkpoints import State, read_state, state_digest
from rlvid.train.engine import Engine, load_plain
from rlvid.train.resume import carries_over

_SIGNS_OF_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error")
"""Words of the RuntimeError that torch.save raises when a file cannot be written."""


def save_checkpoint(
    folder: Path,
    rank: int,
    train_state: dict[str, float],
    config: RunConfig,
    engine: Engine,
    algorithm: Algorithm,
    denoiser: nn.Module,
) -> None:
    """Writes this worker's part of a checkpoint; every worker must call it, each with a folder of its own.

    ``train_state``: finished ``step``s, ``workers``, steps ``skipped`` as non-finite, ``seconds`` of training and
    ``videos`` rewarded.
    """
    (folder / "engine").mkdir(parents=True)
    engine.save(folder / "engine")
    with engine.gathered():
        state = trained_state(denoiser, config.model) if rank == 0 else {}
    if rank == 0:
        save_trained(state, denoiser, config.model, folder)
        if own := algorithm.state_dict():
            torch.save(own, folder / "algorithm.pt")
    files = _of_all_workers({str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()})
    if rank != 0:
        return
    packages = {name: version(name) for name in ("torch", "ray", "deepspeed", "diffusers", "peft")}
    description = {
        **train_state,
        "hardware": hardware(next(denoiser.parameters()).device),
        "seed": config.seed,
        "fingerprint": config.fingerprint,
        "config": config.model_dump(mode="json"),
        "versions": packages,
        "files": files,
    }
    text = json.dumps({"sha256": state_digest(description)} | description, indent=2)
    (folder / "state.json").write_text(text, encoding="utf-8")


def _of_all_workers(mine: Mapping[str, Path]) -> dict[str, tuple[int, str]]:
    """Returns the size and SHA-256 of every worker's files; every worker must call it."""
    own = {name: (path.stat().st_size, sha256(path)) for name, path in mine.items()}
    if not distributed.is_initialized():
        return own
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return {name: found for each in everyone for name, found in each.items()}


def hardware(device: torch.device) -> str:
    """Returns the name of the processor that a worker computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listed.read_text("utf-8"), re.M) if listed.is_file() else None
    threads = torch.get_num_threads()
    return f"CPU ({found[1] if found else platform.machine()}, {threads} thread{'s' * (threads > 1)})"


@contextmanager
def checkpoint_write_errors(step: int, run: Path) -> Iterator[None]:
    """Turns errors of the block, which writes the checkpoint after ``step``, into one message.

    Raises:
        OSError: the checkpoint could not be written; torch and safetensors raise other errors for this.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _SIGNS_OF_TORCH):
            raise
        way_out = f"make room in {run}, earlier checkpoints are whole"
        raise write_error(f"checkpoint after step {step}", error, way_out) from error


def load_checkpoint(folder: Path, config: RunConfig, engine: Engine, algorithm: Algorithm) -> State:
    """Restores a run; returns its step and counts.

    Where only the weights carry over (see ``rlvid.train.resume.carries_over``), they must have been loaded before the
    engine was made, and the optimiser's state stays behind.

    Raises:
        ValueError: the checkpoint is of another config, or of a split of the work that cannot be carried over.
    """
    state = read_state(folder)
    if carries_over(state.settings, config) == "all":
        engine.load(folder / "engine")
    if (folder / "algorithm.pt").is_file():
        algorithm.load_state_dict(load_plain(folder / "algorithm.pt"))
    return state
