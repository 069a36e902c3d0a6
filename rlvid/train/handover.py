"""The worker's side of the archive: hands samples over by reference, and waits only where memory would fill."""

import logging
from collections import deque
from typing import Any

import ray
import ray.train
from torch import Tensor, distributed

from rlvid.algorithms.base import Samples
from rlvid.data.archive import piece_of
from rlvid.data.chunks import ArchiveFolder
from rlvid.data.parts import finish

log = logging.getLogger("rlvid.train")

WAITING_BYTES = 256 * 2**20
"""Pixels of a worker that may wait in the object store before ``write`` waits too; a piece alone may be larger."""
_SHARE = 4
"""The archive uses at most this part of a node's object store: 1 / 4."""


class Handover:
    """Hands a worker's samples to the run's archivist; every worker makes one at the same time.

    Args:
        archivist: the actor ``rlvid.train.archivist.Archivist``; None if the run archives nothing.
        folder: the archive.
        first_step: of this start; what was archived of it and later steps is deleted.
        common: values that all rows share.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, archivist: Any, folder: ArchiveFolder, first_step: int, common: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self._archivist, self._rank = archivist, context.get_world_rank()
        self._pending: deque[tuple[Any, Any, int]] = deque()  # the call; the pixels, which live as long; their bytes
        self._steps: list[int] = []
        self._held_up, self._bound = False, 0
        nodes: list[Any] = [None] * context.get_world_size()
        if archivist is not None:
            node = ray.get_runtime_context().get_node_id()
            self._bound = min(WAITING_BYTES, _object_store(node) // _SHARE // context.get_local_world_size())
            distributed.all_gather_object(nodes, node)
        answer: list[Any] = [None]
        if self._rank == 0:
            answer = [self._begin(folder, first_step, nodes, common)]
        distributed.broadcast_object_list(answer)  # nobody hands anything over before the archive is tidy
        self._epoch, problem = answer[0]
        _check(problem)

    def _begin(self, folder: ArchiveFolder, first_step: int, nodes: list[str], common: dict[str, Any]) -> Any:
        """Returns the name of the epoch, and what failed."""
        if self._archivist is not None:
            return ray.get(self._archivist.begin.remote(first_step, len(nodes), nodes, common))
        try:
            finish(folder)
            folder.begin(first_step, None)
        except OSError as error:
            return "", error.strerror or str(error)
        return "", None

    def write(self, step: int, samples: Samples, held_out_B: Tensor | None = None) -> None:
        """Hands samples over; waits only when storage is so far behind that pixels would fill the object store.

        Args:
            step: of the run, from 0.
            samples: frames_BSCHW about [0, 1] and their scores; may be changed or freed after the call.
            held_out_B: rewards that were not trained on, if there are any.

        Raises:
            OSError: earlier samples could not be written (the disk is full, say); parts before them are whole.
            ValueError: the parts of ``samples`` differ in length.
        """
        assert self._archivist is not None, "a run that archives has an archivist"
        piece = piece_of(step, self._rank, samples, held_out_B)
        size = piece["frames"].nbytes
        if self._waiting() + size > self._bound // 2:
            self._archivist.hurry.remote(self._epoch)
        while self._pending and (self._is_first_done() or self._waiting() + size > self._bound):
            if not self._held_up and not self._is_first_done():
                self._held_up = True
                log.warning("archive: storage is slower than training, whose steps wait for it")
            self._take_first()
        ref = ray.put(piece)
        rows = len(piece["serial"])
        self._pending.append((self._archivist.add.remote(self._epoch, step, self._rank, size, rows, [ref]), ref, size))
        self._steps.append(step)

    def commit(self) -> None:
        """Waits until all samples of this worker are on disk; worker 0 also makes a chunk of all workers' samples.

        Raises:
            OSError: samples could not be written.
        """
        steps, self._steps = self._steps, []
        if steps and self._rank == 0:
            _check(ray.get(self._archivist.commit.remote(self._epoch, steps)))
        while self._pending:
            self._take_first()

    def _is_first_done(self) -> bool:
        return bool(ray.wait([self._pending[0][0]], timeout=0)[0])

    def _take_first(self) -> None:
        _check(ray.get(self._pending.popleft()[0]))

    def _waiting(self) -> int:
        return sum(size for *_, size in self._pending)


def _check(problem: str | None) -> None:
    if problem is not None:
        raise OSError(problem)


def _object_store(node: str) -> int:
    """Returns the bytes of a node's object store."""
    found = next(each for each in ray.nodes() if each["NodeID"] == node)
    return int(found["Resources"].get("object_store_memory", WAITING_BYTES * _SHARE))
