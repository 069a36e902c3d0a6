"""The archive of samples: what comes back, resumed runs, full disks; no Ray."""

import io
import resource
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from archives import COMMON, add_chunk, make_samples
from PIL import Image

from rlvid.algorithms.base import Samples
from rlvid.data.archive import piece_of, read_archive
from rlvid.data.chunks import SCHEMA, ArchiveFolder, Part, part_paths, table_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def folder_of(run: Path) -> ArchiveFolder:
    return ArchiveFolder(str(run.parent), run.name)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "archive").iterdir() if path.name != ".staging")


def test_the_archive_comes_back(run: Path) -> None:
    samples = {(step, rank): make_samples(4 * step + 2 * rank) for step in range(3) for rank in range(2)}
    add_chunk(run, samples, files=4)
    table = read_archive(run / "archive")
    assert table.schema.equals(SCHEMA)
    assert table["serial"].to_pylist() == list(range(12))
    row = table.to_pylist()[7]
    kept = samples[1, 1]
    assert (row["step"], row["rank"], row["prompt"]) == (1, 1, "prompt 1")
    assert {name: row[name] for name in COMMON} == COMMON
    assert (row["reward"], row["held_out"], row["frame_indices"]) == (0.5, None, [0, 3, 6])
    assert row["scores"] == kept.scores_BS[1].tolist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in row["frames"]])
    want = (kept.frames_BSCHW[1].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels, want)
    held_out = table_of(COMMON, [piece_of(0, 0, make_samples(0), torch.tensor([0.25, 0.75]))])["held_out"]
    assert held_out.to_pylist() == [0.25, 0.75]


def test_files_are_few_and_say_their_steps(run: Path) -> None:
    assert add_chunk(run, {(step, rank): make_samples(0) for step in (0, 10, 20) for rank in range(8)}, files=2) == [
        "step-000000-to-000020-part-00.parquet",
        "step-000000-to-000020-part-01.parquet",
    ]
    assert add_chunk(run, {(30, 0): make_samples(0)}) == ["step-000030-to-000030-part-00.parquet"]
    assert Part.of("step-1234567-to-1234599-part-100.parquet") == Part(1234567, 1234599, 100)
    assert Part.of("step-000001-rank-000.parquet") is None
    groups = pq.ParquetFile(run / "archive" / "step-000030-to-000030-part-00.parquet").metadata.row_group(0)
    found = {groups.column(i).path_in_schema: groups.column(i).statistics for i in range(groups.num_columns)}
    assert (found["step"].min, found["step"].max) == (30, 30)
    assert found["frames.list.element"] is None


def test_duckdb_and_arrow_read_the_archive_without_rlvid_while_files_are_staged(run: Path) -> None:
    for step in range(3):
        add_chunk(run, {(step, 0): make_samples(2 * step)})
    folder_of(run).stage("test", table_of(COMMON, [piece_of(3, 0, make_samples(6))]))
    archive = run / "archive"
    found = duckdb.sql(
        f"select step, count(*), avg(reward), sum(len(frames)) from '{archive}/*.parquet' group by step order by step"
    ).fetchall()
    assert found == [(0, 2, 0.5, 6), (1, 2, 0.5, 6), (2, 2, 0.5, 6)]
    ((png,),) = duckdb.sql(f"select frames[2] from '{archive}/*.parquet' where serial = 3").fetchall()
    assert Image.open(io.BytesIO(png)).size == (16, 16)
    assert pq.read_table(archive).num_rows == 6


def test_a_resumed_run_deletes_what_it_makes_again(run: Path) -> None:
    folder = folder_of(run)
    folder.begin(0, "one")
    assert names(run) == []
    for first in (0, 2, 4):
        add_chunk(run, {(first + step, rank): make_samples(0) for step in range(2) for rank in range(2)}, files=2)
    late = folder.stage("one", table_of(COMMON, [piece_of(6, 0, make_samples(0))]))
    (run / "archive" / "notes.txt").touch()
    folder.begin(2, "two")
    left = [Part(0, 1, number).name for number in (0, 1)]
    assert [path.name for path in part_paths(run / "archive")] == left
    assert names(run)[0] == "notes.txt"
    with pytest.raises(OSError, match="could not be written"):  # of a process of the earlier start
        folder.commit("one", [late])
    with pytest.raises(OSError, match="could not be written"):
        folder.stage("one", table_of(COMMON, [piece_of(6, 0, make_samples(0))]))
    assert sorted(set(read_archive(run / "archive")["step"].to_pylist())) == [0, 1]
    folder.end()
    folder.end()
    assert len(list((run / "archive").iterdir())) == 3


def test_an_archive_of_an_earlier_version_is_read_and_resumed(run: Path) -> None:
    for step in range(4):
        (name,) = add_chunk(run, {(step, 0): make_samples(2 * step)})
        (run / "archive" / name).rename(run / "archive" / f"step-{step:06d}-rank-000.parquet")
    add_chunk(run, {(4, 0): make_samples(8)})
    assert read_archive(run / "archive", ["step", "serial"]).to_pylist() == [
        {"step": serial // 2, "serial": serial} for serial in range(10)
    ]
    folder_of(run).begin(2, "again")
    assert [path.name for path in part_paths(run / "archive")] == [f"step-00000{s}-rank-000.parquet" for s in (0, 1)]


def test_a_task_that_runs_twice_writes_one_file(run: Path) -> None:
    folder = folder_of(run)
    folder.begin(0, "one")
    table = table_of(COMMON, [piece_of(0, 0, make_samples(0))])
    assert folder.stage("one", table) == folder.stage("one", table)
    assert len(list((run / "archive" / ".staging" / "one").iterdir())) == 1


def test_a_full_disk_leaves_no_half_file(run: Path) -> None:
    folder = folder_of(run)
    folder.begin(0, "one")
    table = table_of(COMMON, [piece_of(1, 0, make_samples(2, size=128))])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a real write error, at 20 kB a file
    try:
        with pytest.raises(OSError, match=r"archive part .*000001-000\.parquet could not be written \(File too large"):
            folder.stage("one", table)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((run / "archive" / ".staging" / "one").iterdir())


def test_a_folder_that_cannot_be_made_is_named(run: Path) -> None:
    run.touch()
    with pytest.raises(OSError, match=r"run/archive could not be written .* choose a folder"):
        folder_of(run).begin(0, "one")


def test_bad_samples_and_foreign_files_are_named(run: Path) -> None:
    archive = run / "archive"
    with pytest.raises(ValueError, match="no parts"):
        read_archive(archive)
    samples = make_samples(0)
    with pytest.raises(ValueError, match=r"differ in length.*'serial': 1, 'prompt': 2"):
        piece_of(0, 0, Samples(**{**vars(samples), "serials": [0]}))
    add_chunk(run, {(0, 0): samples})
    with pytest.raises(ValueError, match="no column 'frame'; allowed: run, step"):
        read_archive(archive, ["frame"])
    foreign = archive / "step-000001-to-000001-part-00.parquet"
    pq.write_table(pa.table({"step": [1]}), foreign)
    with pytest.raises(ValueError, match=f"{foreign.name}: is not a part"):
        read_archive(archive)
    foreign.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=f"{foreign.name}: is not a part"):
        read_archive(archive)


def test_tasks_of_the_archive_start_without_torch() -> None:
    code = "import sys, rlvid.data.chunks; assert not {'torch', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
