"""The benchmark of a step: both ways come to one gradient, and what one of them does in vain is counted."""

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``jobs/benchmark_step.py``, found as it is when ``jobs/benchmark.py`` runs."""
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    import benchmark_step

    return benchmark_step


@pytest.mark.slow
def test_the_tiny_preset_finds_one_gradient_and_what_is_done_in_vain(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(
        ["--preset", "tiny", "--device", "cpu", "--batch", "2", "--steps", "1", "--out", str(tmp_path / "b.json"),
         "--compare", "sdpa,guidance,channels-last,precision"]
    )  # fmt: skip
    found = json.loads((tmp_path / "b.json").read_text())
    ours, theirs = found["sides"]["rlvid"], found["sides"]["released"]
    assert found["gradient difference"] < 1e-4
    for side, frames in ((ours, 1), (theirs, 4)):  # three steps of two branches; the reward looks at one frame of four
        assert side["calls"]["denoiser evaluations"] == 6
        assert side["calls"]["frames decoded"] == frames
    assert theirs["calls"]["denoiser evaluations again"] == 2  # ours come back layer by layer
    assert {"chain", "decode", "reward", "backward", "optimiser"} < ours["seconds"].keys()
    assert theirs["seconds"].keys() - ours["seconds"].keys() == {"encode"}
    assert theirs["flops"]["chain"] == pytest.approx(ours["flops"]["chain"], rel=0.05)
    assert theirs["flops"]["decode"] == 4 * ours["flops"]["decode"] > 0
    assert theirs["flops"]["backward"] > ours["flops"]["backward"] > 0
    assert theirs["flops"]["encode"] > 0
    assert min(ours["peaks"].values()) > 0
    assert found["variants"].keys() == {"sdpa", "guidance", "channels-last", "precision"}
    printed = capsys.readouterr().out
    assert "released / rlvid" in printed
    assert "channels-last convolutions" in printed


@pytest.mark.parametrize("arguments", [["--compare", "speed"], ["--steps", "0"], ["--batch", "0"]])
def test_options_that_cannot_be_are_refused(benchmark: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="compare takes sdpa, guidance, channels-last, compile, precision"):
        benchmark.main(["--preset", "tiny", *arguments])


@pytest.mark.parametrize("arguments", [["--workers", "two"], ["--workers", "0,1"], ["--steps", "0"]])
def test_numbers_of_workers_that_cannot_be_are_refused(benchmark: ModuleType, arguments: list[str]) -> None:
    import benchmark_scaling

    with pytest.raises(ValueError, match="--workers takes whole numbers such as 1,2"):
        benchmark_scaling.main(arguments)
