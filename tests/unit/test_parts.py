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


def merge_all(folder: ArchiveFolder, size: int, rest: bool = True) -> None:
    while merge(folder, size, rest):
        pass


def test_chunks_that_all_checkpoints_have_behind_them_become_few_files(run: Path, folder: ArchiveFolder) -> None:
    before = read_archive(run / "archive")
    assert len(names(run)) == 12
    merge_all(folder, size_of(run, 100), rest=False)
    assert len(names(run)) == 12, "too little for a part"
    merge_all(folder, size_of(run, 100))
    assert not (run / "archive" / ".merging").exists()
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
    merge_all(folder, size, rest=False)
    assert names(run)[0] == "step-000000-to-000003-part-00.parquet", "the chunks that fill a part"
    large = [path.stat().st_size for path in part_paths(run / "archive")[:-4]]
    assert len(large) == 2
    assert size / 2 < max(large) < 2 * size
    assert read_archive(run / "archive").equals(before)
    again = names(run)
    merge_all(folder, size)
    assert names(run) == again, "what has been merged is left alone"


def test_a_chunk_of_many_files_is_merged_under_new_names(run: Path, folder: ArchiveFolder) -> None:
    for path in part_paths(run / "archive")[2:]:
        path.unlink()
    before = read_archive(run / "archive")
    merge_all(folder, 1 << 30)
    assert names(run) == ["step-000000-to-000001-part-02.parquet"]
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


@pytest.mark.parametrize("again", ["merge", "finish"])
@pytest.mark.parametrize("at", range(0, 16, 2))
def test_a_process_killed_at_any_change_loses_and_repeats_no_row(
    run: Path, folder: ArchiveFolder, at: int, again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One and a second process are killed; then a run starts, or merges on without a start."""
    before = read_archive(run / "archive")
    monkeypatch.setattr(parts, "ROW_GROUP_BYTES", 1)
    size = size_of(run, 5)  # two files of a chunk's group
    whole, root = folder.place
    for left in (at, at // 2):
        folder.__dict__["place"] = Dying(whole, left), root
        with suppress(KeyboardInterrupt):  # on a disk there are fewer changes
            merge_all(folder, size)
        assert read_archive(run / "archive").equals(before), "a reader finds each row once, before the next start"
    folder.__dict__["place"] = whole, root
    if again == "finish":
        finish(folder)
        assert not (run / "archive" / ".merging").exists()
        assert read_archive(run / "archive").equals(before)
    merge_all(folder, size)
    assert len(names(run)) < 8
    assert sorted(names(run)) == sorted(path.name for path in (run / "archive").glob("*.parquet"))
    assert read_archive(run / "archive").equals(before)


def test_files_that_another_process_has_deleted_cost_no_row(run: Path, folder: ArchiveFolder) -> None:
    """A machine that was cut off begins to merge, and its successor tidies up before it goes on."""
    before = read_archive(run / "archive")
    whole, root = folder.place

    class Late(Dying):
        def __getattr__(self, name: str) -> Any:
            if name == "move" and self.left:
                self.left = 0
                for path in (run / "archive" / ".merging").iterdir():
                    path.unlink()
            return getattr(self._store, name)

    folder.__dict__["place"] = Late(whole, 1), root
    with pytest.raises(OSError, match="merged part of the archive"):
        merge_all(folder, 1 << 30)
    folder.__dict__["place"] = whole, root
    assert read_archive(run / "archive").equals(before)


def test_a_damaged_journal_is_one_line(run: Path) -> None:
    (run / "archive" / ".merging").mkdir()
    (run / "archive" / ".merging" / "journal.json").write_text("{")
    with pytest.raises(OSError, match=r"merged parts, which .*journal.json names, could not be written"):
        finish(ArchiveFolder(str(run.parent), run.name))


def test_a_full_disk_leaves_the_small_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = ArchiveFolder(str(run.parent), run.name), read_archive(run / "archive")

    class Full:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "ParquetWriter", Full)
    with pytest.raises(OSError, match=r"merged part of the archive .* could not be written \(No space left on device"):
        merge(folder, 1 << 30, rest=True)
    assert list((run / "archive" / ".merging").iterdir()) == [], "nothing half-written fills the disk"
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
