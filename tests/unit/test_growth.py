"""Work that grows in proportion: counted in comparisons and objects, where it once grew faster."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from rlvid.evaluate.results.about import Case
from rlvid.report.page import PageAssets, _cases
from rlvid.stats import bootstrap_means, pareto_front
from tuning import journal as journals
from tuning.journal import Journal
from tuning.space import Dimension
from tuning.space import draw as draw_settings
from tuning.words import _groups

MANY = 400


class Counted(float):
    """A number that counts its comparisons."""

    seen: ClassVar[Counter[str]] = Counter()

    def __eq__(self, other: object) -> bool:
        Counted.seen["=="] += 1
        return super().__eq__(other)

    def __ge__(self, other: float) -> bool:
        Counted.seen[">="] += 1
        return super().__ge__(other)

    __hash__ = float.__hash__


@pytest.fixture(autouse=True)
def _count_anew() -> None:
    Counted.seen.clear()


def test_a_journal_parses_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = list[Any]()
    whole = journals._Line.model_validate

    def parse(entry: Any) -> Any:
        parsed.append(entry)
        return whole(entry)

    monkeypatch.setattr(journals._Line, "model_validate", parse)
    journal = Journal(tmp_path)
    for number in range(MANY):
        journal.append({"trial": number, "settings": {"seed": number}})
        assert journal.trial(number).end is None
        journal.append({"trial": number, "step": 4, "score": 0.5, "decision": "stopped early"})
        assert (journal.trial(number).end, journal.trial(number).score) == ("stopped early", 0.5)
    assert len(journal.entries) == len(parsed) == 2 * MANY


def test_a_journal_sees_what_its_copy_wrote_and_trials_stay_as_they_were(tmp_path: Path) -> None:
    journal, copy = Journal(tmp_path), Journal(tmp_path)
    journal.append({"trial": 0, "settings": {}})
    before = copy.trial(0)
    journal.append({"trial": 0, "step": 4, "score": 0.5, "decision": "goes on"})
    with open(journal.path, "ab") as file:
        file.write(b'{"trial": 0, "step": 12, ')
        file.flush()
        assert [trial.judged for trial in (copy.trial(0), *copy.trials)] == [[4], [4]], "a line is read once whole"
        file.write(b'"score": 0.7, "decision": "finished"}\n')
    assert (copy.trial(0).judged, copy.trial(0).end, before.judged) == ([4, 12], "finished", [])


def test_a_pareto_front_compares_points_with_the_front_alone() -> None:
    ladder = [(Counted(step), Counted(step)) for step in range(MANY)]
    assert pareto_front(ladder) == [ladder[-1]]
    assert Counted.seen[">="] <= 2 * MANY
    points = [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (2.0, 1.0), (0.0, 2.0)]
    assert pareto_front(points) == [(1.0, 2.0), (2.0, 1.0), (2.0, 1.0)]


def test_a_bootstrap_holds_few_draws_at_once_and_draws_the_same() -> None:
    class Recorder:
        """A generator that notes how much is drawn at once."""

        def __init__(self) -> None:
            self.drawn, self.sizes = np.random.default_rng(0), list[int]()

        def integers(self, low: int, high: int, shape: tuple[int, int]) -> np.ndarray:
            self.sizes.append(shape[0] * shape[1])
            return self.drawn.integers(low, high, shape)

    values, clusters, recorder = np.arange(60_000.0), np.arange(60_000) // 2, Recorder()
    found = bootstrap_means(values, clusters, 100, recorder)  # type: ignore[arg-type]
    assert sum(recorder.sizes) == 100 * 30_000
    assert max(recorder.sizes) <= 2**20
    places = np.random.default_rng(0).integers(0, 30_000, (100, 30_000))
    np.testing.assert_array_equal(found, values.reshape(-1, 2).sum(1)[places].sum(1) / (2 * 30_000))


def test_drawn_settings_are_not_compared_with_all_before(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(MANY))
    monkeypatch.setattr(Dimension, "draw", lambda self, generator: Counted(next(numbers)))
    found = draw_settings([Dimension("seed", "uniform", (0, MANY))], [], MANY, 0)
    assert len(found) == MANY
    assert Counted.seen["=="] <= MANY


def test_trials_are_grouped_by_halves_without_comparing_them() -> None:
    class Trial(SimpleNamespace):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("trials are compared")

    trials = [Trial(trial=SimpleNamespace(settings={"lr": value})) for value in (0.1, 0.9, 0.5)]
    below, above = _groups(Dimension("lr", "uniform", (0, 1)), trials).values()  # type: ignore[arg-type]
    assert [one.trial.settings["lr"] for one in below] == [0.1, 0.5]
    assert [one.trial.settings["lr"] for one in above] == [0.9]


def test_the_report_counts_repeated_prompts_of_a_set_once() -> None:
    class Prompt(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Prompt.compared += 1
            return super().__eq__(other)

        __hash__ = str.__hash__

    prompts = [Prompt(f"prompt {number // 2 if number < 4 else number}") for number in range(MANY)]
    evaluation = SimpleNamespace(
        about=SimpleNamespace(sets={"set": prompts}), models=[], prompt=lambda case: prompts[case.index],
        cases=[Case("set", 20, index, 0) for index in range(MANY)],
    )  # fmt: skip
    cases = _cases(evaluation, PageAssets())  # type: ignore[arg-type]
    assert [case["repeated"] for case in cases] == [True] * 4 + [False] * (MANY - 4)
    assert Prompt.compared <= 2 * MANY
