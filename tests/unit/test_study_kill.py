"""What a killed server had confirmed is on the disk, and nothing is there by halves."""

import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from answer_study import Server
from studies import rlvid
from watched import make_evaluation

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


def _serve_elsewhere(*options: str) -> tuple[subprocess.Popen[str], str]:
    """A server that can be reached from elsewhere: its process, and the link that it prints, as 127.0.0.1."""
    command = [sys.executable, "-m", "rlvid.cli", "study", "serve", *options, "--host", "0.0.0.0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    shown = next(line.split()[1] for line in process.stdout if line.startswith("open "))
    return process, re.sub("//.*?:", "//127.0.0.1:", shown)


def test_the_same_link_works_when_the_server_was_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = make_evaluation(tmp_path / "evaluation"), tmp_path / "study.sqlite"
    options, links, port = [str(folder), "--out", str(out)], [], "0"
    for turn in range(2):
        process, link = _serve_elsewhere(*options, "--port", port)
        try:
            with httpx2.Client(timeout=60, follow_redirects=True, trust_env=False) as pages:
                bare, token = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)([\w-]{32,})/", link).groups()  # type: ignore
                for wrong in (bare, f"{bare}judge?annotator=ada", f"{bare}{token[:-1]}/"):
                    assert pages.get(wrong).status_code == 403
                page = pages.get((links or [link])[0] + "judge", params={"annotator": "ada"})  # the first link
                assert f"Pair {turn + 1} of 3" in page.text
                hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text))
                assert pages.post(f"{link}answer", data=hidden | dict.fromkeys(AXES, "left")).status_code == 200
            assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("study.sqlite*")} == {0o600}
        finally:
            process.kill()
            process.communicate()
        links.append(link)
        port = link.split(":")[2].partition("/")[0]
    assert links[0] == links[1]
    assert rlvid(monkeypatch, "results", str(out)) == 0
    assert rlvid(monkeypatch, "export", str(out), "--out", str(tmp_path / "pairs.parquet")) == 0
    handed_on = [*tmp_path.glob("study-results.*"), tmp_path / "pairs.parquet"]
    assert len(handed_on) == 3
    assert not any(token.encode() in path.read_bytes() for path in handed_on)
