"""Serves a study: on this machine alone, or elsewhere behind a token."""

import errno
import socket

import uvicorn
from starlette.types import ASGIApp

_MAX_BYTES_OF_HEAD = 16_384  # the request line and all headers: whoever sends more is answered with 400


def is_local(host: str) -> bool:
    """Returns whether only this machine can reach what listens there, by one of the names that pages then answer to."""
    return host in ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket; raises ValueError if the address is taken, unknown or not allowed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror or error}") from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that a killed server can start again at once
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is in use; choose another with --port") from error
        raise ValueError(f"--host {host} --port {port}: {error.strerror}") from error
    return listening


def address_of(listening: socket.socket, token: str | None) -> str:
    """Returns the address to open in a browser."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{f'{token}/' if token else ''}"


def run(app: ASGIApp, listening: socket.socket) -> None:
    """Serves until a signal interrupts it, which then raises KeyboardInterrupt."""
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, ws="none", lifespan="off", timeout_graceful_shutdown=3,
        access_log=False,  # it would keep the tokens, which are in the addresses
        http="h11", h11_max_incomplete_event_size=_MAX_BYTES_OF_HEAD, limit_concurrency=1000,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])
