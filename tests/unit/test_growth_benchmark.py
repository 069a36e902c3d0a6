"""The benchmark of growth: its fits and findings, what it keeps, and the work of each quantity at its smallest."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.benchmark import growth, growth_feed, growth_work
from jobs.benchmark.growth_fit import FLAT, LIMIT, Exponent, draw, fit, growths, table
from jobs.benchmark.growth_work import WORK, measure
from rlvid.data import feed
from rlvid.data.training_set import TrainingSet

MIB = 2**20


def stages(seconds: float, peak: float = 100 * MIB, rise: float = 0) -> dict[str, dict[str, float]]:
    return {"step": {"seconds": seconds, "peak": peak, "rise": rise}}


def test_the_exponent_is_that_of_the_upper_half() -> None:
    work = [1, 10, 100, 1000, 10_000, 100_000]
    assert fit(work, [5 + 2e-3 * n**2 for n in work]).slope == pytest.approx(2, abs=1e-3)
    exact = fit(work, [3 * n for n in work])
    assert (exact.slope, exact.error) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    x, y = np.log(work[3:]), np.log([1.0, 9.0, 130.0])
    line, covariance = np.polyfit(x, y, 1, cov=True)
    noisy = fit(work, [1.0, 1.0, 1.0, 1.0, 9.0, 130.0])
    assert noisy.slope == pytest.approx(line[0])
    assert noisy.error == pytest.approx(np.sqrt(covariance[0, 0]))


def test_few_sizes_give_a_slope_without_an_error_or_none() -> None:
    assert str(fit([10, 100], [1.0, 10.0])) == "1.00"
    assert str(fit([10], [1.0])) == "–"
    assert not Exponent(2.0, float("nan")).exceeds(LIMIT)
    assert Exponent(1.2, 0.1).exceeds(LIMIT)
    assert not Exponent(1.2, 0.2).exceeds(LIMIT)


def test_growth_beyond_the_limits_is_a_finding() -> None:
    sizes = (100, 1000, 10_000)
    linear = growths("a", {n: stages(n / 100, rise=n * MIB / 10) for n in sizes}, 1, flat="")
    assert linear[0].findings == []
    square = growths("a", {n: stages((n / 100) ** 2, rise=n**2 * MIB / 100) for n in sizes}, 1, flat="")
    assert [line.partition(" grow")[0] for line in square[0].findings] == ["a, step: seconds", "a, step: memory"]
    pixels = growths("a", {n: stages((n / 100) ** 2) for n in sizes}, 2, flat="")
    assert pixels[0].findings == []
    small = growths("a", {n: stages(1.0, rise=n * 100) for n in sizes}, 1, flat="")
    assert small[0].memory.slope == 0, "allocators keep a few MiB"
    worker = growths("a", {n: stages(1.0, peak=n**0.2 * MIB) for n in sizes}, 1, flat="step")
    assert worker[0].memory.slope == pytest.approx(0.2)
    assert f"above {FLAT:g}" in worker[0].findings[0]


def test_the_table_and_the_picture_have_every_stage(tmp_path: Path) -> None:
    found = growths("frames", {8: stages(1.0), 16: stages(2.0), 32: stages(4.0)}, 1, flat="")
    found += growths("clips", {10: {"feed": {"seconds": 1.0, "peak": MIB, "rise": 0}}}, 1, flat="feed")
    lines = [" ".join(line.split()) for line in table(found).markdown().splitlines()]
    assert "| frames: step | 8 to 32 | 1 to 4 | 1.00 ± 0.00 | 100 to 100 | 0.00 ± 0.00 |" in lines
    assert "| clips: feed | 10 | 1 | – | 1 | – |" in lines
    draw(tmp_path / "growth.png", found)
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.width > picture.height


def test_the_next_call_measures_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, asked = tmp_path / "g.json", list[tuple[str, int]]()

    def measured(name: str, size: int) -> Any:
        if len(asked) == 2:
            raise RuntimeError("interrupted")
        asked.append((name, size))
        return stages(float(size**2))

    monkeypatch.setattr(growth, "measured", measured)
    call = ["frames", "--out", str(out), "--commit", "c0ffee"]
    with pytest.raises(RuntimeError, match="interrupted"):
        growth.main(call)
    assert list(json.loads(out.read_text())["parts"]) == ["frames 8", "frames 16"]
    asked.clear()
    assert growth.main(call) == 1, "seconds grow with the square"
    assert asked == [("frames", 32), ("frames", 64)]
    printed = capsys.readouterr().out
    assert "FINDING: frames, step: seconds grow with exponent 2.00" in printed
    assert (tmp_path / "g.png").is_file()
    sizes = ["size", "--sizes", "32", "64", "96", "--out", str(tmp_path / "s.json"), "--commit", "c0ffee"]
    monkeypatch.setattr(growth, "measured", lambda name, size: stages(float(size**4)))
    assert growth.main(sizes) == 0, "the reason is known"
    assert "exponent 2.00 ± 0.00, above 1.05 (attention" in capsys.readouterr().out


def test_too_few_sizes_give_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "measured", lambda name, size: stages(float(size**4)))
    call = ["--out", str(tmp_path / "g.json"), "--commit", "c0ffee"]
    for sizes in (["8"], ["8", "16"]):
        assert growth.main(["frames", *call, "--sizes", *sizes]) == 0
        printed = capsys.readouterr().out
        assert "too few sizes for a verdict: frames; measure 3 sizes or more" in printed
        assert "exponent is above" not in printed
    monkeypatch.setattr(growth, "measured", lambda name, size: stages(float(size)))
    growth.main(["report", *call, "--sizes", "2", "4", "8"])
    printed = capsys.readouterr().out
    assert "for a verdict: frames; " in printed
    assert "no other exponent is above 1.05" in printed


def test_the_driver_of_a_feed_has_costs_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        remote=lambda **options: lambda function: SimpleNamespace(remote=function), get=lambda found: found,
        shutdown=lambda: None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(growth_work, "start_ray", lambda address: None)
    monkeypatch.setattr(growth_work, "tiny_clips", lambda folder, count: folder)
    monkeypatch.setattr(TrainingSet, "of", lambda place: None)
    monkeypatch.setattr(feed, "feed", lambda shares: None)
    monkeypatch.setattr(feed.InOrder, "configure", lambda *given: [{feed.NAME: None}])
    monkeypatch.setattr(growth_feed, "read_shares", lambda shard, steps: 512)
    monkeypatch.setattr(growth_feed, "largest_worker", lambda: 7)
    monkeypatch.setenv("RLVID_FORK_WORKERS", "0")
    found = measure("clips", 100, tmp_path)
    assert found["feed"]["peak"] == 7
    assert found["driver"]["peak"] > found["driver"]["rise"] >= 0
    assert found["driver"]["seconds"] > 0
    both = growths("clips", {100: found}, 1, growth.QUANTITIES["clips"].flat)
    assert {each.stage: each.flat for each in both} == {"driver": False, "feed": True}


@pytest.mark.slow
def test_a_size_has_a_process_of_its_own_and_its_error_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"report, 0: prompt set 'set' has no prompts"):
        growth.measured("report", 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["speed"], "growth 'speed': allowed: frames, size"),
        (["--sizes", "8"], "--sizes: these are of one quantity"),
        (["report", "--sizes", "3"], "--sizes 3: report takes positive multiples of 2"),
        (["--out", "no/such/folder.json"], "--out no/such/folder.json"),
        (["--out", "g.png"], "--out g.png: the picture gets this name; name the numbers' file: g.json"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        growth.main(arguments)


SMALLEST = {
    "frames": 2, "size": 16, "archive": 401, "evaluation": 4, "tables": 20, "report": 4, "sweeps": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "frames")) for name in WORK if name != "clips"],
)
def test_the_work_of_a_quantity_is_done(name: str, tmp_path: Path) -> None:
    for stage, costs in measure(name, SMALLEST[name], tmp_path).items():
        assert stage
        assert costs["seconds"] > 0
        assert costs["peak"] > costs["rise"] >= 0
