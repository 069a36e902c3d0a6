"""Checks of other places on the machine: the home folder, the token of Ray's clusters, the folder of sessions."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlvid.cluster.connect import check_session_folder, session_folder, session_room
from rlvid.cluster.token import PLACES, auth_token, token_file, tokens_are_off
from rlvid.doctor.finding import Finding, finding
from rlvid.metric_names import percent

_GIB = 2**30
_FULL = 0.95
"""Share of a disk above which Ray keeps no more objects on it."""


def check_home() -> Iterator[Finding]:
    """Checks that the home folder exists and can be written; downloads and caches need it."""
    way = "set HOME to a folder that you may write to; or HF_HOME, TORCH_HOME and RLVID_CACHE, for what is kept there"
    try:
        home = Path.home()
        if not home.is_absolute():
            raise OSError(None, "it is no absolute path")
        tempfile.TemporaryFile(dir=home).close()
    except RuntimeError:
        yield Finding("home", "warning", "HOME is not set, and this user has none", way)
    except OSError as error:
        yield Finding("home", "warning", f"{home} cannot be written ({error.strerror})", way)
    else:
        yield Finding("home", "ok", f"{home} can be written")


def check_token() -> Iterator[Finding]:
    """Which token clusters are shown, and that nobody else can read it."""
    if tokens_are_off():
        way = "unset RAY_AUTH_MODE: whoever reaches a port of Ray without a token runs code as you"
        yield Finding("token", "warning", f"RAY_AUTH_MODE = {os.environ['RAY_AUTH_MODE']!r} switches it off", way)
        return
    try:
        held = auth_token()
    except ValueError as error:
        yield Finding("token", "error", str(error), f"one of: {PLACES}")
        return
    file = token_file()
    if held is None:
        yield Finding("token", "ok", "none yet; rlvid makes one for the Ray that it starts")
    elif file is None:
        yield Finding("token", "ok", "in RAY_AUTH_TOKEN")
    else:
        mode = stat.S_IMODE(file.stat().st_mode)
        found = f"{file}, mode {mode:04o}{', which others can read' if mode & 0o077 else ''}"
        yield finding("token", not mode & 0o077, found, f"chmod 600 {file}", "warning")


def check_temporary() -> Iterator[Finding]:
    """Checks the temporary folder of Ray's sessions: its path is short enough for sockets, and it has room."""
    try:
        check_session_folder()
    except ValueError as error:
        yield Finding("temporary folder", "error", str(error), "RAY_TMPDIR=/tmp, or another short path")
        return
    folder = session_folder()
    disk = shutil.disk_usage(folder)
    free, share = disk.free / _GIB, 1 - disk.free / disk.total
    room = f"{free:.1f} GiB free ({percent(share, 0)} used)"
    found = f"{folder}, {room}, path {session_room()} bytes below a socket's longest"
    way = "free some space, or set RAY_TMPDIR to a folder on another disk: Ray puts objects there that exceed memory"
    yield finding("temporary folder", free >= 2 and share < _FULL, found, way, "warning")
