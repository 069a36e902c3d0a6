"""Checkpoints of a run's folder: finds them, reads their state, and checks that they are complete.

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
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, Strict, ValidationError

from rlvid.config import RunConfig, parse_config
from rlvid.files import damaged, read_mapping, sha256
from rlvid.models.trained_files import holds_trained

_TO_RESUME = re.compile(r"engine/|algorithm\.pt$")
"""Files that only a resumed run needs."""
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint on disk: its folder and the number of batches behind it."""

    folder: Path
    step: int


class State(BaseModel):
    """The content of a checkpoint's ``state.json``."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    step: NonNegativeInt
    """Batches behind the checkpoint."""
    workers: PositiveInt
    skipped: NonNegativeInt
    """Steps skipped as non-finite."""
    seconds: NonNegativeFloat
    """Seconds of training."""
    videos: NonNegativeInt
    """Videos that were rewarded."""
    hardware: str
    seed: int
    fingerprint: str
    """Fingerprint of the settings."""
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
    """Returns the folder name of the checkpoint after ``step`` batches."""
    return f"step-{step:06d}"


def read_settings(run: Path) -> RunConfig:
    """Reads the settings of a run from its folder.

    Raises:
        ValueError: in one line: ``config.yaml`` cannot be read, is damaged, or is of another version of rlvid.
    """
    path = run / "config.yaml"
    data = read_mapping(path)
    try:
        return parse_config(data)
    except ValueError as error:
        raise ValueError(
            f"{path}: {' '.join(str(error).split())}; correct the file or, if the run is of another version of rlvid, "
            "train it again"
        ) from None


def latest_checkpoint(run: Path, resumable: bool = True) -> tuple[RunConfig, int] | None:
    """Returns the settings and step of a run's latest whole checkpoint, if it has one.

    Here and below, without ``resumable`` the folder mirrors an object store and lacks what only workers need.
    """
    found = find_checkpoints(run, resumable)
    return (read_state(found[-1].folder).settings, found[-1].step) if found else None


def state_digest(description: Mapping[str, Any]) -> str:
    """Computes the SHA-256 of a state file's content without that checksum; spaces and order do not count."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> State:
    """Reads ``state.json`` of a checkpoint.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / "state.json"
    found = read_mapping(path)
    if found.pop("sha256", None) != state_digest(found):
        raise damaged(path, "its content is not that of its checksum")
    try:
        return State.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def flaw(
    folder: Path, *, resumable: bool = True, read: bool = False, sizes: Mapping[str, int] | None = None
) -> str | None:
    """Finds what is wrong with a checkpoint, in a few words; None if it is whole.

    Args:
        folder: the checkpoint's.
        resumable: look at all files; without it, at those that evaluation needs.
        read: compare the bytes of these files with their checksums, too, which takes as long as to read them.
        sizes: bytes of each file that the checkpoint has in an object store, where ``folder`` lacks some of them.
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
    """Returns the step of a checkpoint by the name of its folder; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def find_checkpoints(run: Path, resumable: bool = True) -> list[CheckpointRef]:
    """Finds the checkpoints of a run's folder that are whole by the names and sizes of their files, oldest first."""
    return [each for each in checkpoint_folders(run) if flaw(each.folder, resumable=resumable) is None]


def checkpoint_folders(run: Path) -> list[CheckpointRef]:
    """Finds the folders that have the name of a checkpoint, whole or not, oldest first."""
    named = [(folder, step_of(folder.name)) for folder in (run.iterdir() if run.is_dir() else [])]
    found = [CheckpointRef(folder, step) for folder, step in named if step is not None]
    return sorted(found, key=lambda each: each.step)
