"""What the archivist writes and when, and when a worker waits for it; without a cluster."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from archives import make_samples

from rlvid.data.archiving import Piece, Target, groups_of
from rlvid.data.chunks import ArchiveFolder, Staged
from rlvid.train import archivist, handover
from rlvid.train.archivist import Epoch
from rlvid.train.handover import Handover

MB = 2**20
TARGET = Target(ArchiveFolder("/nowhere", "run"), "epoch", {}, (), 1)


def piece(step: int, rank: int, size: int = 1) -> Piece:
    return Piece(step, rank, size, 2, ())


class Storage:
    """Takes the place of Ray Data: a file a group; a test may hold it up or break it."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None

    def __call__(self, target: Any, pieces: list[Piece]) -> list[Staged]:
        assert self.open.wait(30)
        if self.error is not None:
            raise self.error
        self.batches.append(sorted((each.step, each.rank) for each in pieces))
        return [Staged(f"{group[0].step}", group[0].step, group[-1].step, 2) for group in groups_of(pieces)]


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    made = Storage()
    monkeypatch.setattr(archivist, "stage_pieces", made)
    return made


async def settled(until: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not until():
            await asyncio.sleep(0.01)


def test_files_hold_about_as_many_pixels_in_the_order_of_steps() -> None:
    groups = groups_of([piece(step, rank, 10 * MB) for rank in (1, 0) for step in (1, 0)] + [piece(2, 0, 99 * MB)])
    assert [[(each.step, each.rank) for each in group] for group in groups] == [
        [(0, 0), (0, 1), (1, 0)], [(1, 1)], [(2, 0)]
    ]  # fmt: skip


def test_little_waits_for_more_or_for_a_checkpoint(storage: Storage) -> None:
    async def run() -> None:
        epoch = Epoch(TARGET, world=2)
        adds = [asyncio.create_task(epoch.add(piece(step, rank))) for step in (0, 1) for rank in (0, 1)]
        await asyncio.sleep(0.1)
        assert storage.batches == []
        epoch.hurry()
        await asyncio.gather(*adds)
        assert storage.batches == [[(0, 0), (0, 1), (1, 0), (1, 1)]]
        chunk = asyncio.create_task(epoch.staged([0, 1, 2]))
        adds = [asyncio.create_task(epoch.add(piece(2, 1)))]
        await asyncio.sleep(0.1)
        assert not chunk.done(), "one worker's samples are not here yet"
        adds.append(asyncio.create_task(epoch.add(piece(2, 0))))
        files = await chunk
        await asyncio.gather(*adds)
        assert [(file.first, file.last) for file in files] == [(0, 1), (2, 2)]
        adds = [asyncio.create_task(epoch.add(piece(3, 0, 64 * MB)))]
        await asyncio.gather(*adds)
        assert storage.batches[-1] == [(3, 0)]
        adds = [asyncio.create_task(epoch.add(piece(step, 1))) for step in range(3, 259)]
        await asyncio.gather(*adds)  # many small ones, too: Ray lets no more than 1000 calls wait

    asyncio.run(run())


def test_an_error_ends_all_waiting(storage: Storage) -> None:
    async def run() -> None:
        epoch = Epoch(TARGET, world=1)
        storage.error = OSError("archive part x could not be written (no space)")
        add, chunk = asyncio.create_task(epoch.add(piece(0, 0))), asyncio.create_task(epoch.staged([0, 1]))
        await asyncio.sleep(0)
        epoch.hurry()
        await add
        assert await chunk == []
        assert epoch.error == "archive part x could not be written (no space)"
        await epoch.add(piece(1, 0))
        storage.error = None
        other = Epoch(TARGET, world=1)
        add = asyncio.create_task(other.add(piece(0, 0)))
        await asyncio.sleep(0.05)
        await other.end("the workers were restarted")
        await add
        assert (other.error, storage.batches) == ("the workers were restarted", [])

    asyncio.run(run())


class Actor:
    """An archivist whose calls end when a test says so."""

    def __init__(self) -> None:
        self.hurried, self.done = 0, set[int]()
        self.begin = SimpleNamespace(remote=lambda *_: ("epoch", None))
        self.add = SimpleNamespace(remote=lambda _, step, *__: step)
        self.hurry = SimpleNamespace(remote=self._hurry)

    def _hurry(self, _: str) -> None:
        self.hurried += 1


def test_a_step_waits_only_when_pixels_would_fill_the_object_store(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    actor, waited = Actor(), list[int]()
    alone = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Resources": {"object_store_memory": 4 * 10_000.0}}])
    monkeypatch.setattr(handover.distributed, "all_gather_object", lambda out, one: out.__setitem__(0, one))
    monkeypatch.setattr(handover.distributed, "broadcast_object_list", lambda _: None)
    monkeypatch.setattr(ray, "put", lambda piece: piece)
    monkeypatch.setattr(ray, "wait", lambda calls, timeout: ([call for call in calls if call in actor.done], []))

    def get(call: Any) -> Any:
        if isinstance(call, int):
            waited.append(call)
            return None if call < 5 else "archive part x could not be written"
        return call

    monkeypatch.setattr(ray, "get", get)
    hands = Handover(actor, None, 0, {})  # type: ignore[arg-type]
    samples = make_samples(0, count=1)  # 2304 bytes of pixels; 10,000 may wait
    for step in range(4):
        hands.write(step, samples)
    assert waited == []
    assert actor.hurried == 2, "from half of the bound on, the archivist waits for no more"
    assert "slower than training" not in caplog.text
    hands.write(4, samples)
    hands.write(5, samples)
    assert waited == [0, 1]
    assert caplog.text.count("slower than training") == 1
    actor.done = {2, 3, 4, 5}
    with pytest.raises(OSError, match="archive part x could not be written"):
        hands.write(6, samples)
