"""Whether a Ray cluster answers, lets us in, and runs the versions that we run; in seconds, and in one line if not.

Jobs go through the dashboard (``http://HOST:8265``), drivers that run here to the cluster itself (``HOST:6379``).
"""

import http.client
import json
import logging
import os
import re
import socket
import sys
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

_SECONDS = 10.0
"""How long the cluster may take to answer."""


def token() -> str | None:
    """The token as Ray looks for it: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def check_cluster(address: str) -> dict[str, str]:
    """Headers that the cluster takes; it answers, lets us in and has our versions of Ray and Python.

    Raises:
        ValueError: otherwise, in one line.
    """
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address {address!r}: give the dashboard's address, such as http://127.0.0.1:8265")
    headers: dict[str, str] = {}
    try:
        theirs = ask(address, "/api/version", headers)
    except PermissionError:  # only a cluster that asks for a token is shown it
        held = token()
        if held is None:
            raise ValueError(
                f"the cluster at {address} asks for a token and there is none here; copy the cluster's into "
                "~/.ray/auth_token or RAY_AUTH_TOKEN (`ray get-auth-token` on the head prints it)"
            ) from None
        headers = {"Authorization": f"Bearer {held}"}
        try:
            theirs = ask(address, "/api/version", headers)
        except PermissionError:
            raise ValueError(
                f"the cluster at {address} refuses the token of this machine (RAY_AUTH_TOKEN, else ~/.ray/auth_token); "
                "copy the cluster's (`ray get-auth-token` on the head prints it)"
            ) from None
    python = (ask(address, "/api/v0/cluster_metadata", headers).get("data") or {}).get("pythonVersion")
    check_versions(address, str(theirs.get("ray_version")), python)
    return headers


def check_versions(address: str, ray_version: str, python: str | None) -> None:
    """Raises ValueError unless Ray is the same and Python up to its minor version, as Ray asks for; None: unknown."""
    here = (version("ray"), ".".join(map(str, sys.version_info[:3])))
    for name, mine, its in zip(("Ray", "Python"), here, (ray_version, python or here[1]), strict=True):
        numbers = 3 if name == "Ray" else 2
        if mine.split(".")[:numbers] != its.split(".")[:numbers]:
            raise ValueError(
                f"the cluster at {address} runs {name} {its} and this machine {name} {mine}, which do not work "
                "together; start the cluster with the image of cluster.yaml, or install its version here"
            )


def ask(address: str, path: str, headers: dict[str, str]) -> dict[str, Any]:
    """The JSON at a path of the dashboard, {} where the path is unknown.

    Raises:
        ValueError: nobody answers, or not a Ray dashboard.
        PermissionError: without a token, or with a wrong one.
    """
    request = urllib.request.Request(address + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise PermissionError(error.code) from None
        if error.code == 404 and path != "/api/version":
            return {}
        raise ValueError(f"{address} answers {error.code} and is no Ray dashboard; give that one") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError, bad JSON a ValueError
        if isinstance(error, OSError):
            reason = getattr(error, "reason", None) or error
            raise ValueError(
                f"no Ray cluster answers at {address} ({getattr(reason, 'strerror', None) or reason}); start one, or "
                "open the way to its dashboard: ray dashboard cluster.yaml"
            ) from None
        raise ValueError(f"{address} is no Ray dashboard; give the dashboard's address, port 8265 as a rule") from None
    return found if isinstance(found, dict) else {}


def connect(address: str, headers: dict[str, str]) -> Any:
    """Ray's client of the Jobs API."""
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:  # what it leaves out of the package, and that a log has ended
        handler.setLevel(logging.ERROR)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers what stands there to what it is told
    return JobSubmissionClient(address, headers=headers)


def knock(address: str) -> None:
    """Raises ValueError when nobody answers at ``HOST:PORT``; other addresses (auto, ray://) are Ray's to judge."""
    if address.startswith(("http://", "https://")):
        raise ValueError(
            f"{address} is a dashboard, which takes jobs (python jobs/submit.py --address {address} train ...); a "
            "driver that runs here needs the cluster's own address, such as HOST:6379"
        )
    found = re.fullmatch(r"(?:ray://)?\[?([^/\s]+?)\]?:(\d{1,5})", address)
    if not found:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({getattr(error, 'strerror', None) or error}); start one "
            "(`ray start --head`) or leave the address out"
        ) from None


def refusal(address: str, error: Exception) -> ValueError:
    """Why a cluster did not let us in, in one line."""
    text = " ".join(str(error).split())
    if found := re.search(r"started with: Ray: (\S+) Python: (\S+)", text):
        try:
            check_versions(address, found[1], found[2])
        except ValueError as told:
            return told
    if "authentic" in text.lower() or "token" in text.lower():
        return ValueError(
            f"the cluster at {address!r} refuses the token of this machine (RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, "
            "else ~/.ray/auth_token); copy the cluster's (`ray get-auth-token` on the head prints it)"
        )
    return ValueError(
        f"no Ray cluster answers at {address!r} ({text[:200]}); start one (`ray start --head`) or leave the address out"
    )
