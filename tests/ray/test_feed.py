"""The feed on Ray Data: every worker gets its share of every batch, in order, and little is read ahead."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rlvid.data.batches import Shares
from rlvid.data.clips import EncodedClips, digest
from rlvid.data.encoders import encode_items
from rlvid.data.feed import NAME, InOrder, Pace, feed, rows
from rlvid.data.shares import Share, tensors
from rlvid.data.sources import read_rendered
from rlvid.data.training_set import TrainingSet
from rlvid.data.writing import ClipWriter
from rlvid.toy.tiny import tiny_model

WORKERS, BATCH, FIRST, STEPS = 3, 4, 5, 40  # workers that do not divide the batch, and tasks that end within the steps


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven encoded clips of a tiny model."""
    out = tmp_path_factory.mktemp("feed") / "clips"
    items = [{"index": i, "source": f"clip {i}", "caption": ""} for i in range(7)]
    with ClipWriter(out, {}) as writer:
        writer.add(encode_items(tiny_model(frames=2, size=8), items, lambda item, model: read_rendered(0, item, model)))
        writer.finish({"fingerprint": digest({})}, [])
    return out


def shards(shares: Shares) -> list[Any]:
    """The workers' iterators, as Ray Train hands them out."""
    return [dealt[NAME] for dealt in InOrder().configure({NAME: feed(shares)}, shares.workers, None, None)]


def test_each_worker_gets_its_share_of_every_step_in_order(clips: Path, ray_cluster: Any) -> None:
    """The workers take turns at being slow."""
    positions = np.random.default_rng(0).integers(0, 7, (STEPS, BATCH))

    def consume(rank: int, shard: Any) -> int:
        read, encoded = rows(shard), EncodedClips.open(clips)  # a Parquet file is for one thread
        for step in range(FIRST, FIRST + STEPS):
            share = Share.of(next(read), step, rank)
            assert share.serials == [step * BATCH + place for place in range(rank, BATCH, WORKERS)]
            wanted = positions[step - FIRST, rank::WORKERS].tolist()
            captions, text_BLD, posterior = tensors(encoded.rows(wanted))
            assert share.prompts == captions
            assert (share.text_BLD == text_BLD).all()
            assert (share.posterior.mean == posterior.mean).all()
            assert (share.posterior.std == posterior.std).all()
            if step % WORKERS == rank:
                time.sleep(0.02)
        assert next(read, None) is None
        return rank

    dealt = shards(Shares(TrainingSet.of(clips), WORKERS, FIRST, positions))
    with ThreadPoolExecutor(WORKERS) as pool:
        assert list(pool.map(consume, range(WORKERS), dealt)) == list(range(WORKERS))


@dataclass(frozen=True)
class BigShares(Shares):
    """Shares of 4 MiB, which note that they were read."""

    notes: Path = Path()

    def __call__(self) -> Iterator[pa.Table]:
        """See ``Shares``."""
        for number, table in enumerate(super().__call__()):
            (self.notes / f"{self.first_step}-{number}").touch()
            yield table.append_column("padding", pa.array([bytes(4 * 2**20)]))


def test_a_feed_that_nobody_takes_from_stops_reading(clips: Path, tmp_path: Path, ray_cluster: Any) -> None:
    (shard,) = shards(BigShares(TrainingSet.of(clips), 1, 0, np.zeros((200, 1), dtype=np.int64), tmp_path))
    assert Pace in shard.get_context().execution_callback_classes
    read = rows(shard)
    assert next(read)["step"] == 0
    before = -1
    while before != (before := len(list(tmp_path.iterdir()))):
        time.sleep(2)
    assert before < 60, "more than 240 MiB are read ahead"
    assert [next(read)["step"] for _ in range(100)] == list(range(1, 101))
    read.close()  # else a thread of Ray Data waits for shares when the cluster ends
