"""The token of a Ray cluster: where this machine keeps one, and one for the Ray that rlvid itself starts."""

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

PLACES = "RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token"
_SPACES = " \t\n\r\f\v"  # what Ray strips


def auth_token() -> str | None:
    """Reads the token from the places and in the order of Ray, see ``PLACES``; None where there is none.

    Raises:
        ValueError: a variable is set and gives no token, or what it gives cannot stand in a header.
    """
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return _checked(given, "RAY_AUTH_TOKEN")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return _checked(_first_line(Path(path)), f"RAY_AUTH_TOKEN_PATH = {path!r}")
        except OSError as error:
            raise ValueError(
                f"RAY_AUTH_TOKEN_PATH = {path!r} cannot be read ({error.strerror}); name the file that holds the "
                "cluster's token, or unset it"
            ) from None
    file = _home_file()
    try:
        found = _first_line(file) if file else ""
    except OSError:  # to Ray, a file that it cannot open is no file
        return None
    return _checked(found, str(file)) if found.strip(_SPACES) else None


def tokens_are_off() -> bool:
    """Returns whether RAY_AUTH_MODE switches tokens off."""
    return os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"


def token_file() -> Path | None:
    """Returns the file that ``token`` reads; None where the token is in RAY_AUTH_TOKEN, or there is no home."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(path) if path else _home_file()


def make_own_token() -> None:
    """Makes a token for the Ray that this process starts, unless there is one or RAY_AUTH_MODE switches tokens off.

    Ray listens on every interface of the machine. Its own way of making a token fails where the home folder cannot be
    written, lets every user of the machine read the file, and mixes up two first starts at the same moment. Here the
    file is readable by its owner alone and appears with its content; without a home the token is in the environment of
    this process and its children.

    Raises:
        ValueError: see ``auth_token``.
    """
    if tokens_are_off() or auth_token() is not None:
        return
    fresh = secrets.token_hex(32)
    if not (_keep(fresh) and auth_token() is not None):
        os.environ["RAY_AUTH_TOKEN"] = fresh


def _keep(fresh: str) -> bool:
    """Returns whether the home folder has a token now: this one, or that of a process which came first."""
    file = _home_file()
    if file is None:
        return False
    part = file.with_name(f".auth_token.{os.getpid()}")
    try:
        file.parent.mkdir(exist_ok=True)
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as out:
            out.write(fresh)
        os.link(part, file)
    except FileExistsError:
        return True
    except OSError:
        return False
    finally:
        with suppress(OSError):  # there may be no such folder
            part.unlink(missing_ok=True)
    return True


def _home_file() -> Path | None:
    """Returns Ray's own file below HOME, which its C++ part reads from the environment alone."""
    home = os.environ.get("HOME")
    return Path(home) / ".ray" / "auth_token" if home else None


def _first_line(file: Path) -> str:
    """Returns the first line, all that Ray reads."""
    return file.read_bytes().partition(b"\n")[0].decode("latin-1")


def _checked(text: str, where: str) -> str:
    """Returns the token without spaces around it; the message names the place and never the token."""
    held = text.strip(_SPACES)
    if not re.fullmatch(r"[\x20-\x7e]+", held):
        what = "holds a line break or a letter that no header can carry" if held else "is empty"
        raise ValueError(f"{where} {what}; copy the cluster's token anew (`ray get-auth-token` on the head prints it)")
    return held
