"""Files and folders on disk: atomic writes, locks, temporary folders, checksums, and errors about files."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

_LOCK = ".lock"
_MAX_NODES = 1_000_000
_ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""The errors of PyYAML at `!!int x`, `!!bool x` or the 30th of February."""
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}")
"""Name of a file while ``atomic_file`` writes it."""


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file at once: a reader finds the old content or the new, never a part. Makes missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        part.write_bytes(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the path of a new file, which takes the place of ``path`` when the block succeeds.

    A reader finds the old content or the new, never a part, also after the machine went down. When the block fails, the
    new file is deleted.

    Raises:
        OSError: the file cannot be written; names ``path``.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # else a machine that goes down can leave the name without the content
        os.replace(part, path)
    except OSError as error:
        if error.filename not in (None, str(part), part):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink()


def clear_unfinished(folder: Path) -> None:
    """Deletes files that ``atomic_file`` left in a folder when its process was killed; nobody may write there now."""
    for path in folder.glob(".*"):
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """Returns what ``sha256`` does; a process reads a file once, and again when its size, time or inode is another."""
    state = path.stat()
    return _sha256_as(path.absolute(), state.st_size, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=256)  # a model has tens of gigabytes, and a run asks for its weights several times
def _sha256_as(path: Path, size: int, changed_ns: int, inode: int) -> str:
    return sha256(path)


def size_and_ends(path: Path) -> tuple[int, str]:
    """Returns the size of a file and a hash over both of its ends, which tell one file from another."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(1 << 16)
        file.seek(max(0, size - (1 << 16)))
        return size, hashlib.sha256(head + file.read()).hexdigest()


def stand_in(file: Path) -> str | None:
    """Returns the fault of a file that is a placeholder, and the way out: a Git LFS pointer or a web page."""
    with file.open("rb") as stream:
        head = stream.read(512)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer and not the file itself; fetch it with `git lfs pull` or `hf download`"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page and not the file itself; use the link of the download"
    return None


def read_yaml(text: str) -> Any:
    """Reads YAML that has only one possible meaning for a reader.

    Raises:
        yaml.YAMLError: it is not valid, a mapping has a key twice (PyYAML keeps the last one), a value is none of its
            type, it is nested deeper than Python reads, or its aliases make it larger than ``_MAX_NODES``.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except _ODD as error:
        raise yaml.YAMLError(f"a value is none of its type ({error})") from error
    finally:
        loader.dispose()


def _check_node(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Counts the nodes below a node, with its aliases written out; ``sizes`` holds known counts, 0 of open ones."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.MarkedYAMLError(problem="an alias holds itself", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = set[tuple[str, Any]]()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is there twice", problem_mark=key.start_mark
                    )
                keys.add((key.tag, key.value))
            below += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    size = 1 + sum(_check_node(each, sizes) for each in below)
    if size > _MAX_NODES:
        raise yaml.MarkedYAMLError(problem="aliases make it too large", problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a mapping from a YAML or JSON file.

    Raises:
        ValueError: in one line: the file cannot be read, is damaged, or holds no mapping.
    """
    load: Callable[[str], Any] = json.loads if path.suffix == ".json" else read_yaml
    try:
        found = load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict):
        raise damaged(path, f"it holds {'nothing' if found is None else 'no mapping of keys'}")
    return found


def damaged(path: Path | str, reason: object, way_out: str = "") -> ValueError:
    """Makes the error, in one line, of a damaged file."""
    text = " ".join(str(reason).split())[:200]
    return ValueError(f"{path} is damaged ({text}){way_out and '; '}{way_out}")


def write_error(what: str, error: Exception, way_out: str) -> OSError:
    """Makes the error, in one line, of a failed write, such as on a full disk."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    if (file := getattr(error, "filename", None)) and str(file) not in what:
        reason += f": {file}"
    return OSError(getattr(error, "errno", None), f"{what} could not be written ({reason}); {way_out}")


@contextmanager
def held(lock: Path, otherwise: str, *folders: Path, patience: float = 0) -> Iterator[None]:
    """Holds a lock file for this process; the hold ends with the process, however that ends.

    The kernel's own lock (flock), which ends with its holder also after SIGKILL and, on NFS, with its machine.

    Args:
        lock: the file; it stays afterwards. It tells who holds it.
        otherwise: message if another process holds it; what follows "another process" there says which.
        folders: where unfinished files of killed processes are deleted; nobody may write there without the lock.
        patience: seconds to wait for the other process.

    Raises:
        ValueError: another process holds it.
    """
    until = time.monotonic() + patience
    with open(lock, "a+", encoding="utf-8") as file:  # not "w": that would erase who holds it
        while not _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if time.monotonic() >= until:
                file.seek(0)
                holder = file.read(200).strip()
                found = f"another process ({holder})" if holder else "another process"
                raise ValueError(otherwise.replace("another process", found, 1))
            time.sleep(0.1)
        with suppress(OSError):  # a full disk holds nobody up
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for folder in folders:
            clear_unfinished(folder)
        yield


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yields a new folder that takes the place of ``out`` when the block succeeds, and is deleted when it fails.

    The folder is ``.NAME.part`` beside ``out``. What a killed process left there is deleted first.

    Raises:
        ValueError: another process writes ``out`` at this moment.
    """
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    part.mkdir(parents=True, exist_ok=True)
    with held(part / _LOCK, f"another process writes {out} at this moment; wait for its end, or choose another folder"):
        _empty(part)
        _bring_back(old, out)
        try:
            yield part
            (part / _LOCK).unlink()
            if out.exists():
                out.replace(old)
            part.replace(out)
        finally:
            _bring_back(old, out)
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _bring_back(old: Path, out: Path) -> None:
    """Restores ``out`` if a process ended between the two renames that replace it."""
    if old.exists() and not out.exists():
        old.replace(out)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Yields a folder for temporary files in ``folder``, which processes share; it is deleted after the block.

    What killed processes left in ``folder`` is deleted first, unless another process uses it at this moment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a+", encoding="utf-8") as lock:  # NFS shares a lock only of a file open for reading
        if _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _empty(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)  # held for as long as this process uses the folder
        own = folder / uuid4().hex[:8]
        own.mkdir()
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)
            if _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                _empty(folder)


def _locked(file: Any, how: int) -> bool:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    return True


def _empty(folder: Path) -> None:
    """Deletes all that is in a folder but its lock."""
    for path in folder.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
