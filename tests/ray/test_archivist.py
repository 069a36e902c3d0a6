"""The archive through Ray Data: rows, resumed runs, lost processes, storage that fails or is slow."""

import gc
import io
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from archives import COMMON, add_chunk, make_samples
from PIL import Image
from rich.console import Console

from rlvid.data.archive import piece_of, read_archive
from rlvid.data.chunks import ArchiveFolder
from rlvid.train.archivist import end_archivist


@pytest.fixture
def run(ray_cluster: Any, tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def archivist(run: Path) -> Any:
    from rlvid.train.archivist import Archivist

    actor = Archivist.remote(ArchiveFolder(str(run.parent), run.name))  # type: ignore[attr-defined]
    yield actor
    ray.kill(actor)


class Workers:
    """Two workers that hand over samples."""

    def __init__(self, archivist: Any, first_step: int = 0) -> None:
        self.archivist, node = archivist, ray.get_runtime_context().get_node_id()
        self.epoch, problem = ray.get(archivist.begin.remote(first_step, 2, [node], COMMON))
        assert problem is None
        self.calls: list[tuple[Any, Any]] = []

    def hand_over(self, step: int, rank: int, samples: Any) -> None:
        piece = piece_of(step, rank, samples)
        ref, size = ray.put(piece), piece["frames"].nbytes
        call = self.archivist.add.remote(self.epoch, step, rank, size, len(piece["serial"]), [ref])
        self.calls.append((call, ref))

    def commit(self, steps: list[int]) -> str | None:
        return ray.get(self.archivist.commit.remote(self.epoch, steps), timeout=120)

    def answers(self) -> list[str | None]:
        answers = ray.get([call for call, _ in self.calls], timeout=60)
        self.calls = []
        return answers


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "archive").glob("*.parquet"))


def test_rows_are_those_that_were_handed_over(run: Path, archivist: Any, tmp_path: Path) -> None:
    samples = {(step, rank): make_samples(4 * step + 2 * rank) for step in range(4) for rank in range(2)}
    workers = Workers(archivist)
    for step in (0, 1):
        for rank in (1, 0):
            workers.hand_over(step, rank, samples[step, rank])
    assert workers.commit([0, 1]) is None
    assert workers.answers() == [None] * 4
    for step in (2, 3):
        for rank in (0, 1):
            workers.hand_over(step, rank, samples[step, rank])
    assert workers.commit([2, 3]) is None
    assert names(run) == ["step-000000-to-000001-part-00.parquet", "step-000002-to-000003-part-00.parquet"]
    add_chunk(tmp_path / "plain", samples)
    assert read_archive(run / "archive").equals(read_archive(tmp_path / "plain" / "archive"))
    rows = ray.data.read_parquet(str(run / "archive")).take_all()
    assert sorted(row["serial"] for row in rows) == list(range(16))

    again = Workers(archivist, first_step=2)
    assert names(run) == ["step-000000-to-000001-part-00.parquet"]
    workers.hand_over(4, 0, samples[3, 0])  # of a worker of the earlier start
    assert "restarted" in str(workers.answers()[-1])
    for rank in (0, 1):
        again.hand_over(2, rank, samples[2, rank])
    assert again.commit([2]) is None
    assert read_archive(run / "archive", ["serial"])["serial"].to_pylist() == list(range(12))


def test_small_files_are_merged_once_all_checkpoints_are_newer(run: Path) -> None:
    from rlvid.train.archivist import Archivist

    folder = ArchiveFolder(str(run.parent), run.name)
    archivist = Archivist.remote(folder, "webp", size=1 << 20)  # type: ignore[attr-defined]
    workers = Workers(archivist)
    for step in range(4):
        for rank in (0, 1):
            workers.hand_over(step, rank, make_samples(4 * step + 2 * rank))
        assert workers.commit([step]) is None
        (run / f"step-{step + 1:06d}").mkdir()
        if step:
            (run / f"step-{step:06d}").rmdir()  # one is kept
    assert len(names(run)) == 4
    end_archivist(archivist, Console(file=io.StringIO()), whole=True)
    assert names(run) == ["step-000000-to-000003-part-00.parquet"]
    assert sorted(path.name for path in (run / "archive").iterdir()) == names(run)
    rows = read_archive(run / "archive", ["serial", "frames"]).to_pylist()
    assert [row["serial"] for row in rows] == list(range(16))
    assert {Image.open(io.BytesIO(frame)).format for row in rows for frame in row["frames"]} == {"WEBP"}


@pytest.mark.slow
def test_an_archivist_that_was_restarted_refuses_the_steps_it_has_lost(run: Path, archivist: Any) -> None:
    workers = Workers(archivist)
    ray.kill(archivist, no_restart=False)
    deadline = time.monotonic() + 60
    while True:
        try:
            workers.hand_over(0, 0, make_samples(0))
            (answer,) = workers.answers()
            break
        except ray.exceptions.RayActorError:
            workers.calls = []
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert "lost samples" in str(answer)
    assert "lost samples" in str(workers.commit([0]))
    again = Workers(archivist)
    for rank in (0, 1):
        again.hand_over(0, rank, make_samples(2 * rank))
    assert again.commit([0]) is None
    assert read_archive(run / "archive").num_rows == 4


def test_storage_that_vanishes_is_one_line(run: Path, archivist: Any) -> None:
    workers = Workers(archivist)
    (run / "archive" / ".staging" / workers.epoch).rmdir()
    for rank in (0, 1):
        workers.hand_over(0, rank, make_samples(2 * rank))
    problem = workers.commit([0])
    assert problem is not None
    assert problem.startswith("archive part ")
    assert "could not be written (No such file" in problem
    assert "\n" not in problem
    assert set(workers.answers()) == {problem}


@pytest.mark.slow
def test_pixels_leave_the_object_store(run: Path, archivist: Any) -> None:
    def used() -> float:
        total, free = ray.cluster_resources(), ray.available_resources()
        return float(total["object_store_memory"] - free.get("object_store_memory", 0.0))

    workers = Workers(archivist)
    for rank in (0, 1):
        workers.hand_over(0, rank, make_samples(2 * rank, size=1024))  # 19 MB each
    assert workers.commit([0]) is None
    workers.answers()
    gc.collect()
    deadline = time.monotonic() + 30
    while used() > 10e6:
        assert time.monotonic() < deadline, used()
        time.sleep(0.2)
