"""Refuses addresses with passwords, keys or signatures, because settings, logs and reports show addresses."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>[^\s'\"]*)")
_SECRET = re.compile(r"secret|token|sig|passw|pwd|credential|key|auth|jwt|session", re.IGNORECASE)
_USER = re.compile(r"(?:^|//)[^/@]*:[^/@]*@(?!(?:\d+|best|all)(?:\*|$))")  # but HOST:PORT@STEP of an evaluation's model


def refuse_credentials(value: Any, what: str) -> None:
    """Raises ValueError where an address in a setting, or in any setting below, holds credentials; shows none of them.

    Refused are a name or password before the host (``s3://KEY:SECRET@bucket``) and options whose names say that they
    are secret (``?X-Amz-Signature=...``). GCS's ``anonymous@`` is the name of nobody.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            refuse_credentials(each, f"{what}.{key}".lstrip("."))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for each in value:
            refuse_credentials(each, what)
    elif isinstance(value, str):
        for found in _URI.finditer(value):
            if kind := _credentials(found["scheme"].lower(), found["rest"]):
                raise ValueError(
                    f"{what or 'an address'}: {found['scheme']}://... holds {kind}, which would be kept in files and "
                    "logs; leave it out: credentials come from the environment or the machine's role "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, RAY_AUTH_TOKEN)"
                )


def refuse_credentials_in_arguments(arguments: Sequence[str]) -> None:
    """Raises ValueError where an argument of a command line holds credentials, and names its option or setting."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, _ = argument.partition("://")[0].partition("=")
        refuse_credentials(argument, key if equals else before if before.startswith("--") else "an argument")


def _credentials(scheme: str, rest: str) -> str | None:
    """Returns the kind of credentials in the part of an address after ``://``."""
    place, *options = re.split(r"[?#&;]", rest)
    host, _, path = place.partition("/")
    user, at, _ = host.rpartition("@")
    if at and (scheme, user) != ("gs", "anonymous"):
        return "a name or password before its @"
    port = re.sub(r"^\[[^\]]*\]", "", host).partition(":")[2]
    if "@" in path and port and (scheme in ("s3", "gs") or not port.isdigit()):  # a secret with a slash in it
        return "a name or password before its @"
    for option in options:
        name, _, text = unquote(option).partition("=")
        if text and (_SECRET.search(name) or _USER.search(text)):
            return f"a secret in its option {name!r}"
    return None
