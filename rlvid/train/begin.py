"""What Ray Train calls on each worker: the first samples are on their way while the worker imports and loads."""

from typing import Any

from rlvid.collection import collection_paused
from rlvid.data.feed import own_rows
from rlvid.train.job import Job


def train_worker(job: Job) -> dict[str, Any]:
    """Trains from the latest checkpoint of the run to its last step; returns the summary of ``loop.train``."""
    shares = own_rows()
    with collection_paused():  # libraries take seconds to import, as the processes of the feed do to start
        from rlvid.train.loop import train

    return train(job, shares)
