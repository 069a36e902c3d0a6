"""The study's web application: a start page, a page for each pair, and its moving picture."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

from fastapi import FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from rlvid.study.film import RecentFilms, side_by_side, under_noise
from rlvid.study.gate import INVITED, Gate
from rlvid.study.pairs import Pair, noise_seed, order, second_on_left
from rlvid.study.preferences import difference
from rlvid.study.store import SIDES, AnsweredOtherwiseError, Side, Store, name_of
from rlvid.study.videos import Videos
from rlvid.terminal import complain

LOCAL = ["127.0.0.1", "localhost", "[::1]"]
_KEPT = 256 * 2**20
"""Bytes of films that are kept at most."""
_HERE = Path(__file__).parent


class Refusal(Exception):
    """An error that is shown to the annotator as a page, with a link to continue."""

    def __init__(self, status: int, title: str, text: str, onward: str = "./", label: str = "To the first page"):
        super().__init__(title)
        self.status = status
        self.page = {"title": title, "text": text, "onward": onward, "label": label}


class Site:
    """The pages of one study; for its arguments see ``create_app``."""

    def __init__(self, store: Store, videos: Videos, annotators: Sequence[str]) -> None:
        self.store, self.videos, self.annotators = store, videos, annotators
        self.study = store.study()
        self.pairs = {pair.number: pair for pair in self.study.pairs}
        self._templates = Jinja2Templates(_HERE / "templates")
        self._films = RecentFilms(_KEPT)

    def start(self, request: Request) -> Response:
        """Returns the first page."""
        content = {"annotators": self.annotators, "count": len(self.pairs), "invited": request.scope[INVITED]}
        return self._page(request, "start.html", content)

    def begin(self, request: Request, annotator: Annotated[str, Form()] = "") -> Response:
        """Takes a name, and leads to its next open pair."""
        return RedirectResponse(_judge_url(self._known(request, annotator)), 303)

    def judge(self, request: Request, annotator: str) -> Response:
        """Returns the page of somebody's next open pair, or of thanks."""
        annotator = self._known(request, annotator)
        done = self.store.answered(annotator)
        left = [number for number in order(self.study.seed, annotator, self.pairs) if number not in done]
        about = {"annotator": annotator, "count": len(self.pairs), "done": len(self.pairs) - len(left)}
        if not left:
            return self._page(request, "done.html", about | {"invited": request.scope[INVITED]})
        with _readable(annotator):
            self._check(self.pairs[left[0]])
        key = self.study.key
        films = ["video?" + urlencode({"annotator": annotator, "pair": n, "study": key}) for n in left[:2]]
        shown = {"pair": self.pairs[left[0]], "study": key, "film": films[0], "following": films[1:]}
        return self._page(request, "judge.html", about | shown)

    def answer(
        self, request: Request, annotator: Annotated[str, Form()], pair: Annotated[int, Form()],
        key: Annotated[str, Form(alias="study")],
        quality: Annotated[Side | None, Form()] = None, alignment: Annotated[Side | None, Form()] = None,
    ) -> Response:  # fmt: skip
        """Saves the answers about a pair."""
        annotator, study = self._known(request, annotator), self.study
        onward = {"onward": _judge_url(annotator), "label": "Go on with the next open pair"}
        if key != study.key or pair not in self.pairs:
            raise Refusal(409, "Another study", "That page belonged to another study; nothing was saved.", **onward)
        if quality not in SIDES or alignment not in SIDES:
            raise Refusal(422, "One answer is missing", "Both questions need an answer; nothing was saved.", **onward)
        try:
            sides = {"quality": quality, "alignment": alignment}
            self.store.save(study.seed, annotator, pair, sides, bool(request.scope[INVITED]))
        except AnsweredOtherwiseError:
            text = f"{annotator} has answered this pair before, perhaps in another window. That first answer stands."
            raise Refusal(409, "Already answered", text, **onward) from None
        except sqlite3.OperationalError as error:
            text = (
                f"The answer was not saved ({error}). Tell whoever runs this study; earlier answers are safe. "
                "When there is room again, answer this pair once more."
            )
            raise Refusal(507, "Not saved", text, **onward | {"label": "Try this pair again"}) from error
        return RedirectResponse(_judge_url(annotator), 303)

    def video(self, request: Request, annotator: str, pair: int, still: bool = False) -> Response:
        """Returns the moving picture of a pair; the address also names the study, for the browser's cache."""
        if pair not in self.pairs:
            raise Refusal(404, "No such pair", "There is no such video.")
        annotator = self._known(request, annotator)
        with _readable(annotator):
            wanted = self.pairs[pair], second_on_left(self.study.seed, annotator, pair), still
            made = self._films.get(wanted, lambda: self._render(*wanted))
        return Response(made, media_type="image/webp", headers={"cache-control": "private, max-age=86400"})

    def refuse(self, request: Request, error: Exception) -> Response:
        """Returns the page of an error that a request ended with."""
        if isinstance(error, sqlite3.Error):
            text = f"The study's file cannot be read ({error}). Tell whoever runs this study; answers are safe."
            error = Refusal(507, "Out of order", text)
        elif isinstance(error, RequestValidationError):
            text = "The address or the form is incomplete; nothing was saved."
            error = Refusal(422, "That cannot be read", text)
        elif isinstance(error, HTTPException):
            error = Refusal(error.status_code, "No such page", str(error.detail))
        assert isinstance(error, Refusal)
        return self._page(request, "message.html", dict(error.page), error.status)

    def _page(self, request: Request, name: str, content: dict[str, object], status: int = 200) -> Response:
        headers = {"cache-control": "no-store, must-revalidate"}
        return self._templates.TemplateResponse(request, name, content, status, headers=headers)

    def _known(self, request: Request, given: str) -> str:
        """Returns the name of the person who asks, as it was first written; raises Refusal if they may not use it."""
        invited = request.scope[INVITED]
        try:
            name = name_of(given or invited or "")
        except ValueError as error:
            text = "Give a name of 1 to 60 characters, the same one each time."
            raise Refusal(422, "A name is needed", text) from error
        if invited and name.casefold() != invited.casefold():
            raise Refusal(403, "Somebody else's name", f"This link is {invited}'s; answer with your own.")
        if not invited and name.casefold() in {each.casefold() for each in self.store.invited(revoked=True)}:
            raise Refusal(403, "Not by this link", f"{name} has a link of their own; open that one.")
        if self.annotators and name.casefold() not in {each.casefold() for each in self.annotators}:
            raise Refusal(403, "Not on the list", f"{name} is not among those who were asked to answer.")
        written = [*filter(None, [invited]), *self.annotators, *self.store.annotators()]
        return {each.casefold(): each for each in written}.get(name.casefold(), name)

    def _check(self, pair: Pair) -> None:
        if reason := difference(pair, self.videos):
            raise ValueError(f"{reason}; evaluate with the settings of then ({self.study.settings}), and serve again")

    def _render(self, pair: Pair, swapped: bool, still: bool) -> bytes:
        self._check(pair)
        first, second = (self.videos.pixels(model, pair.case) for model in (pair.first, pair.second))
        if pair.check:
            second = under_noise(first, noise_seed(self.study.seed, pair.number))
        left, right = (second, first) if swapped else (first, second)
        return side_by_side(left, right, self.videos.fps(pair.first, pair.case), still)


def _judge_url(annotator: str) -> str:
    return "judge?" + urlencode({"annotator": annotator})


@contextmanager
def _readable(annotator: str) -> Iterator[None]:
    """Refuses where videos are no longer those of the study."""
    try:
        yield
    except (ValueError, OSError) as error:
        complain(error, 1)  # it names a model: for whoever runs the study, not for who answers
        text = (
            "The evaluation has changed since this study began, so this pair's videos are not there. Answers so "
            "far are safe. Tell whoever runs this study; the terminal says how to go on."
        )
        raise Refusal(503, "No videos", text, _judge_url(annotator), "Try this pair again") from error


def create_app(
    store: Store,
    videos: Videos,
    annotators: Sequence[str] = (),
    token: str | None = None,
    local: bool = True,
    shared: bool = False,
) -> FastAPI:
    """Returns the application for one study.

    Args:
        store: of the study.
        videos: that it is about.
        annotators: who may answer; empty: whoever gives a name.
        token: that the address which all share begins with, if any.
        local: whether only this machine's own names are answered to.
        shared: whether that address stays open once people have links of their own.
    """
    site, app = Site(store, videos, annotators), FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.mount("/static", StaticFiles(directory=_HERE / "static"))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL if local else ["*"], www_redirect=False)
    app.add_middleware(Gate, store=store, token=token, shared=shared)
    app.get("/")(site.start)
    app.post("/start")(site.begin)
    app.get("/judge")(site.judge)
    app.post("/answer")(site.answer)
    app.get("/video")(site.video)
    for kind in (Refusal, sqlite3.Error, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, site.refuse)
    return app
