"""A link a person, and how many bytes a stranger can make the server take."""

import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import uvicorn
from studies import begin, client, fields, one_line, rlvid
from watched import make_evaluation

from rlvid.study.app import create_app
from rlvid.study.gate import MAX_BYTES
from rlvid.study.pairs import AXES
from rlvid.study.results import summarise
from rlvid.study.serve import listen, run
from rlvid.study.store import Store
from rlvid.study.videos import Videos

SAID = {"quality": "left", "alignment": "right"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_evaluation(tmp_path / "evaluation")


@pytest.fixture
def store(folder: Path) -> Store:
    return begin(folder, count=3)


def test_a_link_answers_under_its_own_name_alone(store: Store) -> None:
    tokens = store.invite(["Ada", "Ben"])
    pages = client(store)
    page = pages.get(f"/{tokens['Ada']}/").text
    assert "You answer as <strong>Ada</strong>" in page
    assert "Your name" not in page
    assert "Pair 1" in pages.post(f"/{tokens['Ada']}/start", data=fields(page)).text
    page = pages.get(f"/{tokens['Ada']}/judge?annotator=ada").text
    assert "Pair 2" in pages.post(f"/{tokens['Ada']}/answer", data=fields(page) | SAID).text
    for name in ("Ben", "ben", "Carl"):
        for answer in (
            pages.get(f"/{tokens['Ada']}/judge", params={"annotator": name}),
            pages.get(f"/{tokens['Ada']}/video", params={"annotator": name, "pair": 0}),
            pages.post(f"/{tokens['Ada']}/start", data={"annotator": name}),
            pages.post(f"/{tokens['Ada']}/answer", data=fields(page) | SAID | {"annotator": name}),
        ):
            assert answer.status_code == 403
            assert "This link is Ada" in answer.text
    assert {(each.annotator, each.invited) for each in store.answers()} == {("Ada", True)}
    second = client(store).get(f"/{tokens['Ada']}/judge?annotator=Ada").text  # another device
    assert "Pair 2" in second


def test_the_shared_link_closes_with_the_first_invitation_and_stays_open_by_choice(store: Store) -> None:
    closed, opened = client(store, token="all", local=False), client(store, token="all", local=False, shared=True)
    assert closed.get("/all/").status_code == 200
    token = store.invite(["Ada"])["Ada"]
    for path in ("/all/", "/", "/all/judge?annotator=Eve", "/all/static/study.css", "/x/"):
        assert closed.get(path).status_code == 403, path
    assert "by invitation" in closed.get("/all/").text
    assert closed.get(f"/{token}").url.path == f"/{token}/"
    assert opened.post("/all/start", data={"annotator": "Eve"}).status_code == 200
    for name in ("Ada", "ADA", " ada "):
        refused = opened.post("/all/start", data={"annotator": name})
        assert refused.status_code == 403
        assert "link of their own" in refused.text
    assert client(store).get("/").status_code == 403  # on this machine too


def test_a_second_invitation_replaces_the_first_and_revoking_ends_it(store: Store) -> None:
    pages, first = client(store), store.invite(["Ada"])["Ada"]
    second = store.invite(["ADA"])["ADA"]
    assert pages.get(f"/{first}/").status_code == 403
    assert pages.get(f"/{second}/").status_code == 200
    assert store.invited() == ["ADA"]
    store.revoke(["ada"])
    assert pages.get(f"/{second}/").status_code == 403
    assert pages.get("/").status_code == 403  # to revoke the last link opens the study to nobody
    with pytest.raises(ValueError, match=r"--revoke 'ada'"):
        store.revoke(["ada"])
    for wrong in (["Ada", "ada"], [" "], ["a\x00"], ["x" * 61]):
        with pytest.raises(ValueError, match=r"name"):
            store.invite(wrong)
    assert store.invited() == []


def test_no_token_can_be_read_from_the_file(store: Store) -> None:
    tokens = store.invite(["Ada", "Ben"])
    with closing(sqlite3.connect(store.path)) as database:
        content = "\n".join(database.iterdump())
    assert "Ada" in content
    assert not any(token in content for token in tokens.values())
    assert all(len(token) >= 32 for token in tokens.values())


def test_results_say_by_whose_link(store: Store) -> None:
    store.save(0, "Ada", 0, dict.fromkeys(AXES, "left"), True)
    store.save(0, "Ben", 0, dict.fromkeys(AXES, "left"))
    store.save(0, "Carl", 0, dict.fromkeys(AXES, "left"))
    store.save(0, "Carl", 1, dict.fromkeys(AXES, "left"), True)
    people = summarise(store.study(), store.answers(), {}).people
    assert {person.name: person.link for person in people} == {"Ada": "own", "Ben": "shared", "Carl": "both"}


def test_the_command_prints_a_link_for_each_and_says_what_is_wrong(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rlvid(monkeypatch, "invite", str(folder), "Ada") == 2  # never served: nobody knows where it is
    one_line(capsys, ["--address"])
    store.served_at("http://machine:8300/")
    assert rlvid(monkeypatch, "invite", str(folder), "Ada", "Ben Li") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("http")[0].strip() for line in lines] == ["Ada", "Ben Li"]
    path = lines[1].partition("http://machine:8300")[2]
    assert "You answer as <strong>Ben Li</strong>" in client(store).get(path).text
    assert rlvid(monkeypatch, "invite", str(folder), "Ada", "--address", "https://a.org/x/") == 0
    assert "https://a.org/x/" in capsys.readouterr().out
    assert rlvid(monkeypatch, "invite", str(folder), "--revoke", "Ada") == 0
    assert store.invited() == ["Ben Li"]
    capsys.readouterr()
    assert rlvid(monkeypatch, "invite", str(folder)) == 2
    one_line(capsys, ["no NAME"])
    assert rlvid(monkeypatch, "invite", str(folder / "nothing.sqlite"), "Ada") == 2
    one_line(capsys, ["no such study"])


# ------------------------------------------------------------------------------------------------ bytes


def test_a_body_is_read_no_further_than_a_form_goes(store: Store) -> None:
    taken = []

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            taken.append(1)
            yield b"a=" + b"x" * 1022

    pages = client(store)
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert pages.post("/start", content=b"annotator=" + b"x" * MAX_BYTES, headers=form).status_code == 413
    assert pages.post("/answer", content=b"&a=1" * 3000, headers=form).status_code == 413
    assert pages.post("/start", content=endless(), headers=form).status_code == 413
    for wrong in ("-1", "1e3", "9" * 50, "", "+5"):
        headers = form | {"content-length": wrong}
        assert pages.post("/start", content=b"annotator=a", headers=headers).status_code == 413, wrong
    assert pages.post("/start", content=b"a&" * 4000, headers=form).status_code in (400, 422)
    assert pages.post("/start", files={"annotator": b"x" * 100}).status_code == 415
    assert pages.post("/start", content=b"{}", headers={"content-type": "application/json"}).status_code == 415
    assert pages.post("/start", data={"annotator": "Ada"}).status_code == 200
    assert store.answers() == []


@pytest.fixture
def address(store: Store) -> Iterator[tuple[str, int]]:
    """Of a server as the command runs it."""
    listening = listen("127.0.0.1", 0)
    app = create_app(store, Videos(store.study().evaluation))
    with pytest.MonkeyPatch.context() as patch:
        servers: list[uvicorn.Server] = []
        begun = uvicorn.Server.__init__

        def note(self: uvicorn.Server, config: uvicorn.Config) -> None:
            begun(self, config)
            servers.append(self)

        patch.setattr(uvicorn.Server, "__init__", note)
        thread = threading.Thread(target=run, args=(app, listening), daemon=True)
        thread.start()
        # Before a test pytest walks through all loggers, and a server that starts makes some.
        end = time.monotonic() + 60
        while not (servers and servers[0].started):
            assert thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.01)
        yield listening.getsockname()
        servers[0].should_exit = True
        thread.join(20)


def sent(address: tuple[str, int], head: bytes, block: bytes, many: int) -> tuple[int, bytes]:
    """How many blocks went out before the server hung up, and what it answered."""
    with socket.create_connection(address, 20) as connection:
        count = 0
        try:
            connection.sendall(head)
            while count < many:
                connection.sendall(block)
                count += 1
        except OSError:
            pass
        connection.settimeout(20)
        try:
            return count, connection.recv(4096)
        except OSError:
            return count, b""


def test_a_server_hangs_up_on_whoever_sends_without_end(
    address: tuple[str, int], capfd: pytest.CaptureFixture[str], store: Store
) -> None:
    form = b"Host: 127.0.0.1\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    head = b"POST /start HTTP/1.1\r\n" + form
    block = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    count, _ = sent(address, head + b"Transfer-Encoding: chunked\r\n\r\n", block, 2000)
    assert count < 500, "a chunked body of 130 MB was taken"
    count, answer = sent(address, head + b"Content-Length: 900000000\r\n\r\n", b"x" * 65536, 2000)
    assert count < 500
    count, answer = sent(address, b"GET / HTTP/1.1\r\n", b"A: " + b"x" * 60000 + b"\r\n", 100)
    assert answer.startswith(b"HTTP/1.1 4") or not answer
    token = store.invite(["Ada"])["Ada"]
    _, answer = sent(address, b"GET /" + token.encode() + b"/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"", 0)
    assert answer.startswith(b"HTTP/1.1 200")
    told = capfd.readouterr()
    assert token not in told.out + told.err
