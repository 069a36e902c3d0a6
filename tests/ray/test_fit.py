"""A reward is fitted on Ray: any number of workers, a fit that was killed, and pairs that cannot be read."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import QUIET, difference
from safetensors.torch import load_file

from rlvid.config.fit import FitConfig
from rlvid.fitting.launch import fit_reward
from rlvid.fitting.looks import PAIRS_IN_FILE
from rlvid.fitting.report import FitReport
from rlvid.runs.scalars import read_events

STEPS, KILLED = 6, 4
"""Steps of each fit, and the one in which the process of worker 0 is killed."""


def votes(folder: Path, broken: set[int], count: int = 16) -> Path:
    """Pairs of images of 8 prompts, one vote each, and a vote that cannot be used."""
    random = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for place in range(count):
        for side in "ab":
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{place}{side}.png")
        if place in broken:
            (folder / f"{place}a.png").write_bytes(b"broken")
        files = {side: f"{place}{side}.png" for side in "ab"}
        rows.append({"prompt": f"a dog {place % 8}", **files, "preference": place // 3 % 2, "a_model": "base"})
    rows.append(rows[0] | {"preference": 7})
    table = folder / "votes.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def config(**settings: Any) -> FitConfig:
    small = {
        "steps": STEPS, "batch_size": 8, "group": 2, "lr": 1e-3, "warmup": 2, "average": 0.5, "checkpoint_every": 2,
        "held_out": 0.25, "cpus_per_worker": 0.25, "max_failures": 0, "mean": 0.4, "deviation": 0.05,
    }  # fmt: skip
    return FitConfig(**small | settings)


Fit = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return votes(tmp_path_factory.mktemp("fit") / "votes", {5})


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More fitted pairs than one file of features has."""
    return votes(tmp_path_factory.mktemp("many") / "votes", set(), 3 * PAIRS_IN_FILE // 2)


@pytest.fixture(scope="module")
def fitted(source: Path, many: Path, ray_cluster: Any) -> Fit:
    """Gives the folder of a fit of a number of workers that went through; each is fitted once."""
    found: dict[tuple[int, str], Path] = {}

    def get(workers: int, towers: str = "both") -> Path:
        if (workers, towers) not in found:
            out = source.parent.with_name(f"by-{workers}-{towers}")
            pairs = source if towers == "both" else many
            report = fit_reward(config(workers=workers, backbone={"towers": towers}), pairs, out, QUIET)
            assert isinstance(report, FitReport)
            found[workers, towers] = out
        return found[workers, towers]

    return get


def files(folder: Path) -> dict[str, bytes]:
    """The content of a reward's files, but for the report, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "report.json"}


def losses(folder: Path) -> list[tuple[int, float]]:
    return read_events(folder / "tensorboard", "fit/loss".__eq__)["fit/loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "towers"), [(2, "both"), (4, "text")])
def test_any_number_of_workers_fits_the_same_reward(fitted: Fit, workers: int, towers: str) -> None:
    alone, together = fitted(1, towers), fitted(workers, towers)
    weights = [load_file(each / "model.safetensors") for each in (alone, together)]
    assert difference(*weights) <= 1e-6
    one, other = (json.loads((each / "reward.json").read_text()) for each in (alone, together))
    for name in ("base_mean", "base_deviation"):
        assert other.pop(name) == pytest.approx(one.pop(name), rel=1e-5)
    assert other.pop("sha256").keys() == one.pop("sha256").keys()
    assert other == one
    one, other = (json.loads((each / "report.json").read_text()) for each in (alone, together))
    assert other["made_with"] == one["made_with"]
    assert other["axes"]["quality"]["held_out"]["accuracy"] == one["axes"]["quality"]["held_out"]["accuracy"]


def test_what_cannot_be_used_is_left_out_counted_and_named(fitted: Fit) -> None:
    told = json.loads((fitted(1) / "report.json").read_text())
    assert told["pairs"] == 15
    unread, unusable = sorted(told["left_out"], key=lambda line: "preference" in line)
    assert "5a.png" in unread
    assert "votes.jsonl:17: preference = 7" in unusable
    verdict = told["axes"]["quality"]
    assert verdict["held_out"]["accuracy"]["pairs"] + verdict["fitted"]["pairs"] == 15
    assert (told["base"]["model"], told["base"]["samples"]) == ("base", 15)
    assert [step for step, _ in losses(fitted(1))] == [*range(STEPS)]
    assert not fitted(1).with_name("by-1-both.unfinished").exists()


def test_a_fit_that_is_there_is_kept_and_no_other_is_put_in_its_place(
    fitted: Fit, source: Path, tmp_path: Path
) -> None:
    out = fitted(1)
    before = files(out)
    left = out.with_name(f"{out.name}.unfinished")
    left.mkdir()
    made_with = json.loads((out / "report.json").read_text())["made_with"]
    (left / "plan.json").write_text(json.dumps(made_with))
    assert fit_reward(config(workers=2, checkpoint_every=1), source, out, QUIET) is None
    assert not left.exists(), "of a process that was killed after its last rename"
    for settings, words in (({"steps": 7}, "steps 6 and now 7"), ({"seed": 1}, "seed 0 and now 1.*")):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(out))}: .*\({words}\)"):
            fit_reward(config(**settings), source, out, QUIET)
    with pytest.raises(ValueError, match="other pairs"):
        fit_reward(config(), votes(tmp_path / "other", {6}), out, QUIET)
    elsewhere = source.with_name("by-others.jsonl")
    elsewhere.write_text(source.read_text().replace('"a_model": "base"', '"a_model": "tuned"', 3))
    with pytest.raises(ValueError, match="other pairs"):
        fit_reward(config(), elsewhere, out, QUIET)
    assert files(out) == before


def deadly() -> Callable[..., Any]:
    """Returns the function of workers of which the first is killed in a step; a closure, which is sent as a whole."""
    killed = KILLED

    def fit_worker(job: Any, progress: Any) -> Any:
        from rlvid.fitting import job as real
        from rlvid.fitting.worker import FitWorker

        tell = FitWorker._tell

        def die(self: FitWorker, step: int, loss: float, seconds: float) -> None:
            tell(self, step, loss, seconds)
            if self.rank == 0 and step + 1 == killed:
                os.kill(os.getpid(), signal.SIGKILL)

        FitWorker._tell = die  # type: ignore[method-assign]
        return real.fit_worker(job, progress)

    return fit_worker


@pytest.mark.slow
def test_a_fit_that_is_killed_goes_on_to_the_same_bits_and_to_no_other_fit(fitted: Fit, source: Path) -> None:
    whole, out = fitted(2), source.parent.with_name("killed")
    work = out.with_name("killed.unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlvid.fitting.job.fit_worker", deadly())
        with pytest.raises(RuntimeError, match=r"^the fit stopped: worker 0, after step \d: its process died"):
            fit_reward(config(workers=2), source, out, QUIET)
    assert not out.exists()
    assert torch.load(work / "state.pt", weights_only=True)["step"] == 2
    with pytest.raises(ValueError, match=rf"^{re.escape(str(work))}: .*\(lr 0\.001 and now 0\.01\)"):
        fit_reward(config(workers=2, lr=0.01), source, out, QUIET)
    assert isinstance(fit_reward(config(workers=2), source, out, QUIET), FitReport)
    assert files(out) == files(whole)
    assert losses(out) == losses(whole)
    assert not work.exists()


def test_too_few_pairs_that_can_be_read_are_refused(ray_cluster: Any, tmp_path: Path) -> None:
    table, out = votes(tmp_path / "votes", {*range(15)}), tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"^the axis 'quality' has \d pairs .*; 15 pairs could not be read, the first: .*0a\.png"
    ) as error:
        fit_reward(config(), table, out, QUIET)
    assert "\n" not in str(error.value)
    assert not out.exists()
