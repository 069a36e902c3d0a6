"""Writes a folder of encoded clips. The folder appears atomically, and an interrupted encoding is resumed.

Until it is complete, everything lies beside it, in ``FOLDER.unfinished``:

=========================  =========================================================================
file                       content
=========================  =========================================================================
``plan.json``              what the clips are made with: only the same clips may be added
``rows-000000012.parquet`` encoded clips, of which the first has index 12, that are in no part yet
``skipped-000000012.json`` clips that could not be read, and why
``part-00000.parquet``     the first 256 clips, as they will stay; and so on
``.lock``                  held by the process that writes
=========================  =========================================================================

Every file is written atomically, so each file that is there is complete.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlvid.data.clips import digest, read_meta
from rlvid.data.find import Skipped
from rlvid.data.parquet import open_parquet
from rlvid.data.row_files import keep_rows, make_part
from rlvid.files import damaged, held, write_atomic

_ROWS_IN_PART = 256
PartMaker = Callable[[Sequence[Path], Sequence[int], Path], None]
"""Makes a part, see ``rlvid.data.row_files.make_part``."""
_VISIBLE = 10.0
"""Seconds within which a shared file system shows what another machine wrote."""


def _parts(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Returns name, rows and bytes of each part."""
    return [(path.name, pq.read_metadata(path).num_rows, path.stat().st_size) for path in paths]


def is_reusable(out: Path, made_with: dict[str, Any]) -> bool:
    """Returns whether ``out`` holds just these clips already; False when they can be written there.

    Raises:
        ValueError: ``out`` holds other clips, or something that is not rlvid's to delete.
    """
    meta = read_meta(out)
    if meta is not None:
        if meta["fingerprint"] == digest(made_with):
            return True
        changes = _changes(meta.get("made_with", {}), made_with)
        raise ValueError(f"{out}: holds clips encoded otherwise ({changes}); delete it or name another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a folder to be made")
    foreign = [path.name for path in out.glob("*") if not path.match("part-*.parquet") and path.stem != "report"]
    if foreign:
        raise ValueError(f"{out}: is no folder of encoded clips (it has {foreign[0]}); name a new or an empty one")
    return False


def unfinished(out: Path) -> Path:
    """Returns the folder of the clips until ``out`` is complete."""
    return out.with_name(f"{out.name}.unfinished")


class ClipWriter:
    """Writes encoded clips in any order; a clip survives the process once ``add`` has returned.

    Args:
        out: the folder to be made; one that ``is_reusable`` found to be incomplete is replaced.
        made_with: what the clips are made with. Resumes an unfinished encoding of the same clips.
        maker: makes the parts; may do so in another process.

    Attributes:
        done: indices of the clips that need not be encoded any more, the unreadable ones among them.

    Raises:
        ValueError: the place cannot be written to, holds an unfinished encoding of other clips or anything else, or
            another process is writing.
    """

    def __init__(self, out: Path, made_with: dict[str, Any], maker: PartMaker = make_part) -> None:
        self.out, self.work, self._made_with, self._maker = out, unfinished(out), made_with, maker
        with ExitStack() as stack:
            try:
                self.work.mkdir(parents=True, exist_ok=True)
                otherwise = f"{out}: another process is encoding into it; wait for it or name another"
                stack.enter_context(held(self.work / ".lock", otherwise, self.work))
            except OSError as error:
                raise ValueError(
                    f"{out}: cannot be written ({error.strerror}: {error.filename}); name another one"
                ) from error
            self._check_plan()
            self._read()
            self._held = stack.pop_all()

    def __enter__(self) -> "ClipWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def add(self, table: pa.Table) -> int:
        """Keeps rows of schema ``ROWS``; returns the number of clips among them."""
        return self.note(keep_rows(self.work, table))

    def note(self, kept: pa.Table) -> int:
        """Takes note of rows that another process has kept, by ``keep_rows``; returns the number of clips among them.

        Raises:
            ValueError: this machine does not see their file.
        """
        good = kept.filter(kept["error"].is_null())
        bad = kept.filter(kept["error"].is_valid())
        for name in kept["file"].unique().to_pylist():
            self._see(self.work / name)
        self._note_skipped(bad.drop_columns("file").to_pylist())
        for name in good["file"].unique().to_pylist():
            self._note_rows(self.work / name, good.filter(pc.equal(good["file"], name))["index"].to_pylist())
        self._make_parts(last=False)
        return good.num_rows

    def _see(self, path: Path) -> None:
        until = time.monotonic() + _VISIBLE
        while not path.is_file():
            if time.monotonic() > until:
                raise ValueError(
                    f"{self.out}: this machine does not see what the others write there; choose a folder that all "
                    "nodes mount (NFS, EFS, FSx)"
                )
            time.sleep(0.1)

    def finish(self, meta: dict[str, Any], skipped: list[Skipped], notes: list[str] | None = None) -> int:
        """Makes the folder, out of all that was added.

        Args:
            meta: goes into ``meta.json`` beside shapes and the number of clips; has ``fingerprint``.
            skipped: goes into the report, before the clips that could not be read.
            notes: lines that end the report.

        Returns:
            How many clips the folder holds.

        Raises:
            ValueError: none of the clips can be read.
        """
        self._make_parts(last=True)
        failed = [self._failed[index] for index in sorted(self._failed)]
        if not self._parts:
            shutil.rmtree(self.work)
            why = "; ".join(map(str, failed[:3]))
            raise ValueError(f"{self.out}: not written, for none of the {len(failed)} clips can be read: {why}")
        count = sum(pq.read_metadata(path).num_rows for path in self._parts)
        first = open_parquet(self._parts[0]).read_row_group(0, columns=["latent_shape", "text_shape"])
        _write_report(self.work, count, skipped + failed, notes or [])
        meta = meta | {"made_with": self._made_with} | first.to_pylist()[0]
        meta |= {"clips": count, "parts": _parts(self._parts)}
        write_atomic(self.work / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
        if is_reusable(self.out, self._made_with):  # another process has made it meanwhile
            shutil.rmtree(self.work)
            return count
        if self.out.is_dir():
            shutil.rmtree(self.out)  # empty or incomplete, as is_reusable has seen
        os.rename(self.work, self.out)
        for path in [
            *self.out.glob("skipped-*.json"),
            *self.out.glob("rows-*"),
            self.out / "plan.json",
            self.out / ".lock",
        ]:
            path.unlink()
        return count

    def _check_plan(self) -> None:
        plan = self.work / "plan.json"
        if plan.is_file():
            there = _read_kept(plan, lambda found: isinstance(found, dict))
            if digest(there) != digest(self._made_with):
                raise ValueError(
                    f"{self.work}: holds an unfinished encoding of other clips ({_changes(there, self._made_with)}); "
                    f"finish it with the settings it was begun with, delete it, or name another folder"
                )
        foreign = [p.name for p in self.work.glob("*") if not (plan.is_file() or p.name == ".lock")]
        if foreign:
            raise ValueError(f"{self.work}: is in the way (it has {foreign[0]}); move it or name another folder")
        write_atomic(plan, json.dumps(self._made_with).encode())

    def _read(self) -> None:
        self.done: set[int] = set()
        self._failed: dict[int, Skipped] = {}
        self._waiting: dict[int, Path] = {}  # clips that are in no part yet, and where they are
        self._parts = sorted(self.work.glob("part-*.parquet"))
        self._border = 0  # all clips below it are done
        for path in self._parts:
            self.done.update(_indices(path))
        for path in sorted(self.work.glob("skipped-*.json")):
            self._note_skipped(_read_kept(path, lambda found: _are_rows(found, index=int, source=str, error=str)))
        for path in sorted(self.work.glob("rows-*.parquet")):
            left = [index for index in _indices(path) if index not in self.done]
            self._note_rows(path, left)
            if not left:
                path.unlink()

    def _note_skipped(self, rows: list[dict[str, Any]]) -> None:
        self._failed |= {row["index"]: Skipped(Path(row["source"]), row["error"]) for row in rows}
        self.done.update(row["index"] for row in rows)

    def _note_rows(self, path: Path, indices: list[int]) -> None:
        self._waiting |= dict.fromkeys((index for index in indices if index not in self.done), path)
        self.done.update(indices)

    def _make_parts(self, last: bool) -> None:
        """Moves clips into parts, in order; short of the last part, only where no clip before them is missing."""
        while self._border in self.done:
            self._border += 1
        ready = sorted(index for index in self._waiting if last or index < self._border)
        while len(ready) >= _ROWS_IN_PART or (last and ready):
            self._make_part(ready[:_ROWS_IN_PART])
            ready = ready[_ROWS_IN_PART:]

    def _make_part(self, indices: list[int]) -> None:
        files = sorted({self._waiting[index] for index in indices})
        path = self.work / f"part-{len(self._parts):05d}.parquet"
        self._maker(files, indices, path)
        self._parts.append(path)
        for index in indices:
            del self._waiting[index]
        for file in set(files) - set(self._waiting.values()):
            file.unlink()


def read_report(folder: Path) -> tuple[int, list[Skipped]]:
    """Returns the number of clips, and the files that were skipped."""
    report = _read_kept(
        folder / "report.json",
        lambda found: isinstance(found["clips"], int) and _are_rows(found["skipped"], path=str, reason=str),
    )
    return report["clips"], [Skipped(Path(each["path"]), each["reason"]) for each in report["skipped"]]


def _read_kept(path: Path, is_sound: Callable[[Any], bool]) -> Any:
    """Reads a JSON file of a folder of clips, which may hold names that are not UTF-8.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if is_sound(found):
            return found
        reason = "it has another content than was written"
    except (ValueError, LookupError, TypeError, OSError) as error:
        reason = str(error)
    raise damaged(path, reason, f"delete {path.parent} and encode again")


def _are_rows(found: Any, **kinds: type) -> bool:
    """Returns whether it is a list of mappings that have values of these types."""
    return isinstance(found, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items()) for row in found
    )


def _write_report(folder: Path, count: int, skipped: list[Skipped], notes: list[str]) -> None:
    report = {"clips": count, "skipped": [{"path": str(s.path), "reason": s.reason} for s in skipped], "notes": notes}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    lines = [f"{count} clips encoded, {len(skipped)} files skipped", *map(str, skipped), *notes]
    (folder / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _indices(path: Path) -> list[int]:
    try:
        return open_parquet(path).read(columns=["index"])["index"].to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged(path, error, f"delete {path.parent} and encode again") from error


def _changes(there: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in sorted({*there, *now}) if there.get(name) != now.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {now.get(name)} now" for name in names)
