"""The storage of runs: a folder that all nodes mount, or an object store (S3, GCS) with a URI.

With a folder there is nothing to do. With a URI every process works in a folder of its own machine, and what it wrote
is sent to the store at moments that it chooses. The store is what counts: a machine that has nothing begins with what
is there, and what a machine kept from before is brought to the store's state.

==================  ===========================================================================================
process             its folder and what it moves
==================  ===========================================================================================
driver, evaluation  a cache (``RLVID_CACHE``, else ``~/.cache/rlvid``): pulls settings, events and what checkpoints
                    hold of the model; pushes settings, pictures and tables
worker              a temporary folder in the cache: pushes events and its log before each checkpoint is reported
archive             its parts, from tasks of Ray Data straight to the store
Ray Train           checkpoints, from the workers straight to the store and back
==================  ===========================================================================================
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import fs

from rlvid.credentials import refuse_credentials
from rlvid.files import atomic_file

_CHUNK = 8 * 2**20
_MAX_RENAMED = 5 * 2**30
"""Bytes: S3 copies no larger object by itself, and a rename there is a copy."""
_LEFT_OUT = re.compile(r"archive/|videos/|step-\d+/(engine/|algorithm\.pt)|step-\d+\.|\.|.*\.tmp$")
"""Files of a run that only workers or evaluations need, or nobody."""
PART = 2**20
"""Bytes after which a file that grows in a store goes on in another."""


class Growing(Protocol):
    """What is written at its end alone, into one file after the other."""

    @property
    def path(self) -> Path:
        """The file that is written now."""

    def turn(self) -> None:
        """Ends the file, and goes on in another, whose name sorts after it."""


def is_uri(storage: str | Path) -> bool:
    """Returns whether storage is an object store and no folder."""
    return "://" in str(storage)


def split_uri(run: str | Path) -> tuple[str, str]:
    """Returns the storage and the name of a run's URI; options (``?endpoint_override=...``) stay with the storage."""
    place, mark, options = str(run).partition("?")
    storage, _, name = place.rstrip("/").rpartition("/")
    return storage + mark + options, name


def run_uri(storage: str, name: str) -> str:
    """Returns the URI of a run."""
    place, mark, options = storage.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def home(storage: str) -> Path:
    """Returns the absolute folder of this machine that holds run folders: the storage itself, or the cache of a URI."""
    if not is_uri(storage):
        return Path(storage).expanduser().resolve()
    return cache_folder() / "storage" / hashlib.sha256(storage.rstrip("/").encode()).hexdigest()[:12]


def cache_folder() -> Path:
    """Returns the folder of this machine for what rlvid can make or fetch again.

    Raises:
        ValueError: there is none.
    """
    try:
        return Path(os.environ.get("RLVID_CACHE") or "~/.cache/rlvid").expanduser().resolve()
    except RuntimeError:
        raise ValueError("this user has no home folder to keep copies of a store in; set RLVID_CACHE to one") from None


def place_of(place: str | Path) -> str:
    """Returns a URI as it is, and the path of a folder from the root on."""
    return str(place) if is_uri(place) else str(Path(place).expanduser().absolute())


def locate(storage: str, under: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system of a folder or URI, and the path in it of a place below.

    Raises:
        ValueError: the URI is not one that pyarrow reads, or holds credentials.
    """
    refuse_credentials(storage, "the storage")
    with reaching(storage):
        store, root = fs.FileSystem.from_uri(storage)
    return store, str(PurePosixPath(root) / under)


@contextmanager
def reaching(storage: str) -> Iterator[None]:
    """Raises ValueError where the block cannot reach the store."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"storage {storage!r} cannot be reached ({' '.join(str(error).split())}); check address, region and "
            "credentials of this machine, or give a folder that all nodes mount"
        ) from error


class Mirror:
    """A folder of this machine beside a place in the store; does nothing where the storage is a folder itself.

    Every verb raises ValueError where the store cannot be reached. ``place`` is the URI in the store, or the folder.

    Args:
        storage: folder or URI, as in ``output.storage``.
        under: the place below it, such as a run's name.
        folder: default: the same place in ``home(storage)``.

    Raises:
        ValueError: the URI is not one that pyarrow reads, or this machine cannot keep copies.
    """

    def __init__(self, storage: str, under: str, folder: Path | None = None) -> None:
        self.folder = folder or home(storage) / under
        self.place = run_uri(storage, under) if is_uri(storage) else str(self.folder)
        self._storage, self._sent = storage, dict[str, tuple[int, int]]()
        self._store: Any = None
        if is_uri(storage):
            self._store, self._root = locate(storage, under)
            if folder is None:
                _check_cache(storage)

    def sizes(self) -> dict[str, int] | None:
        """Returns the bytes of each file of the store, by its path; None where the storage is a folder."""
        return None if self._store is None else {name: info.size for name, info in self._there().items()}

    def pull(self, wanted: Callable[[str], bool] = lambda name: True, missing: bool = False) -> None:
        """Copies the store's state: downloads files that differ, deletes files that the store does not have.

        Args:
            wanted: says of a file's path below the folder whether it is looked at.
            missing: downloads files that are not here, and leaves those that are.
        """
        if self._store is None:
            return
        here, there = self._here(), self._there()
        for name in [] if missing else filter(wanted, here.keys() - there.keys()):
            (self.folder / name).unlink()
        for name in filter(wanted, there):
            if name not in here or (not missing and here[name] != (there[name].size, there[name].mtime_ns)):
                self._download(name, there[name].mtime_ns)
        if not missing:
            self._sent = self._here()

    def push(self, names: Iterable[str] | None = None) -> None:
        """Uploads files in the order given, by default what is new or has changed since the last time, by name.

        Args:
            names: paths below the folder. By default dot files and ``.tmp`` stay.
        """
        if self._store is None:
            return
        here = self._here()
        if names is None:
            hidden = {name for name in here if name.endswith(".tmp") or name.startswith(".") or "/." in name}
            names = sorted(name for name in here.keys() - hidden if self._sent.get(name) != here[name])
        for name in (name for name in names if name in here):
            self._upload(name)
            self._sent[name] = here[name]

    def turn(self, files: Iterable[Growing]) -> None:
        """Has files that grow go on in others once they are long, because a push sends a changed file whole."""
        for file in files if self._store is not None else ():
            if file.path.is_file() and file.path.stat().st_size > PART:
                file.turn()

    def rename(self, old: str, new: str) -> None:
        """Renames a folder right below, here and in the store."""
        if (self.folder / old).is_dir():
            (self.folder / old).rename(self.folder / new)
        for name, info in self._there().items() if self._store is not None else []:
            if name.startswith(f"{old}/"):
                self._move(name, name.replace(old, new, 1), info.size)
        self._sent = {name.replace(f"{old}/", f"{new}/", 1): state for name, state in self._sent.items()}

    def delete(self, unwanted: Callable[[str], bool]) -> None:
        """Deletes files of the store, not of the folder; ``unwanted`` says which, by their path below it."""
        for name in filter(unwanted, self._there() if self._store is not None else []):
            with reaching(self._storage):
                self._store.delete_file(f"{self._root}/{name}")

    def _there(self) -> dict[str, fs.FileInfo]:
        """Files of the store by their path below ours."""
        with reaching(self._storage):
            found = self._store.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        return {i.path[len(self._root) :].lstrip("/"): i for i in found if i.type == fs.FileType.File}

    def _here(self) -> dict[str, tuple[int, int]]:
        """Returns the size and time of each file of the folder."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()] if self.folder.is_dir() else []
        return {p.relative_to(self.folder).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns) for p in paths}

    def _target(self, name: str) -> str:
        """Returns the path of a file in the store, in a folder that is there."""
        path = f"{self._root}/{name}"
        if self._store.type_name == "local":  # an object store has no folders
            self._store.create_dir(path.rpartition("/")[0])
        return path

    def _upload(self, name: str) -> None:
        with (
            reaching(self._storage),
            open(self.folder / name, "rb") as source,
            self._store.open_output_stream(self._target(name)) as sink,
        ):
            shutil.copyfileobj(source, sink, _CHUNK)

    def _download(self, name: str, mtime_ns: int) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            with reaching(self._storage):
                source = self._store.open_input_stream(f"{self._root}/{name}")
            with source, open(part, "wb") as sink:
                while chunk := self._read(source):
                    sink.write(chunk)
            os.utime(part, ns=(mtime_ns, mtime_ns))

    def _read(self, source: Any) -> bytes:
        with reaching(self._storage):
            return bytes(source.read(_CHUNK))

    def _move(self, old: str, new: str, size: int) -> None:
        source, target = f"{self._root}/{old}", self._target(new)
        with reaching(self._storage):
            if size < _MAX_RENAMED:
                self._store.move(source, target)
                return
            with self._store.open_input_stream(source) as read, self._store.open_output_stream(target) as write:
                shutil.copyfileobj(read, write, _CHUNK)
            self._store.delete_file(source)


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


def run_mirror(storage: str, name: str) -> Mirror:
    """Returns a run on this machine, brought to the store's state but for files that only workers need.

    Raises:
        ValueError: the store cannot be reached.
    """
    mirror = Mirror(storage, name)
    mirror.pull(lambda path: not _LEFT_OUT.match(path))
    if any(re.match(r"archive/|step-\d+/state\.json$", name) for name in mirror.sizes() or ()):
        (mirror.folder / "archive").mkdir(parents=True, exist_ok=True)  # says that the run has begun
    elif is_uri(storage) and (mirror.folder / "archive").is_dir():
        shutil.rmtree(mirror.folder / "archive")
    return mirror


def worker_mirror(storage: str | None, name: str, folder: Path, temporary: Path) -> Mirror:
    """Returns a worker's folder: the run's folder, or for a store a folder in ``temporary``."""
    if storage is None:
        return Mirror(str(folder.parent), name, folder)
    return Mirror(storage, name, temporary / name)
