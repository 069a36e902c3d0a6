"""Scripted browsers answer a whole study, the server is killed in the middle, and every answer is compared.

    python tests/faults/answer_study.py EVALUATION --pairs 40 --annotators ada,ben --kill-after 23

Which model is on which side is not asked of the server: the pictures that the browser shows are looked up among the
evaluation's own frames. The first annotator also answers the first pair in a second window, otherwise, which must be
refused. They answer by chance, or by a metric of the evaluation (``--by oracle_score``), but for one answer in ten.
Needs a Chromium: the system's, or the one that `make browser` fetches.
"""

import argparse
import json
import os
import random
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
from PIL import Image, ImageSequence
from playwright.sync_api import Browser, Error, Page, Playwright, sync_playwright
from pyarrow import parquet

from rlvid.interrupt import kept
from rlvid.terminal import run_command, say, short

os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", "0")  # inside the environment, where `make browser` puts one
KEYS = {"1": "left", "2": "tie", "3": "right"}
AXES = ("quality", "alignment")
LOADED = "() => [...document.querySelectorAll('.videos img')].every(i => i.complete && i.naturalWidth)"
"""A function, since the page's policy forbids to evaluate words again and again."""
_OWN = None  # no path: Playwright's own
Video = tuple[str, str, int, int, int]
"""model, set, steps, index, copy"""


def launch(player: Playwright) -> Browser:
    """A browser: the system's Chromium, or else the one that Playwright has fetched.

    Raises:
        ValueError: none of them starts.
    """
    reason = ""
    for path in [*filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), _OWN]:
        try:
            return player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            reason = error.message.strip().splitlines()[0]
    raise ValueError(f"NO BROWSER starts ({reason}); `apt install chromium`, or `make browser` fetches one")


class Server:
    """`rlvid study serve` in a process of its own."""

    def __init__(self, *options: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self._command = [sys.executable, "-m", "rlvid.cli", "study", "serve", *options, "--port", str(self.port)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError("the server did not start")

    def kill(self) -> None:
        """SIGKILL: it has no time to save anything."""
        if self._process:
            self._process.kill()
            self._process.wait()


@dataclass
class Record:
    """What was answered, and what was seen on the way."""

    answers: list[tuple[Any, ...]] = field(default_factory=list)
    """annotator, set, steps, index, copy, is a check, axis, side, chosen model (or "tie", or "noise")"""
    faults: list[str] = field(default_factory=list)
    pages: int = 0


def look_up(evaluation: Path) -> dict[bytes, Video]:
    """The evaluation's videos by their pixels."""
    found = {}
    for part in sorted((evaluation / "videos").glob("part-*.parquet")):
        for row in parquet.read_table(part).to_pylist():
            frames = [np.asarray(Image.open(BytesIO(frame)).convert("RGB")) for frame in row["frames"]]
            found[_pixels(frames)] = tuple(row[key] for key in ("model", "set", "steps", "index", "copy"))
    return found


def _pixels(frames: list[np.ndarray]) -> bytes:
    """Without repetitions of a frame, which WebP holds as one that lasts longer."""
    kept = [f for i, f in enumerate(frames) if not i or not np.array_equal(f, frames[i - 1])]
    return b"".join(frame.tobytes() for frame in kept)


def values_of(evaluation: Path, metric: str) -> dict[Video, float]:
    """A metric of each video."""
    key = ("model", "set", "steps", "index", "copy")
    rows = parquet.read_table(evaluation / "evaluation.parquet").to_pylist()
    if not rows or metric not in rows[0]:
        raise ValueError(f"--by {metric}: {evaluation} has no such metric")
    return {tuple(row[name] for name in key): row[metric] for row in rows}


class Annotator:
    """Somebody at a browser, who answers by chance, or by what videos are worth to them, and remembers what."""

    def __init__(
        self,
        name: str,
        page: Page,
        server: Server,
        videos: dict[bytes, Video],
        record: Record,
        worth: dict[Video, float] | None = None,
    ):
        self.name, self.page, self.server, self.videos, self.record = name, page, server, videos, record
        self.worth = worth
        self.random = random.Random(f"0/{name}")
        self.words = re.compile(r"\b(" + "|".join(re.escape(m) for m in {v[0] for v in videos.values()}) + r")\b")
        page.on("pageerror", lambda error: record.faults.append(f"page error: {error}"))
        page.on("console", lambda line: record.faults.append(f"console: {line.text}") if line.type == "error" else None)
        page.on("request", self._asked)
        page.goto(server.address)
        page.get_by_label("Your name").fill(name)
        with page.expect_navigation():
            page.keyboard.press("Enter")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(self.server.address):
            self.record.faults.append(f"a request elsewhere: {request.url}")

    @property
    def done(self) -> bool:
        return "Thank you" in self.page.inner_text("h1")

    def decide(self) -> list[tuple[Any, ...]]:
        """Looks at the pair and decides: (key for each axis, what will have been chosen)."""
        page = self.page
        page.wait_for_function(LOADED)
        if page.evaluate("Math.min(...[...document.querySelectorAll('.videos div')].map(i => i.clientWidth))") < 256:
            self.record.faults.append("a video is narrower than 256 px")
        told = self.words.findall(page.content() + page.url)
        if told:
            self.record.faults.append(f"the page says {told}")
        source = str(page.get_attribute(".videos img", "src"))
        film = Image.open(BytesIO(page.request.get(urljoin(page.url, source)).body()))
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
        half = frames[0].shape[1] // 2
        left, right = (self.videos.get(_pixels([f[:, s] for f in frames])) for s in (slice(half), slice(half, None)))
        spot = (left or right or ())[1:]
        if left and right and left[1:] != right[1:]:
            self.record.faults.append(f"{left} beside {right}")
        shown = {"left": left[0] if left else "noise", "right": right[0] if right else "noise", "tie": "tie"}
        keys = [self.random.choice("123") for _ in AXES]
        if self.worth and left and right:
            gap = self.worth[left] - self.worth[right]
            by_worth = "2" if abs(gap) < 0.02 else "1" if gap > 0 else "3"
            keys = [by_worth if self.random.random() < 0.9 else key for key in keys]
        if not (left and right):  # a check: the video without noise looks better
            keys[0] = "1" if left else "3"
        return [
            (key, (self.name, *spot, int(not (left and right)), axis, KEYS[key], shown[KEYS[key]]))
            for key, axis in zip(keys, AXES, strict=True)
        ]

    def press(self, decided: list[tuple[Any, ...]]) -> None:
        for key, _ in decided:
            self.page.keyboard.press(key)

    def save(self, decided: list[tuple[Any, ...]]) -> None:
        """Saves with Enter, and remembers it once the next page is there."""
        with self.page.expect_navigation():
            self.page.keyboard.press("Enter")
        self.record.answers += [answer for _, answer in decided]
        self.record.pages += 1


def survive(server: Server, annotator: Annotator) -> None:
    """The server dies when a pair is answered but not sent; started again, it must ask for that very pair."""
    heading, address = annotator.page.inner_text("h1"), annotator.page.url
    faults = len(annotator.record.faults)
    server.kill()
    try:
        with annotator.page.expect_navigation(timeout=5000):
            annotator.page.keyboard.press("Enter")
        annotator.record.faults.append("a killed server has answered")
    except Error:
        pass
    server.start()
    annotator.page.goto(address)
    del annotator.record.faults[faults:]  # what the browser says about a server that is gone
    if annotator.page.inner_text("h1") != heading:
        annotator.record.faults.append(f"after the crash: {annotator.page.inner_text('h1')}, before: {heading}")


def second_window(annotator: Annotator, other: Page, decided: list[tuple[Any, ...]]) -> None:
    """Another window shows the same pair, and answers otherwise when it is too late: refused, and it can go on."""
    other.goto(annotator.page.url)
    annotator.save(decided)
    for key, _ in decided:
        other.keyboard.press("1" if key != "1" else "3")
    with other.expect_navigation():
        other.keyboard.press("Enter")
    if "Already answered" not in other.inner_text("h1"):
        annotator.record.faults.append(f"a second answer was met with {other.inner_text('h1')!r}")
    with other.expect_navigation():
        other.keyboard.press("Enter")  # the focus is on the way onward
    if other.inner_text("h1") != annotator.page.inner_text("h1"):
        annotator.record.faults.append("the second window does not go on with the next open pair")


def saved(database: Path) -> list[tuple[Any, ...]]:
    """What the file holds, in the record's form."""
    sql = """SELECT annotator, "set", steps, "index", copy, is_check, axis, answer, CASE chosen WHEN 'first' THEN first
        WHEN 'second' THEN iif(is_check, 'noise', second) ELSE 'tie' END FROM answers JOIN pairs USING (pair)"""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


def answer_study(
    evaluation: Path, out: Path, annotators: list[str], *, pairs: int, checks: int, kill_after: int, by: str = ""
) -> Record:
    """Answers a study; afterwards ``faults`` holds whatever was not as it must be."""
    record, videos, worth = Record(), look_up(evaluation), values_of(evaluation, by) if by else None
    server = Server(str(evaluation), "--pairs", str(pairs), "--checks", str(checks), "--out", str(out))
    server.start()
    try:
        with sync_playwright() as player, launch(player) as browser:
            people = [Annotator(name, browser.new_page(), server, videos, record, worth) for name in annotators]
            while open_ones := [each for each in people if not each.done]:
                for person in open_ones:
                    decided = person.decide()
                    person.press(decided)
                    if record.pages == kill_after:
                        survive(server, person)
                        person.press(decided)
                    if record.pages == 0:
                        second_window(person, browser.new_page(), decided)
                    else:
                        person.save(decided)
    finally:
        server.kill()
    if sorted(record.answers) != sorted(saved(out)):
        record.faults.append("the file does not hold what was answered")
    if record.pages != (pairs + checks) * len(annotators):
        record.faults.append(f"{record.pages} pages were answered, not {(pairs + checks) * len(annotators)}")
    return record


def main() -> int:
    """Answers a study and prints what was wrong; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--checks", type=int, default=0)
    parser.add_argument("--annotators", type=lambda text: text.split(","), default=["ada", "ben"])
    parser.add_argument("--kill-after", type=int, default=23, help="pairs answered when the server is killed")
    parser.add_argument("--by", default="", help="metric of the evaluation that they answer by; default: chance")
    parser.add_argument("--out", type=Path, default=Path("study-robot.sqlite"))
    given = parser.parse_args()
    if given.out.exists():
        raise ValueError(f"--out {given.out} exists; name a new file")
    began = time.perf_counter()
    with kept(lambda: f"delete {short(given.out)} first, or name another --out"):
        record = answer_study(**vars(given))
    seconds = time.perf_counter() - began
    summary = {"answers": len(record.answers), "pages": record.pages, "seconds": round(seconds, 1)}
    say(json.dumps(summary | {"faults": record.faults}))
    return int(bool(record.faults))


if __name__ == "__main__":
    sys.exit(run_command(main))
