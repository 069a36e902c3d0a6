"""Feeds training through Ray Data: each worker's share of each global batch, in the run's order.

    clips --read tasks--> blocks of one row --streaming split--> worker r: the shares of steps k, k + 1, ...

A row is the whole share of one worker in one step, and a block holds one row. Ray Data then deals the blocks to the W
workers in turn: block j belongs to worker j mod W and to step j div W. That needs ``preserve_order``, under which the
split ignores where a block lies; and a split that need not be equal, since an equal one drops rows at the end. Each row
says its step and worker, and the worker compares them with its own.
"""

import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import Any

import pyarrow as pa
import ray.data
import ray.train
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from rlvid.data.batches import Shares
from rlvid.data.nodes import on_nodes

NAME = "clips"
"""Name of the feed among the datasets of Ray Train."""
_STEPS_IN_TASK = 16
"""Steps whose shares a task reads; Ray Data keeps a record of every task."""
_MAX_TASKS = 1000
_REST = 0.1
"""Seconds between two turns of Ray Data's loop while no worker waits."""
MAX_BYTES = 64 * 2**20
"""Bytes of shares that may wait in the object store; a share that a worker waits for is read all the same."""


class ShareSource(Datasource):
    """Shares as a source of Ray Data."""

    def __init__(self, shares: Shares) -> None:
        super().__init__()
        self.shares = shares

    def estimate_inmemory_data_size(self) -> int | None:
        """See ``Datasource``: unknown, or Ray Data would plan blocks of its own."""
        return None

    def get_name(self) -> str:
        """See ``Datasource``."""
        return "Clips"

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """See ``Datasource``: tasks of consecutive steps, in order."""
        steps, each = len(self.shares.positions_SB), self.steps_in_task
        tasks = []
        for start in range(0, max(1, steps), each):
            part = self.shares.part(start, start + each)
            rows = len(part.positions_SB) * part.workers
            about = BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None)
            tasks.append(ReadTask(_reader(part), about))
        return tasks

    @property
    def steps_in_task(self) -> int:
        """Steps whose shares a task reads."""
        return max(_STEPS_IN_TASK, -(-len(self.shares.positions_SB) // _MAX_TASKS))


class Pace(ExecutionCallback):
    """Lets Ray Data's loop rest while no worker waits for a share.

    The loop waits for tasks that run. Once reading pauses, because enough shares wait, it would turn without a rest and
    take a core from the workers.
    """

    def on_execution_step(self, executor: Any) -> None:
        """See ``ExecutionCallback``: called at each turn of the loop."""
        _, output = executor._output_node
        if output.num_waiting_consumers == 0:
            time.sleep(_REST)


def _reader(part: Shares) -> Callable[[], Iterator[pa.Table]]:
    def read_shares() -> Iterator[pa.Table]:  # Ray Data asks for its name
        return part()

    return read_shares


def feed(shares: Shares) -> ray.data.Dataset:
    """Makes the dataset of shares, block by block in their order; nothing is read yet.

    Its tasks reserve no CPU: they wait for storage most of the time, and where the workers hold every core of a cluster
    a task that asked for one would never start.
    """
    source = ShareSource(shares)
    tasks = len(source.get_read_tasks(-1))
    dataset = ray.data.read_datasource(source, override_num_blocks=tasks, num_cpus=0, concurrency=1)
    dataset.context.target_max_block_size = 1  # bytes: no two rows in a block
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = -1  # a step may take as long as it needs
    dataset.context.custom_execution_callback_classes = [Pace]
    return dataset


class InOrder(ray.train.DataConfig):
    """Deals all blocks of a feed to the workers in turn; the blocks are read on the workers' nodes.

    Args:
        max_bytes: of shares that may wait in the object store.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """See ``DataConfig``."""
        iterators = [dict[str, Any]() for _ in range(world_size)]
        for name, dataset in datasets.items():
            options = dataset.context.execution_options
            options.preserve_order = True
            if worker_node_ids:
                options.label_selector = on_nodes(worker_node_ids)
            options.resource_limits = options.resource_limits.copy(object_store_memory=self._max_bytes)
            for rank, split in enumerate(dataset.streaming_split(world_size, equal=False)):
                iterators[rank][name] = split
        return iterators


def own_rows() -> Generator[dict[str, Any]]:
    """Returns the rows of the Ray Train worker that calls this, see ``rows``."""
    return rows(ray.train.get_dataset_shard(NAME))


def rows(shard: Any) -> Generator[dict[str, Any]]:
    """Returns a worker's rows, which Ray Data fetches ahead, the first one from this call on.

    Args:
        shard: the worker's ``ray.data.DataIterator`` of the feed.

    Returns:
        ``step``, ``rank``, ``serials``, ``lost`` and ``fault`` of the worker's share of each step, and ``clips``, an
        Arrow stream.
    """
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    first = Future[pa.Table | None]()

    def begin() -> None:
        try:
            first.set_result(next(blocks, None))
        except Exception as error:  # of whatever kind, it is the worker's
            first.set_exception(error)

    Thread(target=begin, name="feed", daemon=True).start()  # no executor: it would keep the process until it is done
    return _rows(first, blocks)


def _rows(first: Future[pa.Table | None], blocks: Generator[pa.Table]) -> Generator[dict[str, Any]]:
    block = first.result()
    while block is not None:
        assert block.num_rows == 1, f"{block.num_rows} rows in a block of the feed"
        yield block.drop_columns("clips").to_pylist()[0] | {"clips": block["clips"][0].as_buffer()}
        block = next(blocks, None)
