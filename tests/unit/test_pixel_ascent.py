"""Gradient ascent on pixels: its gains, files and refusals, with made-up videos in place of the model's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.benchmark import pixel_ascent
from jobs.benchmark.ascent_report import Ascent, grid_of
from jobs.benchmark.pixel_ascent import Start, main
from jobs.benchmark.regret import ORACLE
from rlvid.metric_names import NONE
from rlvid.world.captions import prompt_set

OWN = """
def contrast(frames, prompts):  # of whole videos
    return frames.std(dim=(1, 2, 3, 4))
contrast.whole_video = True

def blind(frames, prompts):
    return frames.mean(dim=(1, 2, 3, 4)).tolist()
blind.whole_video, blind.differentiable = True, False
"""


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Counts how often videos are made; they are grey with noise. The working folder has rewards of the user's own."""
    made = list[int]()

    def make(prompts: list[str], seeds: list[int], steps: int) -> Start:
        made.append(steps)
        count = len(prompts) * len(seeds)
        frames = 0.5 + 0.05 * torch.randn(count, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return Start(frames.clamp(0, 1), [*prompts] * len(seeds), [*range(len(prompts))] * len(seeds))

    monkeypatch.setattr(pixel_ascent, "make_start", make)
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    return made


def ascent(*extra: str) -> None:
    main(["--out", "out", "--prompts", "3", "--seeds", "1,2", "--steps", "5", *extra])


def test_rewards_rise_on_pixels_that_stay_in_range_and_are_not_computed_twice(
    starts: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    ascent("--rewards", "brightness", "contrast=own.py:contrast")
    found = json.loads(Path("out/ascent.json").read_text(encoding="utf-8"))
    assert [*found] == ["brightness", "contrast"]
    for name in found:
        assert [*found[name]["steps"]] == ["0", "1", "2", "3", "4", "5"]
        end = found[name]["steps"]["5"]
        assert end.keys() == {"reward_brightness", "reward_contrast", ORACLE}
        assert end[f"reward_{name}"]["gain"]["low"] > 0
    assert found["brightness"]["half"] == 3, "Adam's steps are equal: 0.02 each"
    assert found["brightness"]["steps"]["5"]["reward_brightness"]["gain"]["value"] == pytest.approx(0.1, abs=0.005)
    page = Path("out/ascent.md").read_text(encoding="utf-8")
    assert "6 videos of 3 prompts" in page
    assert "| brightness | half (3) | +" in page
    assert Path("out/ascent.png").stat().st_size > 3000
    with np.load("out/contrast.npz") as frames:
        assert frames["5"].shape == (4, 3, 16, 16)
    ascent("--rewards", "brightness", "--lr", "0.02")
    assert (len(starts), Path("out/ascent.md").read_text(encoding="utf-8")) == (1, page), "both are still in the report"
    ascent("--rewards", "compression")
    assert len(starts) == 2
    added = json.loads(Path("out/ascent.json").read_text(encoding="utf-8"))
    assert [*added] == ["compression", "brightness", "contrast"]
    assert f"| {NONE} |" in Path("out/ascent.md").read_text(encoding="utf-8"), "what was not named then has no value"
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"brightness was computed with lr = 0\.02, and now it is 0\.01; choose"):
        ascent("--rewards", "brightness", "--lr", "0.01")
    Path("own.py").write_text(OWN + "# another one\n")
    with pytest.raises(ValueError, match=r"'contrast' is another reward, or its files have changed"):
        ascent("--rewards", "contrast=own.py:contrast")
    Path("out/brightness.json").write_text("{")
    with pytest.raises(ValueError, match=r"brightness\.json is damaged"):
        ascent("--rewards", "brightness")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--rewards", "oracle"], "--rewards oracle: the oracle gives no gradient"),
        (["--rewards", "blind=own.py:blind"], "--rewards blind: own.py:blind gives no gradient"),
        (["--rewards", "beauty"], "there is no reward 'beauty'"),
        (["--rewards", "ascent:brightness"], "--rewards ascent: the report has this name"),
        (["--rewards", "brightness", "--seeds", "a"], "--seeds 'a'"),
        (["--rewards", "brightness", "--lr", "0"], "--lr above 0"),
        (["--rewards", "brightness", "--lr", "nan"], "--lr above 0"),
        (["--rewards", "brightness", "--sampling-steps", "0"], "--sampling-steps 1 or more"),
    ],
)
def test_what_cannot_be_is_one_line(starts: list[int], extra: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        ascent(*extra)
    assert "\n" not in str(error.value)


def test_gains_are_in_deviations_of_the_start_and_the_oracles_in_its_score() -> None:
    start = {"reward_a": np.array([1.0, 3.0]), ORACLE: np.array([0.5, math.nan])}
    end = {"reward_a": np.array([5.0, 7.0]), ORACLE: np.array([0.25, math.nan])}
    one = Ascent("a", "reward_a", np.array([0, 1]), {0: start, 4: end}, {})
    assert one.half == 4
    assert one.gain("reward_a", 4).value == 4
    assert one.deviations("reward_a", 4).value == pytest.approx(4 / math.sqrt(2))
    assert one.gain(ORACLE, 4).value == -0.25
    assert [cell.text for cell in grid_of([one]).cells[1]] == ["a", "end (4)", "+2.83 [2.83, 2.83]", "-0.250", NONE]


def test_the_start_is_of_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlvid.toy.tiny import tiny_model

    monkeypatch.setattr(pixel_ascent, "load_trainable", lambda *_: tiny_model())
    start = pixel_ascent.make_start(prompt_set("in_domain", 2, 1), [1, 2], steps=2)
    assert start.frames_BFCHW.shape == (4, 4, 3, 16, 16)
    assert start.places == [0, 1, 0, 1]
    assert not torch.equal(start.frames_BFCHW[0], start.frames_BFCHW[2]), "another seed is another noise"
