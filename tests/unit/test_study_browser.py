"""Real browsers answer a whole study with the keyboard; the server is killed on the way."""

from pathlib import Path

import pytest
from answer_study import answer_study, launch, saved
from playwright.sync_api import sync_playwright
from watched import make_evaluation


@pytest.fixture(scope="module", autouse=True)
def _browser() -> None:
    with sync_playwright() as player:
        try:
            launch(player).close()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.slow
def test_two_people_answer_a_study_through_a_crash(tmp_path: Path) -> None:
    folder, out = make_evaluation(tmp_path / "evaluation", steps=(20, 50)), tmp_path / "study.sqlite"
    record = answer_study(folder, out, ["ada", "ben"], pairs=4, checks=1, kill_after=5)
    assert record.faults == []
    assert record.pages == 10
    assert len(record.answers) == 20
    assert sorted(record.answers) == sorted(saved(out))
    assert {answer[0] for answer in record.answers} == {"ada", "ben"}


@pytest.mark.slow
def test_the_robot_notices_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = make_evaluation(tmp_path / "evaluation"), tmp_path / "study.sqlite"
    monkeypatch.setattr("answer_study.KEYS", {"1": "left", "2": "right", "3": "tie"})
    record = answer_study(folder, out, ["ada"], pairs=3, checks=0, kill_after=-1)
    assert record.faults == ["the file does not hold what was answered"]


def test_without_a_browser_it_is_said_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "chromium"
    stub.write_text("#!/bin/sh\nexit 1\n")  # as some distributions have it, which ask to install another package
    stub.chmod(0o755)
    with sync_playwright() as player:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("answer_study._OWN", str(tmp_path / "nothing"))
        with pytest.raises(ValueError, match="NO BROWSER starts"):
            launch(player)
