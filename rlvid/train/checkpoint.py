"""Checkpoints: what is trained, the engine's state, the method's state, and where the run stands.

Layout of a checkpoint folder, the same for any number of workers::

    adapter/adapter_model.safetensors, adapter_config.json    all that evaluation needs; PEFT loads it
    unet/diffusion_pytorch_model.safetensors, config.json     the same, of full fine-tuning; diffusers loads it
    engine/                                                   DeepSpeed's files, one set a worker
    algorithm.pt                                              the method's own state, when it has any
    state.json                                                step, seed, config, versions
"""

import json
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from rlvid.algorithms.base import Algorithm
from rlvid.config import RunConfig
from rlvid.models.trained import holds_trained, save_trained, trained_state
from rlvid.train.engine import Engine

_NAME = re.compile(r"step-(\d{6,})$")


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


def load_checkpoint(
    folder: Path, config: RunConfig, engine: Engine, algorithm: Algorithm, workers: int
) -> dict[str, float]:
    """Restores a run; returns the standing that ``save_checkpoint`` was given.

    Raises:
        ValueError: the checkpoint is of another config or another number of workers.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["fingerprint"] != config.fingerprint:
        raise ValueError(f"checkpoint {folder} belongs to another config; give this run a name of its own (name=...)")
    if state["workers"] != workers:
        raise ValueError(
            f"checkpoint {folder} is of {state['workers']} workers and the run has {workers}; "
            f"set train.workers={state['workers']} or give the run a name of its own"
        )
    engine.load(folder / "engine")
    if (folder / "algorithm.pt").is_file():
        algorithm.load_state_dict(torch.load(folder / "algorithm.pt", weights_only=True))
    return {name: state[name] for name in ("step", "workers", "skipped", "seconds", "videos")}


def find_checkpoints(run: Path) -> list[Found]:
    """The complete checkpoints of a run's folder, oldest first."""
    found = []
    for folder in run.iterdir() if run.is_dir() else []:
        match = _NAME.search(folder.name)
        if match and (folder / "state.json").is_file() and holds_trained(folder):
            found.append(Found(folder, int(match[1])))
    return sorted(found, key=lambda each: each.step)
