"""The archive of samples: what comes back, resumed runs, full disks; no Ray."""

import io
import resource
from concurrent.futures import wait
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from rlvid.algorithms.base import Samples
from rlvid.data.archive import SCHEMA, ArchiveWriter, read_archive, trim

FPS = 8.0


def make_samples(first: int, count: int = 2, size: int = 16) -> Samples:
    return Samples(
        serials=list(range(first, first + count)),
        prompts=[f"prompt {i}" for i in range(count)],
        frames_BSCHW=torch.rand(count, 3, 3, size, size) * 1.2 - 0.1,
        frames_BS=torch.tensor([[0, 3, 6]] * count),
        scores_BS=torch.rand(count, 3),
        reward_B=torch.tensor([0.5] * count),
    )


def open_writer(folder: Path) -> ArchiveWriter:
    return ArchiveWriter(folder, "run", "instructvideo", "c0ffee", 7, FPS, model="builtin")


def test_the_archive_comes_back(tmp_path: Path) -> None:
    samples = {(step, rank): make_samples(4 * step + 2 * rank) for step in range(3) for rank in range(2)}
    with open_writer(tmp_path) as writer:
        for (step, rank), each in samples.items():
            writer.write(step, rank, each, held_out_B=torch.tensor([0.25, 0.75]) if step else None)
    table = read_archive(tmp_path)
    assert table.schema.equals(SCHEMA)
    assert table["serial"].to_pylist() == list(range(12))
    row = table.to_pylist()[7]
    kept = samples[1, 1]
    assert (row["run"], row["step"], row["rank"], row["prompt"]) == ("run", 1, 1, "prompt 1")
    assert (row["algorithm"], row["config_hash"], row["seed"], row["model"]) == (
        "instructvideo",
        "c0ffee",
        7,
        "builtin",
    )
    assert (row["reward"], row["held_out"], row["fps"], row["frame_indices"]) == (0.5, 0.75, FPS, [0, 3, 6])
    assert row["scores"] == kept.scores_BS[1].tolist()
    assert table["held_out"].to_pylist()[:4] == [None] * 4
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in row["frames"]])
    want = (kept.frames_BSCHW[1].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels, want)
    assert min(p.name for p in tmp_path.iterdir()) == "step-000000-rank-000.parquet"


def test_duckdb_and_arrow_read_the_archive_without_rlvid(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for step in range(3):
            writer.write(step, 0, make_samples(2 * step))
    found = duckdb.sql(
        f"select step, count(*), avg(reward), sum(len(frames)) from '{tmp_path}/*.parquet' group by step order by step"
    ).fetchall()
    assert found == [(0, 2, 0.5, 6), (1, 2, 0.5, 6), (2, 2, 0.5, 6)]
    ((png,),) = duckdb.sql(f"select frames[2] from '{tmp_path}/*.parquet' where serial = 3").fetchall()
    assert Image.open(io.BytesIO(png)).size == (16, 16)
    assert pq.read_table(tmp_path).num_rows == 6


def test_a_resumed_run_overwrites_and_trims(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    assert trim(folder, 0) == 0
    with open_writer(folder) as writer:
        for step in range(4):
            for rank in range(2):
                writer.write(step, rank, make_samples(0))
    with open_writer(folder) as writer:
        writer.write(3, 1, make_samples(90))
    assert read_archive(folder).num_rows == 16
    assert read_archive(folder, ["serial", "step"]).to_pylist()[-1] == {"serial": 91, "step": 3}
    (folder / ".step-000001-rank-000.parquet.12.tmp").touch()  # of a killed process
    assert trim(folder, 2) == 5
    assert sorted(set(read_archive(folder)["step"].to_pylist())) == [0, 1]
    assert len(list(folder.iterdir())) == 4


def test_a_full_disk_is_told_once_and_loses_nothing_else(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = open_writer(tmp_path)
    writer.write(0, 0, make_samples(0))
    writer._pending[0][0].result()  # on disk, before the disk is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a real write error, at 20 kB a file
    try:
        writer.write(1, 0, make_samples(2, size=128))
        wait([part for part, _ in writer._pending])
        with pytest.raises(OSError, match=r"step-000001-rank-000\.parquet could not be written \(File too large\)"):
            writer.write(2, 0, make_samples(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write(3, 0, make_samples(6))
    writer.close()
    writer.close()
    assert read_archive(tmp_path)["step"].to_pylist() == [0, 0, 3, 3]
    assert len(list(tmp_path.iterdir())) == 2  # no half-written part
    with pytest.raises(ValueError, match="closed"):
        writer.write(4, 0, make_samples(8))


def test_a_folder_that_vanishes_is_told_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    writer = open_writer(folder)
    folder.rmdir()
    folder.touch()
    writer.write(0, 0, make_samples(0))
    with pytest.raises(OSError, match="Not a directory"):
        writer.close()
    with pytest.raises(ValueError, match="cannot be made"):
        open_writer(folder / "below")


def test_bad_samples_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parts"):
        read_archive(tmp_path)
    samples = make_samples(0)
    with open_writer(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"differ in length.*'serial': 1, 'prompt': 2"):
            writer.write(0, 0, Samples(**{**vars(samples), "serials": [0]}))
        writer.write(0, 0, samples)
    with pytest.raises(ValueError, match="no column 'frame'; allowed: run, step"):
        read_archive(tmp_path, ["frame"])
    pq.write_table(pa.table({"step": [1]}), tmp_path / "step-000001-rank-000.parquet")
    with pytest.raises(ValueError, match=r"step-000001-rank-000\.parquet: is not a part"):
        read_archive(tmp_path)
    (tmp_path / "step-000001-rank-000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"step-000001-rank-000\.parquet: is not a part"):
        read_archive(tmp_path)
