"""Writes the archive through Ray Data: tasks fetch samples from the object store, encode their frames and stage files.

    pieces of the workers --read tasks: fetch, encode--> a block a group --write: the same task--> a staged file

Read and write become one task, because both reserve no CPU and have the same limit: the pixels go through the object
store once, and the encoded frames never. They reserve no CPU since the workers may hold every core of a cluster, and a
task that asked for one would never start.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask, WriteResult

from rlvid.data.chunks import ArchiveFolder, Form, Staged, table_of
from rlvid.data.nodes import on_nodes

_GROUP_BYTES = 32 * 2**20
"""Pixels of a staged file, about."""
_NO_PROGRESS = 300
"""Seconds without a finished task after which writing fails."""


@dataclass(frozen=True)
class Piece:
    """The samples of one worker in one step, in the object store.

    Attributes:
        step: of the run.
        rank: of the worker.
        bytes: of its pixels.
        rows: number of its videos.
        ref: the one reference in a tuple, so that Ray does not fetch what it stands for with the piece.
    """

    step: int
    rank: int
    bytes: int
    rows: int
    ref: tuple[Any, ...]


@dataclass(frozen=True)
class Target:
    """The place where the files of one start of a run are staged.

    Attributes:
        folder: the archive.
        epoch: the start's staging folder.
        common: values that all rows share.
        nodes: ids of the nodes that can reach the folder.
        tasks: number of tasks that may run at the same time.
        form: format of the pictures.
    """

    folder: ArchiveFolder
    epoch: str
    common: dict[str, Any]
    nodes: tuple[str, ...]
    tasks: int
    form: Form = "png"


def groups_of(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Groups pieces into those of one file each, in the order of step and rank."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in sorted(pieces, key=lambda each: (each.step, each.rank)):
        if not groups or size + piece.bytes > _GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.bytes
    return groups


class PieceSource(Datasource):
    """Groups of pieces as a source of Ray Data: a task and a block each."""

    def __init__(self, groups: list[list[Piece]], common: dict[str, Any], form: Form) -> None:
        super().__init__()
        self.groups, self.common, self.form = groups, common, form

    def estimate_inmemory_data_size(self) -> int | None:
        """See ``Datasource``: unknown, or Ray Data would plan blocks of its own."""
        return None

    def get_name(self) -> str:
        """See ``Datasource``."""
        return "Samples"

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """See ``Datasource``: a task a group."""
        tasks = []
        for group in self.groups:
            rows = sum(piece.rows for piece in group)
            about = BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None)
            tasks.append(ReadTask(_encoder(group, self.common, self.form), about))
        return tasks


def _encoder(group: list[Piece], common: dict[str, Any], form: Form) -> Callable[[], Iterator[pa.Table]]:
    def encode_samples() -> Iterator[pa.Table]:  # Ray Data asks for its name
        yield table_of(common, ray.get([piece.ref[0] for piece in group]), form)

    return encode_samples


class StagedFiles(Datasink[list[Staged | str]]):
    """Stages a file a block.

    A failed write is a text among the results and no exception, which Ray Data would wrap in its own.
    """

    def __init__(self, folder: ArchiveFolder, epoch: str) -> None:
        self._folder, self._epoch = folder, epoch
        self.results: list[Staged | str] = []

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[Staged | str]:
        """See ``Datasink``."""
        results: list[Staged | str] = []
        for block in blocks:
            if block.num_rows:
                try:
                    results.append(self._folder.stage(self._epoch, block))
                except OSError as error:
                    results.append(error.strerror or str(error))
        return results

    def on_write_complete(self, write_result: WriteResult[list[Staged | str]]) -> None:
        """See ``Datasink``: keeps what the tasks returned."""
        self.results = [result for results in write_result.write_returns for result in results]


def stage_pieces(target: Target, pieces: list[Piece]) -> list[Staged]:
    """Encodes pieces and stages them as files; all are on disk when the call returns.

    Raises:
        OSError: a file could not be written.
        ray.exceptions.RayError: the pixels are lost, with the worker that made them.
    """
    groups = groups_of(pieces)
    source, tasks = PieceSource(groups, target.common, target.form), min(target.tasks, len(groups))
    sink = StagedFiles(target.folder, target.epoch)
    dataset = ray.data.read_datasource(source, override_num_blocks=len(groups), num_cpus=0, concurrency=tasks)
    dataset.context.target_max_block_size = None  # a block stays whole
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = _NO_PROGRESS
    if target.nodes:
        dataset.context.execution_options.label_selector = on_nodes(target.nodes)
    dataset.write_datasink(sink, ray_remote_args={"num_cpus": 0}, concurrency=tasks)
    source.groups = []  # the store keeps pixels as long as anybody holds them
    for result in sink.results:
        if isinstance(result, str):
            raise OSError(result)
    staged = [result for result in sink.results if isinstance(result, Staged)]
    rows, expected = sum(file.rows for file in staged), sum(piece.rows for piece in pieces)
    assert rows == expected, f"{rows} rows staged of {expected}"
    return staged
