"""The archivist of a run: an actor that takes samples from the workers and has them written through Ray Data.

    worker --reference--> Archivist --a dataset a batch--> staged files
    worker 0 --commit before a checkpoint counts--> Archivist --moves the files--> a chunk of the archive

Objects die with the worker that made them. So a checkpoint counts only after the samples of its steps are on disk; and
each start of the workers is an epoch of its own, so that an archivist that was itself restarted, and has lost what it
was given, refuses the steps of the old epoch: the workers then start again from the last checkpoint.
"""

import asyncio
import gc
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from rlvid.config import RunConfig
from rlvid.data.archiving import Piece, Target, stage_pieces
from rlvid.data.chunks import WAY_OUT, ArchiveFolder, Form, Staged
from rlvid.data.parts import finish, merge
from rlvid.faults import one_line
from rlvid.storage import is_uri

_BATCH_BYTES = 64 * 2**20
"""Pixels that are worth a dataset; fewer wait for more, or until somebody waits for them."""
_BATCH_PIECES = 256
"""Pieces that are worth a dataset, however small: each waits in a call, and Ray lets 1000 calls of an actor run."""

_PATIENCE, _MERGING, _ENDING = 5, 60, 10
"""Seconds after which the console says that files are merged, after which a run ends without that, or with a fault."""
_LOST = "archive: the archivist was restarted and has lost samples; the workers must start again"

Key = tuple[int, int]
"""Step and rank."""


class Epoch:
    """What the workers of one start have handed over; all in the actor's event loop.

    Args:
        target: the place of its files.
        world: number of workers.
    """

    def __init__(self, target: Target, world: int) -> None:
        self.target, self.world = target, world
        self.error: str | None = None
        self._waiting: list[Piece] = []
        self._known, self._on_disk, self._committed = set[Key](), set[Key](), set[Key]()
        self._staged: list[Staged] = []
        self._expected = set[Key]()
        self._hurry = False
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()

    async def add(self, piece: Piece) -> None:
        """Takes a piece; returns once it is on disk, or ``error`` says why it is not."""
        key = piece.step, piece.rank
        self._waiting.append(piece)
        self._known.add(key)
        self._start()
        await self._until({key})

    def hurry(self) -> None:
        """Writes what waits, however little it is: a worker waits for room."""
        self._hurry = True
        self._start()

    async def staged(self, steps: Iterable[int]) -> list[Staged]:
        """Returns the files of all steps since the last call once they are on disk, or ``error`` says why not."""
        self._expected = {(step, rank) for step in steps for rank in range(self.world)}
        self._start()
        await self._until(self._expected)
        assert self.error or self._on_disk == self._expected, "pieces of other steps in a chunk"
        files = self._staged
        self._staged, self._expected, self._known = [], set(), set()
        self._committed, self._on_disk = self._on_disk, set()  # some `add` may not have looked yet
        return files

    async def end(self, why: str) -> None:
        """Ends all waiting with an error."""
        async with self._changed:
            self.error = self.error or why
            self._waiting = []
            self._changed.notify_all()

    async def _until(self, keys: set[Key]) -> None:
        async with self._changed:
            await self._changed.wait_for(
                lambda: self.error is not None or keys <= self._on_disk or keys <= self._committed
            )

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())

    def _due(self) -> bool:
        if self.error is not None or not self._waiting:
            return False
        complete = bool(self._expected) and self._expected <= self._known
        enough = sum(piece.bytes for piece in self._waiting) >= _BATCH_BYTES or len(self._waiting) >= _BATCH_PIECES
        return self._hurry or complete or enough

    async def _write(self) -> None:
        while self._due():
            batch, self._waiting, self._hurry = self._waiting, [], False
            keys = {(piece.step, piece.rank) for piece in batch}
            try:
                files = await asyncio.to_thread(stage_pieces, self.target, batch)
            except OSError as error:
                await self.end(error.strerror or str(error))
                return
            except Exception as error:  # of whatever kind, such as no progress for 300 s: workers wait for it
                await self.end(f"archive: samples could not be written ({one_line(error)}); {WAY_OUT}")
                return
            del batch
            gc.collect()  # Ray Data's plans are circles; the object store keeps pixels as long as one refers to them
            async with self._changed:
                self._staged += files
                self._on_disk |= keys
                self._changed.notify_all()


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class Archivist:
    """Writes the archive of a run. Methods return a line that says what failed, or None.

    Args:
        folder: of the archive.
        form: format of the pictures.
        size: bytes of the parts that small files are merged into; 0 merges none.
        progress: the actor ``rlvid.train.progress.ProgressActor``, which shows lines to the user.
    """

    def __init__(self, folder: ArchiveFolder, form: Form = "png", size: int = 0, progress: Any = None) -> None:
        self._folder, self._form, self._size, self._progress = folder, form, size, progress
        self._merging = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._epoch: Epoch | None = None
        self._name = ""
        self._moving = asyncio.Lock()

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]  # the workers may be there before the archivist, when a node was lost
    async def begin(
        self, first_step: int, world: int, nodes: list[str], common: dict[str, Any]
    ) -> tuple[str, str | None]:
        """Starts an epoch: deletes what was archived of its steps. Returns the epoch's name, and what failed.

        Args:
            first_step: of the workers that start.
            world: number of workers.
            nodes: ids of their nodes.
            common: values that all rows share.
        """
        if self._epoch is not None:
            await self._epoch.end("the workers were restarted")
        name = uuid4().hex[:8]
        async with self._merging, self._moving:
            try:
                await asyncio.to_thread(finish, self._folder)
                await asyncio.to_thread(self._folder.begin, first_step, name)
            except OSError as error:
                return name, error.strerror or str(error)
            target = Target(self._folder, name, common, tuple(sorted(set(nodes))), world, self._form)
            self._epoch, self._name = Epoch(target, world), name
        return name, None

    async def add(self, epoch: str, step: int, rank: int, size: int, rows: int, ref: list[Any]) -> str | None:
        """Takes samples; returns once they are on disk.

        Args:
            epoch: the name that ``begin`` returned.
            step: of the run.
            rank: of the worker.
            size: bytes of the pixels.
            rows: number of videos.
            ref: one reference to what ``rlvid.data.archive.piece_of`` returned, in a list, so that it stays one.
        """
        current = self._epoch
        if current is None or self._name != epoch:
            return _LOST
        await current.add(Piece(step, rank, size, rows, tuple(ref)))
        return current.error

    async def hurry(self, epoch: str) -> None:
        """Writes what waits, however little it is."""
        if self._epoch is not None and self._name == epoch:
            self._epoch.hurry()

    async def commit(self, epoch: str, steps: list[int]) -> str | None:
        """Makes a chunk of the steps since the last call; it is on disk under its names when the call returns."""
        current = self._epoch
        if current is None or self._name != epoch:
            return _LOST
        files = await current.staged(steps)
        async with self._moving:
            if current.error is not None or self._name != epoch:
                return current.error or _LOST
            try:
                await asyncio.to_thread(self._folder.commit, epoch, files)
            except OSError as error:
                await current.end(error.strerror or str(error))
        self._task = asyncio.create_task(self._merge())  # beside the steps that follow
        return current.error

    async def end(self, rest: bool) -> None:
        """Deletes the staging folder of a run that has ended; with ``rest``, merges what is left before."""
        if rest:
            await self._merge(rest)
        await asyncio.to_thread(self._folder.end)

    async def _merge(self, rest: bool = False) -> None:
        """Merges small files, a part at a time. A fault is no fault of the run, and the next commit tries again."""
        if not self._size or not self._name or (self._merging.locked() and not rest):
            return
        made = True
        while made:
            async with self._merging:  # workers that start anew wait for one part at most
                try:
                    made = bool(await asyncio.to_thread(merge, self._folder, self._size, rest))
                except OSError as error:
                    made = False
                    if self._progress is not None:
                        line = f"the archive's small files are not merged: {error.strerror or error}"
                        self._progress.note.remote(line, "merge")


def start_archivist(config: RunConfig, run: Path, progress: Any) -> Any:
    """Starts the archivist of a run on this process's node, which has the run's folder; None if it archives nothing."""
    if not config.output.archive_every:
        return None
    storage = config.output.storage if is_uri(config.output.storage) else str(run.parent)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    folder = ArchiveFolder(storage, run.name)
    size = int(config.output.archive_part_mb * 2**20)
    actor = Archivist.options(scheduling_strategy=here)  # type: ignore[attr-defined]
    return actor.remote(folder, config.output.archive_format, size, progress)


def end_archivist(archivist: Any, console: Console, whole: bool) -> None:
    """Ends the archivist of a run whose workers have ended; what is staged belongs to no checkpoint and is deleted.

    Args:
        archivist: None if the run archives nothing.
        console: says that files are merged, where that takes long.
        whole: whether training ended as it should; then the last small files are merged.
    """
    if archivist is None:
        return
    ended = archivist.end.remote(whole)
    with suppress(ray.exceptions.RayError, OSError):  # the next start does it too
        if whole and not ray.wait([ended], timeout=_PATIENCE)[0]:
            console.print("merging the archive's files", highlight=False)
        ray.wait([ended], timeout=_MERGING if whole else _ENDING)
    ray.kill(archivist)
