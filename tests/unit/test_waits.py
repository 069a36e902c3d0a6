"""A worker that waits for its data says so, once."""

import threading
import time

import pytest

from rlvid.train import waits
from rlvid.train.waits import Waits


class Clock:
    """Seconds that pass only where a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def run(each: Waits, clock: Clock, steps: int, waited: float, whole: float) -> None:
    for _ in range(steps):
        with each.waiting():
            clock.now += waited
        each.end_step(whole)


def test_a_source_slower_than_training_is_reported_once_with_its_numbers(clock: Clock) -> None:
    lines: list[str] = []
    each = Waits(lines.append, "clips")
    run(each, clock, 1, 1000.0, 1.0)  # the start
    run(each, clock, 9, 2.0, 5.0)
    assert not lines, "nine steps are too few to tell"
    run(each, clock, 30, 2.0, 5.0)
    (line,) = lines
    assert "data.source=clips is slower than training: a step takes 5.0 s, and waits 2.0 s of it" in line


@pytest.mark.parametrize(("waited", "whole"), [(1.2, 5.0), (0.09, 0.1), (0.0, 0.0)])
def test_short_waits_are_not_reported(clock: Clock, waited: float, whole: float) -> None:
    lines: list[str] = []
    run(Waits(lines.append, "clips"), clock, 30, waited, whole)
    assert not lines


def test_a_slow_stretch_counts_only_while_it_lasts(clock: Clock) -> None:
    lines: list[str] = []
    each = Waits(lines.append, "clips")
    run(each, clock, 1, 0.0, 5.0)
    run(each, clock, 1, 60.0, 70.0)  # one long wait, and then the source keeps up
    run(each, clock, 40, 0.0, 30.0)
    assert not lines


def test_storage_that_does_not_answer_is_reported_while_the_worker_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "PATIENCE", 0.05)
    said = threading.Event()
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        said.set()

    each = Waits(report, "clips")
    for _ in range(2):
        with each.waiting():
            assert said.wait(20)
            time.sleep(0.2)
    assert len(lines) == 1
    assert "for data.source=clips and still waits" in lines[0]
    with Waits(report, "clips").waiting():
        pass
    time.sleep(0.2)
    assert len(lines) == 1, "who got a share does not wait any more"
