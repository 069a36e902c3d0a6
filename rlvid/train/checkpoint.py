"""Checkpoints: what is trained, the engine's state, the method's state, and where the run stands.

Layout of a checkpoint folder, the same for any number of workers::

    adapter/adapter_model.safetensors, adapter_config.json    all that evaluation needs; PEFT loads it
    unet/diffusion_pytorch_model.safetensors, config.json     the same, of full fine-tuning; diffusers loads it
    engine/                                                   DeepSpeed's files, one set a worker
    algorithm.pt                                              the method's own state, when it has any
    state.json                                                ``State``: step, seed, config, versions, and size and
                                                              SHA-256 of every worker's files and of its own content

A folder is copied file by file, so a kill or a full disk may leave a part of one; disks, copies and people do the
rest. ``flaw`` finds it: by names and sizes, which costs nothing, and where the bytes are about to be used by their
checksums, which costs one reading.
"""

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, Strict, ValidationError
from safetensors import SafetensorError
from torch import distributed, nn

from rlvid.algorithms.base import Algorithm
from rlvid.config import RunConfig, parse_config
from rlvid.files import read_mapping, sha256
from rlvid.models.trained import holds_trained, save_trained, trained_state
from rlvid.train.engine import Engine, load_plain
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


class State(BaseModel):
    """What ``state.json`` of a checkpoint holds."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    step: NonNegativeInt
    """Batches behind the checkpoint."""
    workers: PositiveInt
    skipped: NonNegativeInt
    """Steps skipped as non-finite."""
    seconds: NonNegativeFloat
    """Of training."""
    videos: NonNegativeInt
    """Rewarded."""
    hardware: str
    seed: int
    fingerprint: str
    """Of the settings."""
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, Annotated[tuple[int, str], Strict(False)]]
    """Size in bytes and SHA-256 of every other file, by its path in the folder."""

    @property
    def settings(self) -> RunConfig:
        """The run's, as the checkpoint was made under.

        Raises:
            ValueError: they are of another version of rlvid.
        """
        return parse_config(self.config)


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
    if rank == 0:
        save_trained(state, denoiser, config.model, folder)
        if own := algorithm.state_dict():
            torch.save(own, folder / "algorithm.pt")
    files = _of_all_workers({str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()})
    if rank != 0:
        return
    packages = {name: version(name) for name in ("torch", "ray", "deepspeed", "diffusers", "peft")}
    description = {
        **standing,
        "hardware": hardware(next(denoiser.parameters()).device),
        "seed": config.seed,
        "fingerprint": config.fingerprint,
        "config": config.model_dump(mode="json"),
        "versions": packages,
        "files": files,
    }
    text = json.dumps({"sha256": _digest(description)} | description, indent=2)
    (folder / "state.json").write_text(text, encoding="utf-8")


def _of_all_workers(mine: Mapping[str, Path]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every worker's files; every worker must call it."""
    own = {name: (path.stat().st_size, sha256(path)) for name, path in mine.items()}
    if not distributed.is_initialized():
        return own
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return {name: found for each in everyone for name, found in each.items()}


def _digest(description: Mapping[str, Any]) -> str:
    """Computes the SHA-256 of a state file's content without that checksum; spaces and order do not count."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


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
            f"({' '.join(str(error).split())[:200]}); make room in {run}, earlier checkpoints are whole"
        ) from error  # fmt: skip


def load_checkpoint(folder: Path, config: RunConfig, engine: Engine, algorithm: Algorithm) -> State:
    """Restores a run; returns where it stands.

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


def read_state(folder: Path) -> State:
    """Reads ``state.json`` of a checkpoint.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / "state.json"
    found = read_mapping(path)
    if found.pop("sha256", None) != _digest(found):
        raise ValueError(f"{path} is damaged (its content is not that of its checksum)")
    try:
        return State.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})") from None


def flaw(
    folder: Path, *, resumable: bool = True, read: bool = False, sizes: Mapping[str, int] | None = None
) -> str | None:
    """Finds what is wrong with a checkpoint, in a few words; None if it is whole.

    Args:
        folder: the checkpoint's.
        resumable: look at all files; without it, at those that evaluation needs.
        read: compare the bytes of these files with their checksums, too, which takes as long as to read them.
        sizes: bytes of each file that the checkpoint has in a store of objects, where ``folder`` lacks some of them.
    """
    if not folder.is_dir():
        return "the folder is missing"
    try:
        files = _files(folder, resumable)
    except ValueError as error:
        return _within(folder, error)
    if not holds_trained(folder):
        return "the trained weights are missing"
    for name, (size, _) in files.items():
        has = sizes.get(name) if sizes is not None else _size(folder / name)
        if has != size:
            return f"{name} is missing" if has is None else f"{name} has {has:,} bytes instead of {size:,}"
    return wrong_bytes(folder, resumable=resumable) if read else None


def wrong_bytes(folder: Path, share: int = 0, shares: int = 1, *, resumable: bool = True) -> str | None:
    """Finds a file of a checkpoint whose bytes are not those of its checksum, in a few words.

    ``shares`` workers look at every ``shares``-th file each, from the ``share``-th on. Else as ``flaw``.
    """
    try:
        for name, (_, checksum) in sorted(_files(folder, resumable).items())[share::shares]:
            if sha256(folder / name) != checksum:
                return f"{name} has other bytes than were written"
    except (ValueError, OSError) as error:
        return _within(folder, error)
    return None


def _files(folder: Path, resumable: bool) -> dict[str, tuple[int, str]]:
    return {name: each for name, each in read_state(folder).files.items() if resumable or not _TO_RESUME.match(name)}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _within(folder: Path, error: Exception) -> str:
    return str(error).replace(f"{folder}/", "")


def step_of(name: str) -> int | None:
    """The step of a checkpoint by the name of its folder; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def find_checkpoints(run: Path, resumable: bool = True) -> list[Found]:
    """Finds the checkpoints of a run's folder that are whole by the names and sizes of their files, oldest first."""
    folders = [(folder, step_of(folder.name)) for folder in (run.iterdir() if run.is_dir() else [])]
    found = [Found(folder, s) for folder, s in folders if s is not None and flaw(folder, resumable=resumable) is None]
    return sorted(found, key=lambda each: each.step)
