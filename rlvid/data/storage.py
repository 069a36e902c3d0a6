"""Where runs are kept: a folder that all nodes mount, or an object store (S3, GCS) behind a URI.

With a folder there is nothing to do. With a URI every process works in a folder of its own machine, and what it wrote
is sent to the store at moments that it chooses. The store is what counts: a machine that has nothing begins with what
is there, and what a machine kept from before is brought to the store's state.

==================  ===========================================================================================
process             its folder and what it moves
==================  ===========================================================================================
driver, evaluation  a cache (``RLVID_CACHE``, else ``~/.cache/rlvid``): pulls settings, events and what checkpoints
                    hold of the model; pushes settings, pictures and tables
worker              a temporary folder in the cache: pushes archive parts, events and its log before each checkpoint
                    is reported
Ray Train           checkpoints, from the workers straight to the store and back
==================  ===========================================================================================
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from rlvid.credentials import refuse_credentials

_CHUNK = 8 * 2**20
_MOST_RENAMED = 5 * 2**30
"""Bytes: S3 copies no larger object by itself, and a rename there is a copy."""
_LEFT_OUT = re.compile(r"archive/|videos/|step-\d+/(engine/|algorithm\.pt)|step-\d+\.|\.|.*\.tmp$")
"""Of a run, what only workers or evaluations need, or nobody."""


def is_uri(storage: str | Path) -> bool:
    """Whether storage is an object store and no folder."""
    return "://" in str(storage)


def split_uri(run: str | Path) -> tuple[str, str]:
    """The storage and the name of a run's URI; options (``?endpoint_override=...``) stay with the storage."""
    place, mark, options = str(run).partition("?")
    storage, _, name = place.rstrip("/").rpartition("/")
    return storage + mark + options, name


def run_uri(storage: str, name: str) -> str:
    """The URI of a run."""
    place, mark, options = storage.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def home(storage: str) -> Path:
    """Absolute folder of this machine that holds run folders: the storage itself, or the cache of a URI."""
    if not is_uri(storage):
        return Path(storage).expanduser().resolve()
    try:
        cache = Path(os.environ.get("RLVID_CACHE") or "~/.cache/rlvid").expanduser().resolve()
    except RuntimeError:
        raise ValueError("this user has no home folder to keep copies of a store in; set RLVID_CACHE to one") from None
    return cache / "storage" / hashlib.sha256(storage.rstrip("/").encode()).hexdigest()[:12]


def _check_cache(storage: str) -> None:
    """Raises ValueError where the copies of a store cannot be kept on this machine."""
    folder = home(storage)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"copies of {storage!r} cannot be kept in {folder} ({error.strerror}); set RLVID_CACHE to a folder "
            "that you may write to"
        ) from None


def locate(storage: str, under: str) -> tuple[fs.FileSystem, str]:
    """The file system of a folder or URI, and the path in it of a place below.

    Raises:
        ValueError: the URI is not one that pyarrow reads, or holds credentials.
    """
    refuse_credentials(storage, "the storage")
    try:
        store, root = fs.FileSystem.from_uri(storage)
    except (pa.ArrowException, OSError) as error:
        raise _complaint(storage, error) from error
    return store, str(PurePosixPath(root) / under)


def _complaint(storage: str, error: Exception) -> ValueError:
    return ValueError(
        f"storage {storage!r} cannot be reached ({' '.join(str(error).split())}); check address, region and "
        "credentials of this machine, or give a folder that all nodes mount"
    )


class Mirror:
    """A folder of this machine beside a place in the store; does nothing where the storage is a folder itself.

    Args:
        storage: folder or URI, as in ``output.storage``.
        under: the place below it, such as a run's name.
        folder: default: the same place in ``home(storage)``.

    Raises:
        ValueError: the URI is not one that pyarrow reads.
    """

    def __init__(self, storage: str, under: str, folder: Path | None = None) -> None:
        self.folder = folder or home(storage) / under
        self._name, self._sent = storage, dict[str, tuple[int, int]]()
        self._store: fs.FileSystem | None = None
        if is_uri(storage):
            self._store, self._root = locate(storage, under)
            if folder is None:
                _check_cache(storage)

    def pull(self, wanted: Callable[[str], bool] | None = None) -> None:
        """Brings the folder to the store's state; ``wanted`` says of a file's path below it whether it is looked at.

        Raises:
            ValueError: the store cannot be read.
        """
        if self._store is None:
            return
        wanted = wanted or (lambda name: True)
        there = {name: info for name, info in self._there().items() if wanted(name)}
        for name in self._here().keys() - there.keys():
            if wanted(name):
                (self.folder / name).unlink()
        for name, info in there.items():
            path = self.folder / name
            if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns):
                continue
            self._download(name, path)
            os.utime(path, ns=(info.mtime_ns, info.mtime_ns))
        self._sent = self._here()

    def fetch(self, name: str) -> None:
        """Brings one file, if the store has it."""
        if self._store is not None and name in self._there():
            self._download(name, self.folder / name)

    def push(self, move: str | None = None) -> None:
        """Sends what is new or has changed since the last pull or push; dot files and ``.tmp`` stay.

        ``move`` is a folder below whose files are deleted here once they have arrived.

        Raises:
            ValueError: the store cannot be written.
        """
        if self._store is None:
            return
        for name, state in self._here().items():
            if self._sent.get(name) == state or name.endswith(".tmp") or any(p[0] == "." for p in name.split("/")):
                continue
            self._upload(name)
            self._sent[name] = state
            if move is not None and name.startswith(f"{move}/"):
                (self.folder / name).unlink()

    def send(self, pattern: str) -> None:
        """Sends the files right in the folder that match a pattern, whether they have changed or not."""
        for path in self.folder.glob(pattern) if self._store is not None else []:
            self._upload(path.name)

    def forget(self, name: str) -> None:
        """Deletes one file of the store, if it is there."""
        if self._store is not None and name in self._there():
            self._store.delete_file(f"{self._root}/{name}")

    def sizes(self) -> dict[str, int] | None:
        """Bytes of each file of the store, by its path; None where the storage is a folder."""
        return None if self._store is None else {name: info.size for name, info in self._there().items()}

    def rename(self, old: str, new: str) -> str:
        """Renames a folder right below, in the store too; returns the new name."""
        if (self.folder / old).is_dir():
            (self.folder / old).rename(self.folder / new)
        for name, info in self._there().items() if self._store is not None else []:
            if name.startswith(f"{old}/"):
                self._move(name, f"{new}/{name.removeprefix(f'{old}/')}", info.size)
        self._sent = {name.replace(f"{old}/", f"{new}/", 1): state for name, state in self._sent.items()}
        return new

    def _move(self, old: str, new: str, size: int) -> None:
        source, target = f"{self._root}/{old}", f"{self._root}/{new}"
        if self._store.type_name == "local":  # a store of objects has no folders to make
            self._store.create_dir(target.rpartition("/")[0])
        try:
            if size < _MOST_RENAMED:
                self._store.move(source, target)
                return
            with self._store.open_input_stream(source) as read, self._store.open_output_stream(target) as write:
                shutil.copyfileobj(read, write, _CHUNK)
            self._store.delete_file(source)
        except (pa.ArrowException, OSError) as error:
            raise _complaint(self._name, error) from error

    def remove(self, name: str) -> None:
        """Deletes a folder right below, in the store too."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        for each in self._there() if self._store is not None else []:
            if each.startswith(f"{name}/"):
                self._store.delete_file(f"{self._root}/{each}")

    def fetch_missing(self, under: str) -> None:
        """Brings the files right in a folder below that are not here."""
        for name in self._there() if self._store is not None else []:
            if name.rpartition("/")[0] == under and not (self.folder / name).is_file():
                self._download(name, self.folder / name)

    def send_folder(self, under: str, since: float) -> None:
        """Makes a folder of the store like ours, but for dot files.

        Sends files that it lacks, that have another size there or that came here after ``since`` (seconds since 1970),
        and deletes what is not here.
        """
        if self._store is None:
            return
        there = {name: info for name, info in self._there().items() if name.rpartition("/")[0] == under}
        here = {name for name in self._here() if name.rpartition("/")[0] == under and Path(name).name[0] != "."}
        for name in sorted(here):
            state = (self.folder / name).stat()
            if name not in there or there[name].size != state.st_size or state.st_ctime >= since:
                self._upload(name)
        for name in there.keys() - here:
            self._store.delete_file(f"{self._root}/{name}")

    def trim_archive(self, from_step: int) -> None:
        """Removes archive parts of ``from_step`` and later from the store, see ``rlvid.data.archive.trim``."""
        from rlvid.data.archive import part_step  # brings torch, which a node that only looks at its storage can spare

        for name in self._there() if self._store is not None else []:
            step = part_step(PurePosixPath(name).name) if name.startswith("archive/") else None
            if step is not None and step >= from_step:
                self._store.delete_file(f"{self._root}/{name}")

    def has(self, prefix: str) -> bool:
        """Whether the store has a file whose path starts so; False for a folder."""
        return self._store is not None and any(name.startswith(prefix) for name in self._there())

    def _there(self) -> dict[str, fs.FileInfo]:
        """Files of the store by their path below ours."""
        try:
            found = self._store.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        except (pa.ArrowException, OSError) as error:
            raise _complaint(self._name, error) from error
        return {i.path[len(self._root) :].lstrip("/"): i for i in found if i.type == fs.FileType.File}

    def _here(self) -> dict[str, tuple[int, int]]:
        """Size and time of each file of the folder."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()] if self.folder.is_dir() else []
        return {p.relative_to(self.folder).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns) for p in paths}

    def _upload(self, name: str) -> None:
        target = f"{self._root}/{name}"
        if self._store.type_name == "local":  # a store of objects has no folders to make
            self._store.create_dir(target.rpartition("/")[0])
        try:
            with open(self.folder / name, "rb") as source, self._store.open_output_stream(target) as sink:
                shutil.copyfileobj(source, sink, _CHUNK)
        except (pa.ArrowException, OSError) as error:
            raise _complaint(self._name, error) from error

    def _download(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with self._store.open_input_stream(f"{self._root}/{name}") as source, open(part, "wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
        os.replace(part, path)


def run_mirror(storage: str, name: str) -> Mirror:
    """A run on this machine, brought to the store's state but for what only workers need.

    Raises:
        ValueError: the store cannot be reached.
    """
    mirror = Mirror(storage, name)
    mirror.pull(lambda path: not _LEFT_OUT.match(path))
    if mirror.has("archive/"):
        (mirror.folder / "archive").mkdir(parents=True, exist_ok=True)  # says that the run has begun
    elif is_uri(storage) and (mirror.folder / "archive").is_dir():
        shutil.rmtree(mirror.folder / "archive")
    return mirror


def temporary_home(storage: str | None, run: Path) -> Path:
    """The folder for temporary files of a run's workers: in the run's own, or for a store in this machine's cache."""
    return run / ".tmp" if storage is None else home(storage) / ".tmp"


def worker_mirror(storage: str | None, name: str, folder: Path, temporary: Path) -> Mirror:
    """Where a worker writes: the run's folder, or for the store a folder in ``temporary``."""
    if storage is None:
        return Mirror(str(folder.parent), name, folder)
    return Mirror(storage, name, temporary / name)


def clips_here(clips: Path, storage: str | None) -> Path:
    """The folder of encoded clips on this machine; those of a store are fetched, while other processes wait."""
    if storage is None:
        return clips
    folder = home(storage) / "clips" / clips.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{clips.name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mirror = Mirror(storage, f"clips/{clips.name}", folder)
        if mirror.has(""):
            mirror.pull()
    return folder
