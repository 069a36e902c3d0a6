"""Access to the study: requires the shared or a personal link, refuses other sites' forms and large requests."""

import secrets
import sqlite3

from anyio.to_thread import run_sync
from fastapi import Response
from fastapi.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlvid.study.store import Store

INVITED = "rlvid.invited"
"""Key of a request's scope: whose own link it came by; None for the link that all share."""
MAX_BYTES = 8192
"""Of a body: a form of this site has less than 1,000."""
_FORM = b"application/x-www-form-urlencoded"
_HEADERS = {
    # Nothing is loaded from elsewhere, and no other site may show the pages in a frame or learn their address.
    b"content-security-policy": b"default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"referrer-policy": b"same-origin",
    b"x-content-type-options": b"nosniff",
}


class Gate:
    """Lets through only what has a token as the first part of its path, and what this site's own pages send.

    Args:
        app: behind the gate.
        store: knows who has a link of their own.
        token: of the link that all share; None where it needs none.
        shared: whether that link stays open once somebody was invited.
    """

    def __init__(self, app: ASGIApp, store: Store, token: str | None, shared: bool):
        self.app, self.store, self.token, self.shared = app, store, token, shared

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS.items()]
            await send(message)

        given, slash, _ = scope["path"][1:].partition("/")
        answer, invited = await run_sync(self._enter, given)
        if invited or self.token:
            if answer is None and not slash:
                answer = RedirectResponse(f"{scope['path']}/", 303)
            scope = {**scope, "root_path": f"/{given}"}
        scope = {**scope, INVITED: invited}
        origin = headers.get(b"origin", b"null").partition(b"://")[2]
        if scope["method"] == "POST" and answer is None:
            if b"origin" in headers and origin != headers.get(b"host"):
                answer = Response("This was sent by another site.\n", 403)
            elif headers.get(b"content-type", _FORM).partition(b";")[0].strip().lower() != _FORM:
                answer = Response("Only a form of this site is taken.\n", 415, {"connection": "close"})
            elif (body := await _body(receive, headers)) is None:
                answer = Response("That is more than a form has.\n", 413, {"connection": "close"})
            else:
                receive = _again(body, receive)
        await (answer or self.app)(scope, receive, guarded)

    def _enter(self, given: str) -> tuple[Response | None, str | None]:
        """Returns a refusal, if there is one, and whose own link it is."""
        try:
            invited = self.store.person_of(given) if given else None
            closed = not self.shared and bool(self.store.invited(revoked=True))
        except sqlite3.Error as error:
            return Response(f"Out of order: the study's file cannot be read ({error}); answers are safe.\n", 507), None
        if invited:
            return None, invited
        if closed:
            return Response("This study is by invitation; open your own link, or ask for one.\n", 403), None
        if self.token and not secrets.compare_digest(given.encode(), self.token.encode()):
            return Response("This address lacks the study's token; ask for the whole link.\n", 403), None
        return None, None


async def _body(receive: Receive, headers: dict[bytes, bytes]) -> bytes | None:
    """The whole body; None for one that is too large, of which no more is read."""
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 9 or int(length) > MAX_BYTES:
        return None
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Returns a body that was read already, and then what comes next."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
