"""What a killed server had confirmed is on the disk, and nothing is there by halves."""

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from watched import make_evaluation

from jobs.answer_study import Server
from rlvid.study.pairs import AXES
from rlvid.study.store import Store


def _answer_until_it_dies(address: str, name: str, confirmed: list[tuple[str, int]]) -> None:
    """Answers pair after pair, and notes those whose answers were confirmed."""
    with httpx2.Client(base_url=address, timeout=60) as pages:
        try:
            while "Thank you" not in (page := pages.get("/judge", params={"annotator": name}).text):
                hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))
                reply = pages.post("/answer", data=hidden | dict.fromkeys(AXES, "left"))
                if reply.status_code == 303:
                    confirmed.append((name, int(hidden["pair"])))
        except httpx2.TransportError:
            pass


def test_no_confirmed_answer_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    folder, out = make_evaluation(tmp_path / "evaluation", copies=20), tmp_path / "study.sqlite"
    server, names = Server(str(folder), "--pairs", "60", "--out", str(out)), ["ada", "ben", "cem"]
    confirmed: list[tuple[str, int]] = []
    with ThreadPoolExecutor() as pool:
        for enough in (20, 50):
            server.start()
            people = [pool.submit(_answer_until_it_dies, server.address, name, confirmed) for name in names]
            while len(confirmed) < enough and not all(person.done() for person in people):
                time.sleep(0.001)
            server.kill()
            for person in people:
                person.result()
    saved = Counter((answer.annotator, answer.pair) for answer in Store(out).answers())
    assert set(saved.values()) == {len(AXES)}
    assert len(set(confirmed)) == len(confirmed) >= 50
    assert set(confirmed) <= set(saved)
    assert len(saved) < 60 * len(names)  # it was killed in the middle
