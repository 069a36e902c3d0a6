"""The built-in world's model of Wan's classes: it is small, it loads, and its videos show what was asked for."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import load_config, shipped_configs
from rlvid.config.methods import METHODS
from rlvid.config.model import ModelConfig
from rlvid.diffusion.generate import generate
from rlvid.models.folders import builtin_folder, family, is_text_apart
from rlvid.models.load import denoiser_outline, load_video_model
from rlvid.models.trained import load_trainable, trained_state
from rlvid.models.video_shape import resolved_shape
from rlvid.models.wan import WanModel
from rlvid.reward.load import load_reward
from rlvid.train.engine import TorchEngine
from rlvid.train.preflight import check
from rlvid.world.captions import prompt_set
from rlvid.world.grade import grade

LONG = ("instructvideo", "draft", "draft-lv")
"""Methods whose losses on Wan are tested elsewhere, too."""


@pytest.fixture(scope="module")
def model() -> WanModel:
    made = load_video_model(ModelConfig(path="builtin-wan"))
    assert isinstance(made, WanModel)
    return made


def test_it_is_small_and_has_nine_frames(model: WanModel) -> None:
    assert (model.frames, model.height, model.width, model.fps) == (9, 32, 32, 8)
    assert model.latent_shape == (8, 3, 8, 8)
    files = list(builtin_folder("builtin-wan").rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) < 4 * 2_000_000, "under two million float32 parameters"


@pytest.mark.parametrize("name", ["builtin", "builtin-wan"])
def test_a_copy_has_the_usual_shape_of_the_built_in_model(tmp_path: Path, name: str) -> None:
    """Of the model as it is, and with a denoiser that diffusers wrote anew."""
    copy = tmp_path / "copy"
    shutil.copytree(builtin_folder(name), copy)
    for _ in range(2):
        assert resolved_shape(ModelConfig(path=str(copy))) == resolved_shape(ModelConfig(path=name))
        denoiser_outline(name).save_config(copy / family(name).denoiser)


def test_all_weights_of_the_package_are_small() -> None:
    files = (path for path in Path(builtin_folder()).parent.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) < 30e6


def test_its_videos_show_what_was_asked_for(model: WanModel) -> None:
    prompts = prompt_set("in_domain", 32)
    grades = grade(generate(model, prompts, seed=0, steps=10, guidance=3.0).clamp(0, 1), prompts)
    share = {name: float(grades[name].mean()) for name in ("background", "colour", "motion")}
    assert min(share.values()) >= 0.95, share
    assert grades["subject"].mean() >= 0.6


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("toy-wan")])
def test_its_descriptions_pass_all_checks_and_workers_embed_prompts_themselves(name: str) -> None:
    config = load_config(name)
    check(config)
    assert config.model.path == "builtin-wan"
    assert not is_text_apart(config.model.path), "so nobody embeds prompts for them"


@pytest.mark.parametrize("name", [name for name in shipped_configs() if re.fullmatch("toy(-(?!wan).*)?", name)])
def test_it_takes_the_settings_of_every_method(name: str) -> None:
    check(load_config(name, ["model.path=builtin-wan"]))


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in LONG)) for each in METHODS])
def test_every_method_moves_all_of_its_adapter(name: str) -> None:
    settings = ["model.path=builtin-wan", "train.batch_size=4", "train.workers=1", "train.micro_batch=2"]
    settings += ["sampling.steps=4", "optimizer.warmup=0", "reward.held_out=null"]
    described = load_config("toy" if name == "instructvideo" else f"toy-{name}")
    grouped = described.train.group_size > 1
    config = load_config(described.name, [*settings, *(["train.group_size=2"] if grouped else [])])
    model = load_trainable(config.model, 0, "builtin-wan")
    context = Context(config, model, load_reward("builtin"), None, Stopwatch(torch.device("cpu")))
    method, engine = ALGORITHMS[name](context), TorchEngine(model.denoiser, config.optimizer)
    before = {key: tensor.clone() for key, tensor in trained_state(model.denoiser, config.model).items()}
    for step in range(2):  # in the first one, B is zero and A has no gradient
        serials = list(range(4 * step, 4 * step + 4))
        prompts = [("a red circle moving left", "a blue star growing")[serial // 2 % 2] for serial in serials]
        latents = randomness.normal(model.latent_shape, 0, "clip", [(serial,) for serial in serials])
        for update in method.updates(Batch(step, serials, prompts, model.encode_prompts(prompts), latents)):
            engine.backward(update.loss, update.step)
            if update.step:
                assert 0 < engine.step(step).gradient_norm < math.inf
    after = trained_state(model.denoiser, config.model)
    assert len(after) == 80
    assert [key for key, tensor in after.items() if torch.equal(tensor, before[key])] == []


def test_the_order_of_videos_changes_nothing(model: WanModel) -> None:
    prompts = prompt_set("in_domain", 3)
    some = generate(model, prompts, seed=0, steps=2, guidance=3.0)
    again = generate(model, prompts[:1], seed=0, steps=2, guidance=3.0)
    torch.testing.assert_close(some[:1], again, rtol=0, atol=1e-4)
