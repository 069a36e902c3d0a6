"""What a killed server had confirmed is on the disk, and nothing is there by halves."""

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from evaluations import make_evaluation

from jobs.answer_study import Server
from rlvid.study.pairs import AXES
from rlvid.study.store import Store


def _answer_until_it_dies(address: str, name: str) -> list[int]:
    """Answers pair after pair; returns those whose answers were confirmed."""
    confirmed: list[int] = []
    with httpx2.Client(base_url=address, timeout=20) as pages:
        try:
            while "Thank you" not in (page := pages.get("/judge", params={"annotator": name}).text):
                hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))
                reply = pages.post("/answer", data=hidden | dict.fromkeys(AXES, "left"))
                if reply.status_code == 303:
                    confirmed.append(int(hidden["pair"]))
        except httpx2.TransportError:
            pass
    return confirmed


def test_no_confirmed_answer_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    folder, out = make_evaluation(tmp_path / "evaluation", steps=(20, 30), copies=10), tmp_path / "study.sqlite"
    server, names = Server(str(folder), "--pairs", "60", "--out", str(out)), ["ada", "ben", "cem"]
    confirmed = {name: [] for name in names}
    with ThreadPoolExecutor() as pool:
        for _ in range(2):
            server.start()
            people = {name: pool.submit(_answer_until_it_dies, server.address, name) for name in names}
            time.sleep(0.4)
            server.kill()
            for name, person in people.items():
                confirmed[name] += person.result()
    saved = Counter((answer.annotator, answer.pair) for answer in Store(out).answers())
    assert set(saved.values()) == {len(AXES)}
    for name in names:
        assert len(set(confirmed[name])) == len(confirmed[name]) > 0
        assert {(name, pair) for pair in confirmed[name]} <= set(saved)
    assert sum(map(len, confirmed.values())) < 60 * len(names)  # it was killed in the middle
