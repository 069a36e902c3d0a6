"""Files and folders that a kill leaves no half of, and Parquet files that are data alone."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlvid.data.parquet import open_parquet
from rlvid.files import atomic_folder, held, read_mapping, scratch

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def another_process(call: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process inside ``call``'s block, where it has written a file; killed at the end at the latest."""
    code = (
        "import sys, time; from pathlib import Path; from rlvid.files import *\n"
        f"with {call} as made:\n    (made / 'big').write_text('0' * 1000); print(made, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, env=os.environ, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_what_a_killed_process_left_is_deleted_and_what_another_one_uses_is_not(tmp_path: Path) -> None:
    with another_process("scratch(Path(sys.argv[1]))", tmp_path) as other:
        with scratch(tmp_path) as mine:
            (mine / "small").touch()
            assert files(tmp_path) == ["big", "small"]
        assert files(tmp_path) == ["big"]
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert files(tmp_path) == ["big"]
        with scratch(tmp_path):
            assert files(tmp_path) == []


def test_a_file_that_a_killed_process_left_half_written_is_deleted_by_the_next_that_holds_the_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "guard").mkdir()
    (tmp_path / "note.txt").write_text("whole")
    (tmp_path / ".mine").touch()
    code = (
        "import os, signal, sys; from pathlib import Path; from rlvid.files import write_atomic\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(Path(sys.argv[1]), b'half')"
    )
    for path in (tmp_path / "note.txt", tmp_path / "guard" / "stop"):
        subprocess.run([sys.executable, "-c", code, str(path)], check=False, cwd=ROOT)
    assert len(files(tmp_path)) == 4, "nothing was left, so nothing is shown"
    with held(tmp_path / ".lock", "busy", tmp_path, tmp_path / "guard", tmp_path / "missing"):
        assert files(tmp_path) == [".mine", "note.txt"]
        assert (tmp_path / "note.txt").read_text() == "whole"


def test_a_lock_tells_who_holds_it(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with held(lock, "another process has it; wait"):
        for patience in (0.0, 0.2):
            mine = rf"^another process \(process {os.getpid()} on .+\) has it; wait$"
            with pytest.raises(ValueError, match=mine), held(lock, "another process has it; wait", patience=patience):
                pass
    with held(lock, "another process has it; wait"):
        pass


def test_a_folder_is_replaced_at_once_and_a_killed_writer_leaves_nothing_for_ever(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as part:
        (part / "old").touch()
    assert files(out) == ["old"]
    with another_process("atomic_folder(Path(sys.argv[1]))", out) as other:
        with pytest.raises(ValueError, match=r"another process .*writes"), atomic_folder(out):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert files(out) == ["old"]
    with pytest.raises(RuntimeError), atomic_folder(out) as part:
        raise RuntimeError
    assert files(tmp_path) == ["old"]
    out.replace(tmp_path / ".out.old")  # killed between the two renames
    with pytest.raises(RuntimeError), atomic_folder(out):
        raise RuntimeError
    assert files(out) == ["old"]
    with atomic_folder(out) as part:
        (part / "new").touch()
    assert files(tmp_path) == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mapping_that_cannot_be_read_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for content in (b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.json is damaged") as error:
            read_mapping(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        read_mapping(tmp_path)


class Code:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch should-not-be-here",)


@pytest.mark.parametrize("nested", [False, True])
def test_a_column_of_python_objects_is_refused_and_never_unpickled(
    tmp_path: Path, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data  # noqa: F401  # it is what teaches pyarrow to unpickle
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    monkeypatch.chdir(tmp_path)
    kind: pa.DataType = ArrowPythonObjectType()
    column: pa.Array = pa.ExtensionArray.from_storage(kind, pa.array([pickle.dumps(Code())], pa.large_binary()))
    if nested:
        column = pa.StructArray.from_arrays([column], ["inner"])
    pq.write_table(pa.table({"prompt": column}), "poisoned.parquet")
    with pytest.raises(ValueError, match=r"poisoned\.parquet: column 'prompt' is of the type ray\.data\.arrow_pickled"):
        open_parquet("poisoned.parquet")
    assert not Path("should-not-be-here").exists()
    pq.write_table(pa.table({"prompt": ["a dog"]}), "plain.parquet")
    assert open_parquet("plain.parquet").read().to_pylist() == [{"prompt": "a dog"}]
