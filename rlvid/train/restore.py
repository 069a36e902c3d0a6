"""The start of a worker: a folder for temporary files, and the checkpoint from which it resumes.

The workers themselves compare a checkpoint's bytes with their checksums, each a share of the files, just before they
read them: so the driver fetches nothing from a store, and no file is read twice over a network.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray.train
from torch import distributed

from rlvid.files import scratch
from rlvid.runs.checkpoints import flaw, wrong_bytes
from rlvid.storage import home


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from: its name in the run's folder, and its files on this machine."""

    name: str
    folder: Path


@contextmanager
def temporary_folder(storage: str | None, run: Path) -> Iterator[Path]:
    """Yields a folder for this worker's temporary files; those of killed workers are deleted first.

    Args:
        storage: URI of the store that the run is kept in, if it is kept in one.
        run: the run's folder.
    """
    place = (run if storage is None else home(storage)) / ".tmp"
    with scratch(place) as folder:
        if storage is not None:
            tempfile.tempdir = str(place)  # where Ray Train fetches a checkpoint to, once for all workers of a machine
        yield folder


@contextmanager
def resume_point() -> Iterator[ResumePoint | None]:
    """Yields the checkpoint that Ray Train resumes from, on this machine while the block runs; None if there is none.

    Every worker must take part.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield ResumePoint(Path(checkpoint.path).name, Path(folder))
        distributed.barrier()  # nobody leaves while another still reads


def damage(checkpoint: ResumePoint, rank: int, world: int) -> dict[str, str]:
    """Finds what is wrong with a checkpoint: its name -> a few words, or nothing; the same on every worker.

    Every worker must take part, and reads every ``world``-th file.
    """
    own = flaw(checkpoint.folder) or wrong_bytes(checkpoint.folder, rank, world)
    everyone: list[str | None] = [None] * world
    distributed.all_gather_object(everyone, own)
    why = next((each for each in everyone if each is not None), None)
    return {} if why is None else {checkpoint.name: why}
