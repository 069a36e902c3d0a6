"""A study: which pairs are asked, what the file keeps, and what the pages do."""

import re
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, ImageSequence
from studies import begin, client, fields
from watched import PROMPTS, frames, make_evaluation

from rlvid.evaluate.results.videos import decode_frames
from rlvid.study.pairs import AXES, choose_pairs, order, second_on_left
from rlvid.study.serve import is_local
from rlvid.study.store import SIDES, AnsweredOtherwiseError, Store
from rlvid.study.videos import Videos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_evaluation(tmp_path / "evaluation", ("base", "tuned", "best"), steps=(20, 50))


# ----------------------------------------------------------------------------------------------- pairs


def test_pairs_share_prompt_and_noise_and_are_spread_evenly(folder: Path) -> None:
    videos = Videos(folder)
    pairs = choose_pairs(videos, [], 12, 0, seed=0)
    assert pairs == choose_pairs(videos, [], 12, 0, seed=0)
    assert pairs != choose_pairs(videos, [], 12, 0, seed=1)
    assert len({(pair.case, pair.first, pair.second) for pair in pairs}) == 12
    assert all(pair.prompt == PROMPTS["in_domain"][pair.case.index] for pair in pairs)
    groups = [(pair.case.steps, pair.first, pair.second) for pair in pairs]
    assert {groups.count(group) for group in groups} == {2}  # 2 D x 3 pairs of models, 12 pairs
    assert len(choose_pairs(videos, [], 100, 0, seed=0)) == 18


def test_checks_are_strewn_among_the_pairs(folder: Path) -> None:
    pairs = choose_pairs(Videos(folder), ["base", "best"], 5, 3, seed=0)
    checks = [pair.number for pair in pairs if pair.check]
    assert len(pairs) == 8
    assert len(checks) == 3
    assert checks != [5, 6, 7]
    assert all(pair.first == pair.second for pair in pairs if pair.check)


def test_sides_and_order_belong_to_annotator_and_pair() -> None:
    sides = [[second_on_left(0, name, number) for number in range(1000)] for name in ("ada", "ben")]
    assert [second_on_left(0, "ada", number) for number in (7, 3)] == [sides[0][7], sides[0][3]]
    assert all(450 < sum(each) < 550 for each in sides)
    assert 450 < sum(a == b for a, b in zip(*sides, strict=True)) < 550
    assert order(0, "ada", range(50)) == order(0, "ada", range(49, -1, -1)) != order(0, "ben", range(50))


# ----------------------------------------------------------------------------------------------- store


def test_answers_are_kept_once_and_the_first_ones_stand(folder: Path) -> None:
    store = begin(folder)
    said = {"quality": "left", "alignment": "tie"}
    store.save(0, "ada", 2, said)
    store.save(0, "ada", 2, said)  # sent twice: nothing new
    with pytest.raises(AnsweredOtherwiseError):
        store.save(0, "ada", 2, said | {"alignment": "right"})
    store.save(0, "ben", 2, {"quality": "right", "alignment": "right"})
    found = {(each.annotator, each.axis): (each.answer, each.chosen) for each in store.answers()}
    left = {name: "second" if second_on_left(0, name, 2) else "first" for name in ("ada", "ben")}
    right = "first" if left["ben"] == "second" else "second"
    assert found == {
        ("ada", "quality"): ("left", left["ada"]), ("ada", "alignment"): ("tie", "tie"),
        ("ben", "quality"): ("right", right), ("ben", "alignment"): ("right", right),
    }  # fmt: skip
    assert store.answered("ada") == {2}


def test_a_name_in_other_capitals_is_the_same_person_with_the_same_sides(folder: Path) -> None:
    names = ("Ada", "ada", "ADA")
    for number in range(40):
        assert len({second_on_left(0, name, number) for name in names}) == 1
    store = begin(folder)
    pages = client(store)
    early = {name: fields(pages.get("/judge", params={"annotator": name}).text) for name in names[:2]}
    assert early["Ada"]["pair"] == early["ada"]["pair"]
    said = {"quality": "left", "alignment": "right"}
    number = int(early["Ada"]["pair"])
    seen = [pages.get("/video", params={"annotator": name, "pair": number}).content for name in names[:2]]
    assert seen[0] == seen[1]
    assert pages.post("/answer", data=early["Ada"] | said).status_code == 200
    assert pages.post("/answer", data=early["ada"] | said | {"quality": "tie"}).status_code == 409
    store.save(0, "ADA", (number + 1) % 4, said)  # as two windows do whose names were both new
    assert store.annotators() == ["Ada"]
    assert store.answered("Ada") == {number, (number + 1) % 4}


def test_of_many_windows_at_once_one_answer_stands_and_none_is_doubled(folder: Path) -> None:
    store = begin(folder)

    def answer(turn: int) -> bool:
        try:
            store.save(0, ("Ada", "ada")[turn % 2], 0, dict.fromkeys(AXES, SIDES[turn % 3]))
        except AnsweredOtherwiseError:
            return False
        return True

    with ThreadPoolExecutor(8) as windows:
        stood = list(windows.map(answer, range(24)))
    found = store.answers()
    assert len(found) == len(AXES)
    (side,) = {each.answer for each in found}
    assert stood == [SIDES[turn % 3] == side for turn in range(24)]


def test_a_study_is_taken_up_again_and_never_mixed_with_another(folder: Path) -> None:
    first = begin(folder)
    first.save(0, "ada", 1, dict.fromkeys(AXES, "left"))
    again = begin(folder)
    assert again.study() == first.study()
    assert again.answered("ada") == {1}
    for other in ({"count": 3}, {"seed": 1}, {"checks": 1}):
        with pytest.raises(ValueError, match="belongs to another study"):
            begin(folder, **other)
    make_evaluation(folder, ("tuned", "base", "best"), steps=(20, 50))  # the same names, other videos
    with pytest.raises(ValueError, match="belongs to another study"):
        begin(folder)


@pytest.mark.parametrize("content", [b"no database" * 100, None], ids=["text", "another database"])
def test_a_file_of_something_else_is_refused_and_left_alone(folder: Path, content: bytes | None) -> None:
    path = folder / "study.sqlite"
    if content is None:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE shopping (thing TEXT)")
        database.close()
        content = path.read_bytes()
        message = "not of a study"
    else:
        path.write_bytes(content)
        message = "not a database"
    with pytest.raises(ValueError, match=message):
        begin(folder)
    assert path.read_bytes() == content


def test_a_study_whose_making_was_cut_off_is_made_anew(folder: Path) -> None:
    (folder / "study.sqlite").touch()
    assert len(begin(folder).study().pairs) == 4


# ------------------------------------------------------------------------------------------------ pages


def test_a_whole_study_through_the_pages(folder: Path) -> None:
    store = begin(folder, checks=1)
    pages = client(store)
    page = pages.post("/start", data={"annotator": "  Ada   Łovelace "})
    assert page.url.params["annotator"] == "Ada Łovelace"
    for turn in range(5):
        assert f"<h1>Pair {turn + 1} of 5</h1>" in page.text
        assert not re.search(r"\b(base|tuned|best|Base|Tuned|Best)\b", page.text)
        hidden = fields(page.text)
        assert int(hidden["pair"]) == order(0, "Ada Łovelace", range(5))[turn]
        page = pages.post("/answer", data=hidden | {"quality": "left", "alignment": "right"})
    assert "Thank you, Ada Łovelace" in page.text
    assert len(store.answers()) == 10
    page = pages.get("/judge", params={"annotator": "ada łovelace"})  # the same person
    assert "Thank you" in page.text


def test_the_picture_shows_both_videos_each_on_its_side(folder: Path) -> None:
    store = begin(folder, count=6)
    pages = client(store)
    for pair in store.study().pairs:
        film = pages.get("/video", params={"annotator": "ada", "pair": pair.number})
        image = Image.open(BytesIO(film.content))
        assert image.info["loop"] == 0
        shown = np.stack([np.asarray(each.convert("RGB")) for each in ImageSequence.Iterator(image)])
        names = [pair.first, pair.second][:: -1 if second_on_left(0, "ada", pair.number) else 1]
        models = [["base", "tuned", "best"].index(name) for name in names]
        case = pair.case
        wanted = [decode_frames(frames(model, case.index, case.steps + case.copy), "") for model in models]
        assert np.array_equal(shown, np.concatenate(wanted, axis=2))
        assert not any(name.encode() in film.content for name in names)
        still = pages.get("/video", params={"annotator": "ada", "pair": pair.number, "still": True})
        assert getattr(Image.open(BytesIO(still.content)), "n_frames", 1) == 1


def test_a_second_window_gets_a_clear_word(folder: Path) -> None:
    store = begin(folder)
    pages = client(store)
    hidden = fields(pages.get("/judge", params={"annotator": "ada"}).text)
    first = hidden | {"quality": "left", "alignment": "right"}
    assert pages.post("/answer", data=first).status_code == 200
    assert pages.post("/answer", data=first).status_code == 200
    late = pages.post("/answer", data=first | {"quality": "tie"})
    assert late.status_code == 409
    assert "first answer stands" in late.text
    assert [each.answer for each in store.answers()] == ["right", "left"]


def test_a_full_disk_is_said_and_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begin(folder, count=18)
    pages, connect = client(store), store._connect

    def no_room() -> sqlite3.Connection:
        database = connect()
        database.execute("PRAGMA max_page_count = 1")  # SQLite's own limit: not one page more
        return database

    def say(turn: int) -> tuple[int, str]:
        hidden = fields(pages.get("/judge", params={"annotator": f"{turn:060d}"}).text)
        page = pages.post("/answer", data=hidden | {"quality": "left", "alignment": "tie"})
        return page.status_code, page.text

    assert say(0)[0] == 200
    with monkeypatch.context() as full:
        full.setattr(store, "_connect", no_room)
        said = [say(turn) for turn in range(1, 31)]
    codes = [code for code, _ in said]
    assert set(codes) == {200, 507}  # what fits into the last page is still saved
    assert all("was not saved" in text and "full" in text for code, text in said if code == 507)
    assert len(store.answers()) == 2 * (1 + codes.count(200))
    assert say(99)[0] == 200


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ({"annotator": " "}, 422, "A name is needed"),
        ({"annotator": "a\x00b"}, 422, "A name is needed"),
        ({"pair": "4"}, 409, "another study"),
        ({"study": "0123"}, 409, "another study"),
        ({"pair": "many"}, 422, "incomplete"),
        ({"quality": ""}, 422, "nothing was saved"),
        ({"quality": "up"}, 422, "incomplete"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, given: dict[str, str], status: int, words: str) -> None:
    store = begin(folder)
    pages = client(store)
    hidden = fields(pages.get("/judge", params={"annotator": "ada"}).text)
    page = pages.post("/answer", data=hidden | {"quality": "left", "alignment": "right"} | given)
    assert page.status_code == status
    assert words in page.text
    assert store.answers() == []


def test_other_pages_other_sites_and_other_hosts(folder: Path) -> None:
    pages = client(begin(folder))
    assert pages.get("/openapi.json").status_code == 404
    assert pages.get("/video?annotator=a&pair=99").status_code == 404
    assert pages.post("/start", data={"annotator": "a"}, headers={"origin": "http://evil.test"}).status_code == 403
    assert pages.post("/start", data={"annotator": "a"}, headers={"origin": "null"}).status_code == 403
    assert pages.post("/start", data={"annotator": "a"}, headers={"origin": "http://127.0.0.1"}).status_code == 200
    assert pages.get("/", headers={"host": "evil.test"}).status_code == 400
    assert "default-src 'none'" in pages.get("/").headers["content-security-policy"]


def test_names_on_a_list(folder: Path) -> None:
    store = begin(folder)
    store.save(0, "ada", 0, dict.fromkeys(AXES, "left"))
    pages = client(store, annotators=["Ada", "Ben <b>"])
    assert "Ben &lt;b&gt;</button>" in pages.get("/").text
    page = pages.post("/start", data={"annotator": "Ada"})
    assert page.url.params["annotator"] == "ada"  # as it is in the file: one person
    assert "Pair 2" in page.text
    assert pages.post("/start", data={"annotator": "Carl"}).status_code == 403


def test_markup_in_prompts_and_names_is_shown_as_it_is(tmp_path: Path) -> None:
    pages = client(begin(make_evaluation(tmp_path, sets={"in_domain": PROMPTS["in_domain"][1:2]})))
    page = pages.get("/judge", params={"annotator": "<script>"}).text
    assert "a &lt;b&gt;bold&lt;/b&gt; square &amp; a ball" in page
    assert "&lt;script&gt;" in page
    assert "<b>" not in page
    assert "<script>" not in page


def test_elsewhere_every_address_needs_the_token(folder: Path) -> None:
    pages = client(begin(folder), token="secret-ä", local=False)
    token = quote("secret-ä")
    for path in (
        "/",
        "/secret/",
        f"/{token}x/",
        "/judge?annotator=a",
        "/static/study.css",
        "/video?annotator=a&pair=1",
    ):
        assert pages.get(path).status_code == 403, path
    for path in (f"/{token}", f"/{token}/", f"/{token}/judge?annotator=a", f"/{token}/static/study.css"):
        assert pages.get(path, headers={"host": "machine.test"}).status_code == 200, path
    page = pages.post(f"/{token}/start", data={"annotator": "ada"})
    assert "Pair 1" in page.text
    page = pages.post(f"/{token}/answer", data=fields(page.text) | {"quality": "left", "alignment": "tie"})
    assert "Pair 2" in page.text


def test_whoever_can_be_reached_from_elsewhere_needs_a_token_and_whoever_cannot_answers_to_its_name(
    folder: Path,
) -> None:
    elsewhere = ("0.0.0.0", "::", "192.168.1.4", "machine.test", "127.0.0.2", "localhost.evil.test")
    assert not any(map(is_local, elsewhere))
    pages = client(begin(folder))
    for host in ("127.0.0.1", "localhost", "::1"):
        assert is_local(host)
        shown = f"[{host}]:8300" if ":" in host else f"{host}:8300"
        assert pages.get("/", headers={"host": shown}).status_code == 200


def test_a_token_is_drawn_once_and_its_file_is_private(folder: Path) -> None:
    store = begin(folder)
    assert store.path.stat().st_mode & 0o077  # nothing in it is secret yet
    with closing(sqlite3.connect(store.path)) as other:  # as a server that still runs: its log is there
        other.execute("INSERT INTO study VALUES ('note', 'x')")
        other.commit()
        token = store.token()
        assert len(token) >= 32
        assert {path.stat().st_mode & 0o777 for path in folder.glob("study.sqlite*")} == {0o600}
    assert Store(store.path).token() == token
    assert begin(folder).study() == store.study()
    assert begin(folder, out="other.sqlite").token() != token


def test_importing_the_command_loads_no_web_framework() -> None:
    code = "import sys, rlvid.study.command; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"fastapi", "uvicorn", "numpy", "sqlite3", "yaml"} & set(done.stdout.split()) == set()
