"""A floor of the motion part that the run measures on videos of the base model; without Ray."""

import io
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import save_run
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from rlvid import randomness
from rlvid.cli import app
from rlvid.config import RunConfig, load_config, parse_config
from rlvid.config.reference import find_keys
from rlvid.config.train import FLOOR_VIDEOS
from rlvid.data.run_prompts import kept_prompts
from rlvid.data.training_set import TrainingSet
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.generate import generate
from rlvid.evaluate.results.seeds import but_for_seed
from rlvid.evaluate.scorers import Scorers
from rlvid.models.trained import load_trainable
from rlvid.plan.parts import outline_parts
from rlvid.plan.show import flops
from rlvid.plan.videos import measured_floor
from rlvid.reward.load import check_reward, scores_whole_videos, trained_reward
from rlvid.runs.checkpoints import read_settings
from rlvid.toy.tiny import save_tiny_model
from rlvid.train import floor
from rlvid.train.floor import base_motion, floor_prompts, with_measured_floor
from rlvid.train.job import Job
from rlvid.train.preflight import as_begun, prepare, write_settings
from rlvid.train.resume import carries_over
from tuning.load import load_sweep

SHAPE: dict[str, Any] = {"frames": 4, "size": 16}


def reward_of(floor: Any = "base", **part: Any) -> dict[str, Any]:
    return {"mixture": [{"name": "brightness"}, {"name": "motion", "floor": floor} | part], "held_out": None}


def config_of(home: Path, floor: Any = "base", seed: int = 3, **sections: Any) -> RunConfig:
    """A run on three prompts."""
    (home / "words.txt").write_text("a red circle\na dog\na blue square\n")
    given = {
        "name": "run", "seed": seed, "model": {"path": str(home / "tiny"), **SHAPE}, "method": "draft",
        "data": {"source": "prompts", "prompts": str(home / "words.txt")}, "reward": reward_of(floor),
        "sampling": {"steps": 3, "guidance": 2.0, "negative_prompt": "blurred"},
        "output": {"storage": str(home / "runs")},
    }  # fmt: skip
    return parse_config(given | sections)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("floor")
    save_tiny_model(folder / "tiny")
    return folder


def job_of(config: RunConfig) -> Job:
    return Job.of(config, run=Path(config.output.storage) / config.name, use_gpu=False, progress=None)


# ------------------------------------------------------------------------------------------------------ settings


def test_a_floor_is_a_number_or_base() -> None:
    for given, found in (("base", "base"), (0.03, 0.03), ("0.03", 0.03), (1, 1.0)):
        config = parse_config({"reward": reward_of(given)})
        kept = config.reward.mixture[1].floor
        assert kept == found
        assert type(kept) is type(found)
        assert config.reward.floor_is_open == (found == "base")
        assert parse_config(config.model_dump(mode="json")) == config
        assert "measured" not in config.reward.mixture[1].model_dump()
    check_reward(parse_config({"reward": reward_of()}).reward, needs_gradient=True)
    assert scores_whole_videos(parse_config({"reward": reward_of()}).reward)
    (allowed,) = {key.allowed for key in find_keys("mixture floor") if key.path == "reward.mixture[].floor"}
    assert allowed == "number > 0, or `base`, or `null`"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"floor": "bass"}, r"^reward\.mixture\.1\.floor = 'bass': must be .* number greater than 0, or base"),
        ({"floor": math.inf}, r"^reward\.mixture\.1\.floor = inf: must be a finite number"),
        ({"floor": [0.1]}, r"^reward\.mixture\.1\.floor = \[0\.1\]: must be a finite number"),
        ({"floor": True}, r"^reward\.mixture\.1\.floor = True: true and false are not allowed"),
        ({"measured": True}, r"^reward\.mixture\.1: measured = true, but floor = base is not a number"),
        ({"name": "clip", "path": "x"}, r"^reward\.mixture\.1: floor = base is for name = 'motion', not for 'clip'"),
    ],
)
def test_what_is_no_floor_is_named(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_config({"reward": reward_of(**part)})
    assert "\n" not in str(error.value)


def test_a_measured_floor_is_that_number_to_all_that_read_it() -> None:
    open_one, number = (parse_config({"reward": reward_of(each)}) for each in ("base", 0.1))
    known = open_one.model_copy(update={"reward": open_one.reward.with_floor(0.1)})
    assert known.fingerprint == number.fingerprint != open_one.fingerprint
    assert number.fingerprint == "ac6d31e76b09", "as in versions without base"
    assert carries_over(known, number) == carries_over(number, known) == "all"
    assert parse_config(yaml.safe_load(yaml.safe_dump(known.model_dump(mode="json")))) == known
    assert (known.reward.measured_floor, number.reward.measured_floor) == (0.1, None)
    assert known.reward.with_floor(0.2) == known.reward
    assert Scorers(known.reward).names["reward"] == "1 x brightness + 1 x motion (floor 0.1)"
    assert trained_reward(known.reward).parts[1].floor == 0.1


def test_runs_that_measured_their_floors_are_seeds_of_one_description() -> None:
    open_one = parse_config({"reward": reward_of()})
    one, other = (
        open_one.model_copy(update={"seed": seed, "reward": open_one.reward.with_floor(found)})
        for seed, found in ((0, 0.1), (1, 0.11))
    )
    assert but_for_seed(one) == but_for_seed(other)
    given = [but_for_seed(parse_config({"reward": reward_of(each)})) for each in (0.1, 0.11)]
    assert given[0] != given[1]


# ------------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(("path", "negative"), [("builtin", "blurred"), ("builtin-wan", "")])
def test_the_plan_counts_the_videos_of_the_floor(path: str, negative: str) -> None:
    sampling = {"steps": 3, "guidance": 2.0, "negative_prompt": negative}
    config = parse_config({"model": {"path": path}, "reward": reward_of(), "sampling": sampling})
    parts = outline_parts(config)
    planned = measured_floor(parts, config)
    assert planned is not None
    model = load_trainable(config.model, 0, path, torch.device("cpu"), negative_prompt=negative)
    with FlopCounterMode(display=False) as embedding:
        text_1LD = model.encode_prompts(["a red circle"])
        model.negative(text_1LD)
    with FlopCounterMode(display=False) as counted:
        generate(model, ["a red circle"], seed=0, steps=3, guidance=2.0, final=config.sampling.final_level)
    made = counted.get_total_flops() - embedding.get_total_flops()
    assert planned.flops == pytest.approx(FLOOR_VIDEOS * made, rel=0.02)
    assert planned.peak > parts.denoiser.weights + parts.autoencoder.weights
    number = parse_config({"model": {"path": path}, "reward": reward_of(0.1), "sampling": sampling})
    assert measured_floor(parts, number) is None


def test_operations_have_a_unit_that_fits() -> None:
    said = [flops(number) for number in (3.2e7, 4.27e10, 2.56e12, 1.6e16, 9e17, 3.2e19)]
    assert said == ["0.032 GFLOPs", "42.7 GFLOPs", "2.56 TFLOPs", "16,000 TFLOPs", "0.9 EFLOPs", "32 EFLOPs"]


# ------------------------------------------------------------------------------------------------------ the number


def clips_of(config: RunConfig) -> TrainingSet:
    return TrainingSet.of(kept_prompts(config, Console(file=io.StringIO())))


def test_the_prompts_are_the_first_captions_again_and_again(tiny: Path) -> None:
    config = config_of(tiny)
    prompts = floor_prompts(config, clips_of(config))
    assert len(prompts) == FLOOR_VIDEOS == 8
    assert prompts[:3] == ["a red circle", "a dog", "a blue square"]
    assert prompts[3:] == prompts[:5]
    assert floor_prompts(config_of(tiny, 0.03), TrainingSet(())) == []
    with pytest.raises(ValueError, match=r"floor = 'base': no caption can be read"):
        floor_prompts(config, TrainingSet(()))


def test_it_is_the_mean_motion_of_the_base_models_videos(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "_on_ray", base_motion)
    config = config_of(tiny)
    prompts, said = floor_prompts(config, clips_of(config)), Console(file=io.StringIO(), width=200)
    job = with_measured_floor(job_of(config), prompts, said)

    model = load_trainable(config.model, 3, config.model.path, negative_prompt="blurred")
    noise = randomness.normal(model.latent_shape, 3, "generate", [(i,) for i in range(8)])
    with torch.no_grad():
        latents = denoise(model, noise, model.encode_prompts(prompts), model.path.grid(3), guidance=2.0)
        frames_BFCHW = model.decode_frames(latents, torch.arange(4).expand(8, -1)).clamp(0, 1)
    moved = [(after - before).abs() for before, after in pairwise(frames_BFCHW.double().unbind(1))]
    expected = float(torch.stack(moved).mean())
    (found,) = [part.floor for part in job.reward.mixture if part.name == "motion"]
    assert found == pytest.approx(expected, rel=0.006), "three digits are kept"
    assert found == float(f"{found:.3g}")
    assert job.config == config.model_copy(update={"reward": config.reward.with_floor(found)})
    assert read_settings(job.run) == job.config
    assert said.file.getvalue().splitlines()[-1] == f"motion floor {found:g}, of 8 videos of the base model"  # type: ignore[attr-defined]
    first = base_motion(job_of(config), prompts[:2])
    assert first == base_motion(job_of(config_of(tiny, train={"workers": 2})), prompts[:2])
    others = base_motion(job_of(config_of(tiny, seed=4)), prompts[:2])
    assert others != pytest.approx(first, rel=1e-3), "the noise is of the run's seed"


def test_a_number_is_not_measured(tiny: Path) -> None:
    job = job_of(config_of(tiny, 0.03))
    assert with_measured_floor(job, floor_prompts(job.config, TrainingSet(())), Console()) is job


@pytest.mark.parametrize(("motions", "what"), [([0.0] * 8, "do not move"), ([0.1, math.nan], "not finite")])
def test_videos_without_a_motion_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, motions: list[float], what: str
) -> None:
    monkeypatch.setattr(floor, "_on_ray", lambda job, prompts: motions)
    job = job_of(config_of(tmp_path))
    with pytest.raises(ValueError, match=rf"^reward\.mixture: floor = 'base': .*{what}.* 0\.03$") as error:
        with_measured_floor(job, ["a dog"] * len(motions), Console())
    assert "\n" not in str(error.value)
    assert not (job.run / "config.yaml").exists()


# ------------------------------------------------------------------------------------------------------ resumed runs


def test_a_run_that_has_begun_keeps_its_floor(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run, known = tmp_path / "runs" / "run", config.model_copy(update={"reward": config.reward.with_floor(0.0153)})
    write_settings(run, known)
    assert as_begun(config) == config, "a failed start is no run yet"
    (run / "archive").mkdir()
    assert as_begun(config) == known
    assert prepare(as_begun(config)) == run
    assert as_begun(config_of(tmp_path, 0.0153)) == known, "the printed number may be given, too"
    assert as_begun(config_of(tmp_path, 0.5)) == config_of(tmp_path, 0.5)
    with pytest.raises(ValueError, match=r"another config \(reward\.mixture: .*0\.0153.*0\.5"):
        prepare(as_begun(config_of(tmp_path, 0.5)))
    write_settings(run, config_of(tmp_path, 0.0153))
    with pytest.raises(ValueError, match=r"another config \(reward\.mixture: .*0\.0153.*base"):
        prepare(as_begun(config))
    (run / "config.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"config\.yaml.*; or choose another name="):
        prepare(as_begun(config))


# ------------------------------------------------------------------------------------------------------ without a run


def test_what_no_run_has_measured_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^reward\.mixture: the floor of 'motion' is base.*floor=0\.03$"):
        trained_reward(parse_config({"reward": reward_of()}).reward)
    with pytest.raises(ValueError, match=r"^reward\.mixture: floor = 'base'.* all trials of a sweep.*floor=0\.03$"):
        load_sweep(
            "toy",
            [f"storage={tmp_path}", "settings.reward={mixture: [{name: motion, floor: base}]}"],
        ).planned()


def test_the_base_model_alone_is_evaluated_without_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = save_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    description = config.model_dump(mode="json", exclude={"data"})
    Path("mine.yaml").write_text(yaml.safe_dump(description | {"reward": reward_of()}))
    Path("words.txt").write_text("a dog\na red circle\n")
    arguments = ["evaluate", "--base", "mine.yaml", "name=mine", "--steps", "2", "--sets", "words.txt"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "without its part motion" in " ".join((capsys.readouterr().out + done.output).split())
    about = yaml.safe_load(Path("runs/mine-base/evaluation.yaml").read_text())
    assert about["rewards"]["reward"] == "1 x brightness"
    alone = load_config("mine.yaml", ["reward.mixture=[{name: motion, floor: base}]"])
    with pytest.raises(ValueError, match=r"^reward\.mixture: .* is base, .*floor=0\.03"):
        alone.reward.without_open_floor()
