"""The measured part of a plan: which videos it runs, how it multiplies seconds, what stands in for missing weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from rlvid.algorithms.alignprop import AlignProp
from rlvid.algorithms.base import Batch, Stopwatch
from rlvid.cli import app
from rlvid.config import RunConfig, load_config, parse_config
from rlvid.plan import trial
from rlvid.plan.parts import outline_parts
from rlvid.plan.plan import make_plan
from rlvid.plan.show import render_trial
from rlvid.plan.trial import Trial, run_trial
from rlvid.toy.tiny import save_tiny_model
from rlvid.toy.tiny_wan import save_tiny_wan

TRAIN = {"batch_size": 8, "workers": 2, "micro_batch": 2}
POLICY = {"name": "ddpo", "window": 1}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """Describes a run of a miniature of either family."""
    folder = tmp_path_factory.mktemp("stored")
    save_tiny_model(folder / "unet")
    save_tiny_wan(folder / "wan")
    shapes = {"unet": {"frames": 4, "size": 16}, "wan": {"frames": 5, "size": 16}}

    def described(family: str = "unet", **sections: object) -> RunConfig:
        base = {
            "model": {"path": str(folder / family), "precision": "float32", **shapes[family]},
            "sampling": {"steps": 4}, "reward": {"name": "builtin", "held_out": "builtin-heldout", "segments": 2},
            "train": TRAIN,
        }  # fmt: skip
        return parse_config(base | sections)

    return described


@pytest.mark.parametrize("family", ["unet", "wan"])
def test_a_step_of_each_family_is_run_and_its_stages_are_those_of_a_training(
    stored: Callable[..., RunConfig], family: str
) -> None:
    config, before = stored(family, train=TRAIN | {"cpus_per_worker": 2}), torch.get_num_threads()
    found = run_trial(config, outline_parts(config))
    assert {"chain", "decode", "reward", "held-out", "backward", "sync"} <= set(found.stages)
    assert all(seconds > 0 for seconds in found.stages.values())
    assert found.step == sum(found.stages.values())
    assert (found.device, found.threads, found.random) == ("cuda" if torch.cuda.is_available() else "cpu", 2, ())
    assert torch.get_num_threads() == before, "the caller's threads are restored"
    assert found.memory is not None


@pytest.mark.parametrize(
    ("method", "videos", "share"),
    [
        ({"name": "instructvideo"}, 2, 2.0),  # a micro-batch of two, of a worker's four videos
        (POLICY, 8, 0.5),  # the batch of two workers, of which each has half
    ],
)
def test_seconds_are_those_of_a_workers_videos(
    stored: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, object],
    videos: int,
    share: float,
) -> None:
    made, seconds = list[int](), iter([100.0, 3.0, 1.0, 2.0])
    original = trial.drawn_batch

    def drawn(*given: object) -> object:
        batch = original(*given)  # type: ignore[arg-type]
        made.append(len(batch))
        return batch

    monkeypatch.setattr(trial, "drawn_batch", drawn)
    monkeypatch.setattr(Stopwatch, "read", lambda watch: {"chain": next(seconds), "sync": 0.25})
    config = stored(method=method)
    found = run_trial(config, outline_parts(config))
    assert made == [videos] * 4
    assert found.stages == {"chain": share * 2.0, "sync": 0.25}, "medians of all rounds but the first"
    assert (found.memory is None) == (videos == 8), "the videos of two workers do not show what one needs"


def test_a_reward_that_fails_is_an_error_and_not_a_cheap_step(stored: Callable[..., RunConfig], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(frames, prompts):\n    raise KeyError('caption')\n")
    config = stored(reward={"name": "custom", "path": f"{file}:score", "held_out": None})
    with pytest.raises(ValueError, match=r"^a step was not measured: the reward .*KeyError"):
        run_trial(config, outline_parts(config))


def test_the_run_ends_where_its_budget_of_seconds_does(stored: Callable[..., RunConfig]) -> None:
    config = stored(train=TRAIN | {"steps": 1000, "max_seconds": 60})
    found = Trial("cpu", 1, (), {"chain": 2.0}, None)
    said = [line for line in render_trial(make_plan(config), found) if isinstance(line, str)]
    assert said[0].endswith("without Ray and DeepSpeed")
    assert said[1].startswith(
        "at this pace 1,000 steps take 33.3 minutes; train.max_seconds ends them after 60 seconds"
    )


def test_no_further_round_begins_after_half_a_minute(
    stored: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_LONG", 0.0)
    config, rounds = stored(), list[int]()
    original = trial.drawn_batch
    monkeypatch.setattr(trial, "drawn_batch", lambda *given: (rounds.append(1), original(*given))[1])
    run_trial(config, outline_parts(config))
    assert len(rounds) == 2, "one to warm up, one that is timed"


def test_random_weights_stand_in_for_published_ones_that_are_not_here() -> None:
    config = load_config("wan-1.3b-hpsv2", ["reward.held_out=clip", "reward.held_out_path=ViT.pt"])
    found, changed = trial._with_stand_ins(config)
    assert found.model.path == "random-wan-1.3b"
    assert [part.path for part in found.reward.mixture] == ["random", None]
    assert found.reward.held_out_path == "random"
    assert not found.reward.floor_is_open, "the floor that a run measures is any number here"
    assert changed == ["model.path", "reward.held_out_path", "reward.mixture.0.path"]
    toy = load_config("toy")
    assert trial._with_stand_ins(toy) == (toy, [])


@pytest.mark.parametrize(
    ("path", "message"), [("Wan-AI/Wan2.1-T2V-14B-Diffusers", "structure without weights"), ("nobody/model", "fetch")]
)
def test_models_without_a_stand_in_are_named(path: str, message: str) -> None:
    config = load_config("wan-1.3b-hpsv2", [f"model.path={path}", "reward.mixture=[]", "reward.name=builtin"])
    with pytest.raises(ValueError, match=message):
        run_trial(config, outline_parts(load_config("toy-wan")))


def test_the_command_shows_what_it_measured(stored: Callable[..., RunConfig], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(stored().model_dump(mode="json")), encoding="utf-8")
    words = CliRunner().invoke(app, ["plan", str(file), "--measure"])
    assert words.exit_code == 0, words.output
    assert "Measured here" in words.output
    assert "one worker's part of a step, without Ray and DeepSpeed" in words.output
    found = json.loads(CliRunner().invoke(app, ["plan", str(file), "--measure", "--json"]).output)["measured"]
    assert found["step"] == pytest.approx(sum(found["stages"].values()))
    assert found["random"] == []
    assert "measured" not in json.loads(CliRunner().invoke(app, ["plan", str(file), "--json"]).output)


def test_a_method_that_draws_its_work_is_timed_at_the_mean(
    stored: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    carried, chain = list[int](), AlignProp.chain

    def noted(self: AlignProp, batch: Batch, start: Tensor, grid: list[float], steps: int) -> Tensor:
        carried.append(steps)
        return chain(self, batch, start, grid, steps)

    monkeypatch.setattr(AlignProp, "chain", noted)
    config = stored(method={"name": "alignprop", "truncation": "uniform"}, sampling={"steps": 20})
    run_trial(config, outline_parts(config))
    assert len(carried) > 1
    assert set(carried) <= {10, 11}, "the cut is uniform on 0 ... 19, so 10.5 steps carry gradient on average"
