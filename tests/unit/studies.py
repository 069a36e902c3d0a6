"""Studies for tests: begun, asked without a server, and the command run here."""

import re
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from rlvid.cli import main
from rlvid.study.app import create_app
from rlvid.study.pairs import choose_pairs
from rlvid.study.store import Store
from rlvid.study.videos import Videos


def begin(folder: Path, count: int = 4, checks: int = 0, seed: int = 0, out: str = "study.sqlite") -> Store:
    """A study of an evaluation, made or taken up again."""
    videos = Videos(folder)
    return Store.begin(folder / out, folder, seed, videos.models, choose_pairs(videos, [], count, checks, seed))


def client(store: Store, **options: object) -> TestClient:
    """Asks a study's pages."""
    app = create_app(store, Videos(store.study().evaluation), **options)  # type: ignore[arg-type]
    return TestClient(app, base_url="http://127.0.0.1")


def fields(page: str) -> dict[str, str]:
    """The hidden fields of a pair's form."""
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))


def rlvid(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command here; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["rlvid", "study", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """What the command printed as an error is one line, with these words."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
