"""The comparison's lines, budgets, intervals and table."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlvid.evaluate.comparison import SHOWN, table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    """``jobs/compare.py``, which is a script."""
    spec = importlib.util.spec_from_file_location("compare", ROOT / "jobs" / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["compare"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def budget(tmp_path: Path, **given: Any) -> argparse.Namespace:
    limits = {"seconds": None, "videos": None, "seeds": "0,1", "points": 2, "prompts": 4, "jobs": 1} | given
    return argparse.Namespace(**limits, overrides=["train.workers=1"], out=tmp_path)


def test_an_entry_has_a_label_a_method_and_settings(compare: ModuleType) -> None:
    assert compare.Entry.parse("ddpo") == compare.Entry("ddpo", "ddpo", ())
    parsed = compare.Entry.parse("fast=rwr:method.beta=5:optimizer.lr=1e-3")
    assert parsed == compare.Entry("fast", "rwr", ("method.beta=5", "optimizer.lr=1e-3"))
    with pytest.raises(ValueError, match="'ppo' is not a method; allowed: instructvideo"):
        compare.Entry.parse("ppo")
    with pytest.raises(ValueError, match="'tau' is not a setting"):
        compare.Entry.parse("instructvideo:tau")


def test_runs_get_the_same_budget_whatever_their_batch(compare: ModuleType, tmp_path: Path) -> None:
    entry = compare.Entry.parse("a=draft-lv:method.repeats=4:train.batch_size=4")
    config = compare.configure(entry, 3, budget(tmp_path, videos=160))
    assert (config.name, config.seed, config.method.name) == ("a-seed3", 3, "draft-lv")
    assert config.train.steps * config.train.batch_size * config.method.repeats == 160
    assert config.train.workers == 1
    config = compare.configure(compare.Entry.parse("rwr"), 0, budget(tmp_path, seconds=7.0))
    assert config.train.max_seconds == 7
    assert config.train.steps > 10_000
    with pytest.raises(ValueError, match="tau"):
        compare.configure(compare.Entry.parse("instructvideo:method.tau=2"), 0, budget(tmp_path, seconds=7.0))


def test_a_finished_run_of_another_budget_is_not_taken_for_this_one(compare: ModuleType, tmp_path: Path) -> None:
    entry, options = compare.Entry.parse("rwr"), budget(tmp_path, videos=64)
    assert compare.finished(entry, 0, options) is None
    kept = {"identity": compare.identity(compare.configure(entry, 0, options), options), "points": [{"step": 0}]}
    (tmp_path / "rwr-seed0").mkdir()
    compare.write_json(tmp_path / "rwr-seed0" / "points.json", kept)
    assert compare.finished(entry, 0, options) == [{"step": 0}]
    for other in ({"videos": 128}, {"videos": 64, "prompts": 8}, {"videos": None, "seconds": 9.0}):
        with pytest.raises(ValueError, match="another budget"):
            compare.finished(entry, 0, budget(tmp_path, **other))


@pytest.mark.parametrize(
    ("given", "overrides", "message"),
    [
        ({}, [], "--seconds or --videos"),
        ({"seconds": 1.0, "videos": 8}, [], "--seconds or --videos"),
        ({"videos": 8, "jobs": 0}, [], "--jobs must be 1"),
        ({"videos": 8, "seeds": "0,0"}, [], "--seeds '0,0'"),
        ({"videos": 8, "seeds": "a"}, [], "--seeds 'a'"),
        ({"videos": 8}, ["seed=7"], "'seed=7'"),
        ({"videos": 8}, ["method=ddpo"], "'method=ddpo'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    compare: ModuleType, tmp_path: Path, given: dict[str, Any], overrides: list[str], message: str
) -> None:
    options = budget(tmp_path, **given)
    options.overrides = overrides
    with pytest.raises(ValueError, match=message):
        compare.check(options)


def test_points_are_spread_over_the_cost(compare: ModuleType) -> None:
    states = {step: {"seconds": 3.0 * step} for step in (2, 4, 6, 8, 9)}
    assert compare.at_cost(states, 1) == [9]
    assert compare.at_cost(states, 3) == [4, 6, 9]
    assert compare.at_cost(states, 50) == [2, 4, 6, 8, 9]


def test_the_table_has_the_base_once_and_each_method_at_its_end(compare: ModuleType) -> None:
    def point(step: int, value: float) -> dict:
        cost = {"step": step, "seconds": 2.0 * step, "videos": 8 * step}
        return cost | {"mean": dict.fromkeys(SHOWN, value), "std": {"reward": value / 10}}

    runs = [[point(0, 0.5), point(5, 0.6), point(10, last)] for last in (0.7, 0.9)]
    lines = table({"ddpo": runs}).splitlines()
    assert lines[2].startswith("| base | 0 | 0 | 0.500 | 0.500 |")
    assert lines[3].startswith("| ddpo | 20 | 80 | 0.800 ± 1.271 |")
    assert lines[3].endswith("| 0.080 |")
    assert len(lines) == 4
    sure = table({"rwr": [[point(0, 0.5), point(10, last)] for last in (0.79, 0.80, 0.81)]}).splitlines()
    assert sure[3].startswith("| rwr | 20 | 80 | **0.800 ± 0.025** |")
