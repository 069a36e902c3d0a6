"""Small files of the archive become parts of a size; a process that is killed meanwhile loses and repeats no row."""

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from archives import COMMON, add_chunk, make_samples
from PIL import Image
from pyarrow import fs

from rlvid.data import parts
from rlvid.data.archive import piece_of, read_archive
from rlvid.data.chunks import ArchiveFolder, image_bytes, part_paths, table_of
from rlvid.data.parts import finish, merge

STEPS, EACH = 12, 2  # steps a chunk


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of twelve steps by two workers, in chunks of two, with checkpoints after steps 8, 10 and 12."""
    made = tmp_path / "run"
    for first in range(0, STEPS, EACH):
        steps = range(first, first + EACH)
        add_chunk(made, {(s, rank): make_samples(4 * s + 2 * rank) for s in steps for rank in (0, 1)}, files=2)
    for step in (8, 10, 12):
        (made / f"step-{step:06d}").mkdir()
    return made


@pytest.fixture(params=["disk", "store"])
def folder(run: Path, request: pytest.FixtureRequest) -> ArchiveFolder:
    """The archive as on a disk, and as in a store, where files are not renamed into place."""
    made = ArchiveFolder(str(run.parent), run.name)
    if request.param == "store":
        store = fs.SubTreeFileSystem(str(run), fs.LocalFileSystem())
        made.__dict__.update(place=(store, "archive"), run_place=(store, "."))
    return made


def names(run: Path) -> list[str]:
    return [path.name for path in part_paths(run / "archive")]


def size_of(run: Path, files: float) -> int:
    sizes = [path.stat().st_size for path in part_paths(run / "archive")]
    return int(files * sum(sizes) / len(sizes))


def test_chunks_that_all_checkpoints_have_behind_them_become_few_files(run: Path, folder: ArchiveFolder) -> None:
    before = read_archive(run / "archive")
    assert len(names(run)) == 12
    merge(folder, size_of(run, 100))
    assert len(names(run)) == 12, "too little for a part"
    merge(folder, size_of(run, 100), rest=True)
    untouched = [f"step-{a:06d}-to-{a + 1:06d}-part-0{n}.parquet" for a in (8, 10) for n in (0, 1)]
    assert names(run) == ["step-000000-to-000007-part-00.parquet", *untouched]
    assert read_archive(run / "archive").equals(before)
    about = pq.read_metadata(run / "archive" / names(run)[0]).row_group(0).column(1)
    assert (about.path_in_schema, about.statistics.min, about.statistics.max) == ("step", 0, 7)
    folder.begin(8, "again")
    assert names(run) == ["step-000000-to-000007-part-00.parquet"], "a resumed run deletes whole files"


def test_parts_have_the_size_that_was_asked_for(run: Path, folder: ArchiveFolder, monkeypatch: Any) -> None:
    before = read_archive(run / "archive")
    monkeypatch.setattr(parts, "ROW_GROUP_BYTES", 1)
    size = size_of(run, 3)
    merge(folder, size)
    assert names(run)[0] == "step-000000-to-000003-part-00.parquet", "the chunks that fill a part"
    assert read_archive(run / "archive").equals(before)
    large = [path.stat().st_size for path in part_paths(run / "archive")[:-4]]
    assert max(large) < 2 * size
    count = len(names(run))
    merge(folder, size, rest=True)
    assert len(names(run)) <= count
    again = names(run)
    merge(folder, size, rest=True)
    assert names(run) == again, "what has been merged is left alone"
    assert read_archive(run / "archive").equals(before)


def test_without_a_checkpoint_nothing_is_merged(run: Path, folder: ArchiveFolder) -> None:
    for path in run.glob("step-*"):
        path.rmdir()
    assert merge(folder, 1, rest=True) == []


class Dying:
    """A file system that ends the process at its n-th change."""

    def __init__(self, store: Any, left: int) -> None:
        self._store, self.left = store, left

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("move", "delete_file", "create_dir", "delete_dir", "open_output_stream"):
            return found

        def change(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return found(*arguments)

        return change


@pytest.mark.parametrize("at", range(14))
def test_a_process_killed_at_any_change_loses_and_repeats_no_row(run: Path, folder: ArchiveFolder, at: int) -> None:
    before = read_archive(run / "archive")
    whole, root = folder.place
    folder.__dict__["place"] = Dying(whole, at), root
    with suppress(KeyboardInterrupt):  # on a disk there are fewer changes
        merge(folder, size_of(run, 100), rest=True)
    assert read_archive(run / "archive").equals(before), "a reader finds each row once, before the next start"
    folder.__dict__["place"] = whole, root
    finish(folder)
    assert not (run / "archive" / ".merging").exists()
    assert read_archive(run / "archive").equals(before)
    merge(folder, size_of(run, 100), rest=True)
    assert len(names(run)) == 5
    assert read_archive(run / "archive").equals(before)


def test_a_full_disk_leaves_the_small_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = ArchiveFolder(str(run.parent), run.name), read_archive(run / "archive")

    class Full:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "ParquetWriter", Full)
    with pytest.raises(OSError, match=r"merged part of the archive .* could not be written \(No space left on device"):
        merge(folder, 1 << 30, rest=True)
    assert read_archive(run / "archive").equals(before)


@pytest.mark.parametrize("form", ["png", "webp"])
def test_pictures_come_back_exactly(form: Any) -> None:
    samples = make_samples(0)
    piece = piece_of(3, 0, samples)
    rows = table_of(COMMON, [piece], form).to_pylist()
    for row, pixels in zip(rows, piece["frames"], strict=True):
        for data, expected in zip(row["frames"], pixels, strict=True):
            picture = Image.open(io.BytesIO(data))
            assert picture.format == form.upper()
            assert np.array_equal(np.asarray(picture.convert("RGB")), expected)
    assert image_bytes(piece["frames"][0][0], form) == rows[0]["frames"][0]
