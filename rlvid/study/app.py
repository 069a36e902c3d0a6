"""The study's web application: a start page, a page for each pair, and its moving picture."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
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

from rlvid.study.film import side_by_side, under_noise
from rlvid.study.gate import INVITED, Gate
from rlvid.study.pairs import Pair, noise_seed, order, second_on_left
from rlvid.study.preferences import difference
from rlvid.study.store import SIDES, AnsweredOtherwiseError, Side, Store, name_of
from rlvid.study.videos import Videos
from rlvid.terminal import complain

LOCAL = ["127.0.0.1", "localhost", "[::1]"]
_HERE = Path(__file__).parent


class Refusal(Exception):
    """An error that is shown to the annotator as a page, with a link to continue."""

    def __init__(self, status: int, title: str, text: str, onward: str = "./", label: str = "To the first page"):
        super().__init__(title)
        self.status = status
        self.page = {"title": title, "text": text, "onward": onward, "label": label}


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
    study = store.study()
    pairs = {pair.number: pair for pair in study.pairs}
    templates = Jinja2Templates(_HERE / "templates")
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.mount("/static", StaticFiles(directory=_HERE / "static"))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL if local else ["*"], www_redirect=False)
    app.add_middleware(Gate, store=store, token=token, shared=shared)

    def page(request: Request, name: str, content: dict[str, object], status: int = 200) -> Response:
        return templates.TemplateResponse(
            request, name, content, status, headers={"cache-control": "no-store, must-revalidate"}
        )

    def known(request: Request, given: str) -> str:
        invited = request.scope[INVITED]
        try:
            name = name_of(given or invited or "")
        except ValueError as error:
            text = "Give a name of 1 to 60 characters, the same one each time."
            raise Refusal(422, "A name is needed", text) from error
        if invited and name.casefold() != invited.casefold():
            raise Refusal(403, "Somebody else's name", f"This link is {invited}'s; answer with your own.")
        if not invited and name.casefold() in {each.casefold() for each in store.invited(revoked=True)}:
            raise Refusal(403, "Not by this link", f"{name} has a link of their own; open that one.")
        if annotators and name.casefold() not in {each.casefold() for each in annotators}:
            raise Refusal(403, "Not on the list", f"{name} is not among those who were asked to answer.")
        names = {each.casefold(): each for each in [*filter(None, [invited]), *annotators, *store.annotators()]}
        return names.get(name.casefold(), name)  # as it was written the first time

    def rest(annotator: str) -> list[int]:
        done = store.answered(annotator)
        return [number for number in order(study.seed, annotator, pairs) if number not in done]

    def to_judge(annotator: str) -> str:
        return "judge?" + urlencode({"annotator": annotator})

    def film(annotator: str, number: int) -> str:
        return "video?" + urlencode({"annotator": annotator, "pair": number, "study": study.key})

    def check(pair: Pair) -> None:
        if reason := difference(pair, videos):
            raise ValueError(f"{reason}; evaluate with the settings of then ({study.settings}), and serve again")

    @contextmanager
    def readable(annotator: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            complain(error, 1)  # it names a model: for whoever runs the study, not for who answers
            text = (
                "The evaluation has changed since this study began, so this pair's videos are not there. Answers so "
                "far are safe. Tell whoever runs this study; the terminal says how to go on."
            )
            raise Refusal(503, "No videos", text, to_judge(annotator), "Try this pair again") from error

    @lru_cache(maxsize=32)
    def picture(number: int, swapped: bool, still: bool) -> bytes:
        pair = pairs[number]
        check(pair)
        first, second = (videos.pixels(model, pair.case) for model in (pair.first, pair.second))
        if pair.check:
            second = under_noise(first, noise_seed(study.seed, number))
        left, right = (second, first) if swapped else (first, second)
        return side_by_side(left, right, videos.fps(pair.first, pair.case), still)

    @app.get("/")
    def start(request: Request) -> Response:
        return page(
            request,
            "start.html",
            {"annotators": annotators, "count": len(pairs), "invited": request.scope[INVITED]},
        )

    @app.post("/start")
    def begin(request: Request, annotator: Annotated[str, Form()] = "") -> Response:
        return RedirectResponse(to_judge(known(request, annotator)), 303)

    @app.get("/judge")
    def judge(request: Request, annotator: str) -> Response:
        annotator = known(request, annotator)
        left = rest(annotator)
        about = {"annotator": annotator, "count": len(pairs), "done": len(pairs) - len(left)}
        if not left:
            return page(request, "done.html", about | {"invited": request.scope[INVITED]})
        with readable(annotator):
            check(pairs[left[0]])
        films = [film(annotator, number) for number in left[:2]]
        shown = {"pair": pairs[left[0]], "study": study.key, "film": films[0], "following": films[1:]}
        return page(request, "judge.html", about | shown)

    @app.post("/answer")
    def answer(
        request: Request, annotator: Annotated[str, Form()], pair: Annotated[int, Form()],
        key: Annotated[str, Form(alias="study")],
        quality: Annotated[Side | None, Form()] = None, alignment: Annotated[Side | None, Form()] = None,
    ) -> Response:  # fmt: skip
        annotator = known(request, annotator)
        onward = {"onward": to_judge(annotator), "label": "Go on with the next open pair"}
        if key != study.key or pair not in pairs:
            raise Refusal(409, "Another study", "That page belonged to another study; nothing was saved.", **onward)
        if quality not in SIDES or alignment not in SIDES:
            raise Refusal(422, "One answer is missing", "Both questions need an answer; nothing was saved.", **onward)
        try:
            sides = {"quality": quality, "alignment": alignment}
            store.save(study.seed, annotator, pair, sides, bool(request.scope[INVITED]))
        except AnsweredOtherwiseError:
            text = f"{annotator} has answered this pair before, perhaps in another window. That first answer stands."
            raise Refusal(409, "Already answered", text, **onward) from None
        except sqlite3.OperationalError as error:
            text = (
                f"The answer was not saved ({error}). Tell whoever runs this study; earlier answers are safe. "
                "When there is room again, answer this pair once more."
            )
            raise Refusal(507, "Not saved", text, **onward | {"label": "Try this pair again"}) from error
        return RedirectResponse(to_judge(annotator), 303)

    @app.get("/video")
    def video(
        request: Request, annotator: str, pair: int, still: bool = False
    ) -> Response:  # its "study" is for the browser's cache
        if pair not in pairs:
            raise Refusal(404, "No such pair", "There is no such video.")
        annotator = known(request, annotator)
        with readable(annotator):
            made = picture(pair, second_on_left(study.seed, annotator, pair), still)
        return Response(made, media_type="image/webp", headers={"cache-control": "private, max-age=86400"})

    @app.exception_handler(Refusal)
    def refuse(request: Request, error: Refusal) -> Response:
        return page(request, "message.html", dict(error.page), error.status)

    @app.exception_handler(sqlite3.Error)
    def out_of_order(request: Request, error: sqlite3.Error) -> Response:
        text = f"The study's file cannot be read ({error}). Tell whoever runs this study; answers are safe."
        return refuse(request, Refusal(507, "Out of order", text))

    @app.exception_handler(RequestValidationError)
    def incomplete(request: Request, error: RequestValidationError) -> Response:
        text = "The address or the form is incomplete; nothing was saved."
        return refuse(request, Refusal(422, "That cannot be read", text))

    @app.exception_handler(HTTPException)
    def missing(request: Request, error: HTTPException) -> Response:
        return refuse(request, Refusal(error.status_code, "No such page", str(error.detail)))

    return app
