"""Checks that a Ray cluster answers, accepts the token, and has this machine's versions; fails in seconds, in one line.

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
import urllib.parse
import urllib.request
from importlib.metadata import version
from typing import Any

from rlvid.cluster.token import PLACES, auth_token, tokens_are_off
from rlvid.credentials import refuse_credentials

_SECONDS = 10.0
"""Seconds that the cluster may take to answer."""


def check_cluster(address: str) -> dict[str, str]:
    """Checks that the cluster answers, accepts the token, and has this Ray and Python; returns the headers for it.

    Raises:
        ValueError: otherwise, in one line.
    """
    refuse_credentials(address if "://" in address else f"http://{address}", "--address or RAY_API_SERVER_ADDRESS")
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address {address!r}: give the dashboard's address, such as http://127.0.0.1:8265")
    _pass_proxies_by(address)
    headers: dict[str, str] = {}
    try:
        theirs = get_json(address, "/api/version", headers)
    except PermissionError:  # only a cluster that asks for a token is shown it
        held = auth_token()
        if held is None:
            raise _token_error(address, held) from None
        headers = {"Authorization": f"Bearer {held}"}
        try:
            theirs = get_json(address, "/api/version", headers)
        except PermissionError:
            raise _token_error(address, held) from None
    python = (get_json(address, "/api/v0/cluster_metadata", headers).get("data") or {}).get("pythonVersion")
    check_versions(address, str(theirs.get("ray_version")), python)
    return headers


def _pass_proxies_by(address: str) -> None:
    """Keeps requests to this machine, and the token, away from a proxy of the environment (http_proxy)."""
    found = re.match(r"https?://(?:(localhost|127\.[\d.]+)|\[(::1)\])(?:[:/]|$)", address)
    if found:
        listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = ",".join(filter(None, [listed, found[1] or found[2]]))


def _token_error(address: str, held: str | None) -> ValueError:
    """Makes the error of a cluster that refuses us: there is no token here, or ``held`` is wrong."""
    why = f"refuses the token of this machine (the first of {PLACES}); copy the cluster's there"
    if held is None:
        why = f"asks for a token and there is none here (looked for in {PLACES}); copy the cluster's into one of these"
    return ValueError(f"the cluster at {address} {why} (`ray get-auth-token` on the head prints it)")


def _no_answer(address: str, why: object) -> ValueError:
    return ValueError(
        f"no Ray cluster answers at {address!r} ({why}); start one (`ray start --head`) or leave the address out "
        "(--address, RAY_ADDRESS)"
    )


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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the token to whatever host an answer names."""

    def redirect_request(self, *_: Any) -> None:
        """Turns a redirect into an error."""


def get_json(address: str, path: str, headers: dict[str, str]) -> dict[str, Any]:
    """Returns the JSON at a path of the dashboard, {} where the path is unknown.

    Raises:
        ValueError: nobody answers, or not a Ray dashboard.
        PermissionError: without a token, or with a wrong one.
    """
    request = urllib.request.Request(address + path, headers=headers)
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=_SECONDS) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        if 300 <= error.code < 400:
            there = urllib.parse.urlsplit(error.headers.get("Location") or "")
            raise ValueError(
                f"{address} answers {error.code} and sends on to {there.scheme}://{there.netloc.rpartition('@')[2]}; "
                "the token goes to no other address: give the dashboard's own"
            ) from None
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
    """Returns Ray's client of the Jobs API."""
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:  # what it leaves out of the package, and that a log has ended
        handler.setLevel(logging.ERROR)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers what stands there to what it is told
    return JobSubmissionClient(address, headers=headers)


def reach(address: str) -> str:
    """Finds the cluster of ``HOST:PORT`` or ``auto``, and shows it the token if it asks for one; returns HOST:PORT.

    Ray itself shows a token only where RAY_AUTH_MODE says so, and tries for 20 seconds before it gives no reason.

    Raises:
        ValueError: another kind of address, nobody answers, not a cluster, or one that does not let us in.
    """
    if address == "auto":  # to Ray, too
        address = os.environ.get("RAY_ADDRESS") or "auto"
    refuse_credentials(address if "://" in address else f"ray://{address}", "--address or RAY_ADDRESS")
    if address.startswith(("http://", "https://")):
        raise ValueError(
            f"{address} is a dashboard, which takes jobs (python jobs/submit.py --address {address} train ...); a "
            "driver that runs here needs the cluster's own address, such as HOST:6379"
        )
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:/\s]+):(\d{1,5})", target := _resolve(address))
    if not found:
        raise ValueError(
            f"address {address!r} (--address, RAY_ADDRESS): expected HOST:PORT of the cluster, such as 10.0.0.1:6379, "
            "or auto; Ray Data does not run through Ray's client (ray://): send a job to the dashboard instead "
            "(python jobs/submit.py)"
        )
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise _no_answer(address, getattr(error, "strerror", None) or error) from None
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):  # certificates are Ray's to judge
        _show_token(address, target)
    return target


def _resolve(address: str) -> str:
    """Returns the address that ``auto`` stands for: the latest cluster of this machine."""
    if address != "auto":
        return address
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address(address))
    except ConnectionError:
        raise _no_answer(address, "none runs on this machine") from None


def _show_token(address: str, target: str) -> None:
    """Makes Ray send the token if the cluster requires it, after a check of the token."""
    if _lets_in(address, target, None):
        return
    held = auth_token()
    if held is None:
        raise _token_error(address, held)
    if tokens_are_off():
        raise ValueError(
            f"the cluster at {address} asks for a token, and RAY_AUTH_MODE = 'disabled' holds it back; unset it"
        )
    if not _lets_in(address, target, held):
        raise _token_error(address, held)
    os.environ["RAY_AUTH_MODE"] = "token"
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")  # which has read the environment when Ray was imported


def _lets_in(address: str, target: str, held: str | None) -> bool:
    """Returns whether the cluster answers a question of Ray's protocol, with a token or without."""
    import grpc

    metadata = [("authorization", f"Bearer {held}")] if held else None
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:  # as Ray does
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise ValueError(
                f"{address!r} (--address, RAY_ADDRESS) does not answer as a Ray cluster; give the cluster's own "
                "address, port 6379 as a rule"
            ) from None
    return True


def connection_error(address: str, error: Exception) -> ValueError:
    """Makes the error, in one line, of a cluster that refused the connection."""
    text = " ".join(str(error).split())
    if found := re.search(r"started with: Ray: (\S+) Python: (\S+)", text):
        try:
            check_versions(address, found[1], found[2])
        except ValueError as refusal:
            return refusal
    if "authentic" in text.lower() or "token" in text.lower():
        return _token_error(address, auth_token())
    return _no_answer(address, text[:200])
