"""Wan's model class: shapes, text, guidance, precision, loading from a folder, structures without weights."""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from rlvid.config.model import ModelConfig
from rlvid.doctor.model import check_shift
from rlvid.models import folders
from rlvid.models.folders import UNET3D, WAN, family, model_folder, structure_folder
from rlvid.models.load import check_model, denoiser_outline, load_video_model, path_outline
from rlvid.models.lora import inject_lora, lora_parameters
from rlvid.models.text_rows import cut_rows, pad_rows
from rlvid.models.video_shape import VideoShape, resolved_shape
from rlvid.models.wan import WanModel
from rlvid.models.wan_parts import fill_random, load_wan, outline
from rlvid.models.wan_text import RandomEmbedder
from rlvid.toy.tiny_wan import save_tiny_wan, tiny_wan

PROMPTS = ["a red circle moving left", "a dog"]
KINDS = ("2.1", "2.2")
SHAPE: dict[str, Any] = {"frames": 9, "height": 16, "width": 32}


@pytest.fixture(scope="module")
def model() -> WanModel:
    return tiny_wan()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan")
    save_tiny_wan(path)
    return path


def noise_of(model: WanModel, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ------------------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_latents_and_frames(kind: str) -> None:
    model = tiny_wan(kind)
    assert model.latent_shape == {"2.1": (4, 3, 4, 8), "2.2": (6, 3, 2, 4)}[kind]
    posterior = model.encode_frames(torch.rand(2, 9, 3, 16, 32))
    assert posterior.mean.shape == posterior.std.shape == (2, *model.latent_shape)
    frames = model.decode_frames(posterior.sample(torch.randn(posterior.mean.shape)), torch.tensor([[0], [8]]))
    assert frames.shape == (2, 1, 3, 16, 32)
    assert frames.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("2.1", {"frames": 8}, r"model\.frames = 8.*4 n \+ 1.* 5 or 9"),
        ("2.1", {"frames": 12}, r"model\.frames = 12.* 9 or 13"),
        ("2.1", {"frames": 0}, r"model\.frames = 0.* 5 or 9"),
        ("2.1", {"height": 20}, r"model\.height = 20.*multiples of 8.* 16 or 24"),
        ("2.2", {"width": 24}, r"model\.width = 24.*multiples of 16.* 16 or 32"),
        ("2.2", {"width": 0}, r"model\.width = 0.*multiples of 16"),
    ],
)
def test_a_shape_that_diffusers_would_cut_is_refused(kind: str, shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_wan(kind, **shape)


def test_frames_that_diffusers_would_drop_are_not_encoded(model: WanModel) -> None:
    with pytest.raises(ValueError, match="frames = 8"):
        model.encode_frames(torch.rand(1, 8, 3, 16, 32))


def test_a_shift_of_zero_is_refused(model: WanModel) -> None:
    with pytest.raises(ValueError, match=r"shift = 0.*above 0"):
        WanModel(model.denoiser, model.vae, None, **SHAPE, shift=0)


# -------------------------------------------------------------------------------------------------------------- text


def test_only_the_rows_of_a_prompt_are_stored(model: WanModel) -> None:
    text = model.encode_prompts([*PROMPTS, ""])
    rows = [cut_rows(each) for each in text]
    assert [len(each) for each in rows] == [6, 3, 1]  # a word each, and the end
    assert torch.equal(pad_rows(rows, 16), text)
    assert not text[1, 3:].any()
    assert len(cut_rows(torch.zeros(16, 4))) == 0


def test_a_long_prompt_is_cut(model: WanModel) -> None:
    text = model.encode_prompts(["dog " * 30])
    assert text.shape == (1, 16, 16)
    assert len(cut_rows(text[0])) == 16


def test_embeddings_are_drawn_where_there_is_no_encoder() -> None:
    text = RandomEmbedder(8, 10).embed(["a dog", "a cat", "a dog", "x " * 20])
    assert text.shape == (4, 10, 8)
    assert [len(cut_rows(each)) for each in text] == [3, 3, 3, 10]
    assert torch.equal(text[0], text[2])
    assert not torch.equal(text[0], text[1])


def test_without_an_encoder_the_embeddings_are_given(model: WanModel) -> None:
    bare = WanModel(model.denoiser, model.vae, None, **SHAPE)
    latents, text = noise_of(model), model.encode_prompts(PROMPTS)
    with pytest.raises(ValueError, match="text encoder is not loaded"):
        bare.encode_prompts(PROMPTS)
    with pytest.raises(ValueError, match="negative_1LD"):
        bare.predict(latents, 0.5, text, 5.0)
    bare.negative_1LD = model.encode_prompts([""])
    assert torch.equal(bare.predict(latents, 0.5, text, 5.0).x0, model.predict(latents, 0.5, text, 5.0).x0)


def test_the_negative_prompt_is_a_setting(model: WanModel) -> None:
    other = WanModel(model.denoiser, model.vae, model.text, **SHAPE, negative_prompt="blue")
    latents, text = noise_of(model), model.encode_prompts(PROMPTS)
    plain, changed = (each.predict(latents, 0.5, text, 5.0).eps for each in (model, other))
    assert (plain - changed).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------- prediction


def test_the_prediction_is_the_guided_velocity_from_one_call(model: WanModel) -> None:
    latents, text = noise_of(model), model.encode_prompts(PROMPTS)
    level_B = torch.tensor([0.9, 0.25])
    calls: list[tuple[int, Tensor]] = []
    hook = model.denoiser.register_forward_hook(lambda _, inputs, __: calls.append((len(inputs[0]), inputs[1])))
    prediction = model.predict(latents, level_B, text, 5.0)
    hook.remove()
    assert [count for count, _ in calls] == [4]
    assert torch.equal(calls[0][1], torch.tensor([900.0, 250.0, 900.0, 250.0]))
    negative = model.encode_prompts([""]).expand_as(text)
    cond, uncond = (
        model.denoiser(latents, level_B * 1000, encoder_hidden_states=each, return_dict=False)[0]
        for each in (text, negative)
    )
    velocity, s = uncond + 5 * (cond - uncond), level_B.view(2, 1, 1, 1, 1)
    torch.testing.assert_close(prediction.x0, latents - s * velocity, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.eps, latents + (1 - s) * velocity, rtol=0, atol=1e-5)
    torch.testing.assert_close((1 - s) * prediction.x0 + s * prediction.eps, latents, rtol=0, atol=1e-5)
    alone = model.predict(latents[:1], 0.9, text[:1], 5.0)
    torch.testing.assert_close(alone.x0, prediction.x0[:1], rtol=0, atol=1e-5)


def test_recomputed_blocks_and_a_branch_without_gradient() -> None:
    model = tiny_wan()
    inject_lora(model.denoiser, 2, ["attention"], seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in lora_parameters(model.denoiser):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    latents, text = noise_of(model), model.encode_prompts(PROMPTS)

    def gradient(**options: bool) -> Tensor:
        loss = model.predict(latents, 0.6, text, 5.0, **options).x0.square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora_parameters(model.denoiser))])

    kept, again, half = gradient(), gradient(recompute=True), gradient(unconditional_gradient=False)
    assert len(lora_parameters(model.denoiser)) == 2 * 2 * 8  # two layers of two attentions, A and B of four linears
    assert kept.ne(0).float().mean() > 0.99
    assert torch.equal(kept, again)
    assert (kept - half).norm() > 1e-2 * kept.norm()
    tuned = model.predict(latents, 0.6, text, 5.0).x0
    with model.base():
        base = model.predict(latents, 0.6, text, 5.0).x0
    assert (tuned - base).abs().max() > 1e-3
    assert torch.allclose(base, tiny_wan().predict(latents, 0.6, text, 5.0).x0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_very_model(kind: str, tmp_path: Path) -> None:
    model = tiny_wan(kind)
    save_tiny_wan(tmp_path, kind)
    loaded = load_video_model(ModelConfig(path=str(tmp_path), **SHAPE))
    check_model(str(tmp_path))
    assert isinstance(loaded, WanModel)
    assert loaded.path.shift == 3.0
    assert loaded.text is not None
    assert loaded.text.length == 16
    latents, text = noise_of(model), model.encode_prompts(PROMPTS)
    assert torch.equal(loaded.encode_prompts(PROMPTS), text)
    assert torch.equal(loaded.predict(latents, 0.5, text, 3.0).x0, model.predict(latents, 0.5, text, 3.0).x0)
    frames = torch.tensor([[0, 8]] * 2)
    assert torch.equal(loaded.decode_frames(latents, frames), model.decode_frames(latents, frames))
    bare = load_wan(ModelConfig(path=str(tmp_path), **SHAPE), text=False, denoiser=False)
    assert bare.text is None
    assert next(bare.denoiser.parameters()).is_meta
    assert torch.equal(bare.decode_frames(latents, frames), model.decode_frames(latents, frames))


def test_weights_move_in_the_precision_that_they_will_have(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = dict[str, set[torch.dtype]]()
    plain = nn.Module.to

    def to(network: nn.Module, *where: object) -> nn.Module:
        moved[type(network).__name__] = {each.dtype for each in network.parameters() if each.dim() > 1}
        return plain(network, *where)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.Module, "to", to)
    load_wan(ModelConfig(path=str(folder), **SHAPE, precision="bfloat16"))
    assert torch.bfloat16 in moved["WanTransformer3DModel"]
    assert moved["UMT5EncoderModel"] == {torch.bfloat16}


def test_in_half_precision_the_same_weights_stay_exact_as_in_diffusers(folder: Path) -> None:
    model = load_wan(ModelConfig(path=str(folder), **SHAPE, precision="bfloat16"))
    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    expected = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert {name: parameter.dtype for name, parameter in model.denoiser.named_parameters()} == expected
    assert set(expected.values()) == {torch.bfloat16, torch.float32}
    assert {parameter.dtype for parameter in model.vae.parameters()} == {torch.float32}
    text = model.encode_prompts(PROMPTS)
    assert text.dtype == torch.bfloat16
    latents = noise_of(model)
    coarse = model.predict(latents, 0.5, text, 1.0)
    assert coarse.x0.dtype == torch.float32
    ours = (latents - coarse.x0) / 0.5
    with torch.no_grad():
        velocity = theirs.eval()(latents.bfloat16(), torch.full((2,), 500.0), text, return_dict=False)[0].float()
    torch.testing.assert_close(ours, velocity, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "WanImageToVideoPipeline; supported: WanPi"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "second transformer"),
        ("transformer/config.json", {"in_channels": 36}, "conditioned on images"),
        (
            "vae/config.json",
            {"_class_name": "AutoencoderKL"},
            "its autoencoder is a AutoencoderKL; supported",
        ),
        ("text_encoder/config.json", {"model_type": "t5"}, "of type 't5'; supported: 'umt5'"),
    ],
)
def test_another_model_is_refused(folder: Path, tmp_path: Path, file: str, values: Any, message: str) -> None:
    copy = copied(folder, tmp_path / "copy")
    change(copy / file, **values)
    with pytest.raises(ValueError, match=message):
        model_folder(str(copy))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("text_encoder", {"d_model": 24}, r"gives 24 numbers a token \(text_encoder: d_model\), .*reads 16 "),
        ("vae", {"latents_mean": [0.5]}, r"vae: latents_mean is not 4 finite numbers"),
        ("vae", {"latents_std": [1.0, 1.0, 1.0]}, r"vae: latents_std is not 4 finite numbers"),
        ("vae", {"latents_std": [1.0, math.nan, 1.0, 1.0]}, r"vae: latents_std is not 4 finite numbers"),
        ("vae", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, r"vae: latents_std has 0; allowed: numbers above 0"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(
    folder: Path, tmp_path: Path, part: str, values: dict[str, Any], message: str
) -> None:
    copy = copied(folder, tmp_path / "copy")
    change(copy / part / "config.json", **values)
    for check in (structure_folder, check_model):
        with pytest.raises(ValueError, match=message) as refused:
            check(str(copy))
        assert str(refused.value).startswith(f"model.path = {str(copy)!r}: ")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("transformer", "rope_max_seq_len", None),
        ("transformer", "rope_max_seq_len", "1024"),
        ("transformer", "patch_size", 2),
        ("transformer", "patch_size", None),
        ("transformer", "patch_size", [1, 2]),
        ("transformer", "num_attention_heads", "2"),
        ("vae", "scale_factor_spatial", None),
        ("vae", "scale_factor_temporal", 0),
        ("text_encoder", "num_heads", "2"),
    ],
)
def test_a_damaged_setting_is_named(folder: Path, tmp_path: Path, part: str, key: str, value: Any) -> None:
    copy = copied(folder, tmp_path / "copy")
    change(copy / part / "config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"config\.json is damaged \({key} = .*; expected ") as refused:
        resolved_shape(ModelConfig(path=str(copy), **SHAPE))
    assert str(copy / part / "config.json") in str(refused.value)


def test_settings_of_which_no_network_can_be_built_are_named(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "copy")
    change(copy / "vae" / "config.json", dim_mult=None)
    with pytest.raises(ValueError, match=r"vae/config\.json is damaged \(no network can be built of it"):
        check_model(str(copy))


def test_a_missing_part_or_folder_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder nor in the Hugging Face cache"):
        load_wan(ModelConfig(path="nobody/nothing"))
    with pytest.raises(ValueError, match="'random-wan3': there is no such folder"):
        load_video_model(ModelConfig(path="random-wan3"))
    (tmp_path / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
    with pytest.raises(ValueError, match=r"lacks transformer/config.json, .*tokenizer/tokenizer_config.json"):
        model_folder(str(tmp_path))


def test_the_family_follows_from_the_folder(folder: Path, tmp_path: Path) -> None:
    assert family(str(folder)) is WAN
    assert family("builtin") is family("random") is UNET3D
    assert family("random-wan-14b") is WAN
    (tmp_path / "transformer").mkdir()
    assert family(str(tmp_path)) is WAN  # without a model_index.json
    with pytest.raises(ValueError, match=r"has neither unet nor transformer; expected 'builtin'"):
        family(str(folder / "vae"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 10, "size": 16}, r"model\.frames = 10; .*4 n \+ 1, such as 9 or 13"),
        ({"frames": 3, "size": 16}, r"model\.frames = 3; .*such as 5 or 9"),
        ({"size": 20}, r"model\.size = 20; .*multiples of 8, such as 16 or 24"),
        ({"height": 16, "width": 20}, r"model\.width = 20; .*multiples of 8"),
        ({"height": 20, "width": 16}, r"model\.height = 20; .*multiples of 8"),
        ({"frames": 129, "size": 16}, r"model\.frames = 129; .*up to 125"),
        ({"size": 264}, r"model\.size = 264; .*up to 256"),
        ({"height": 16, "width": 260}, r"model\.width = 260; .*up to 256"),
        ({}, r"usual 81 frames of 480 x 832 .*set model\.size; allowed: up to 125 frames and 256 pixels a side"),
        ({"height": 16}, r"set model\.width; "),  # model.size is refused beside it
        ({"width": 16}, r"set model\.height; "),
    ],
)
def test_a_wrong_shape_is_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], message: str
) -> None:
    monkeypatch.setattr("rlvid.models.wan_parts.read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        load_wan(ModelConfig(path=str(folder), **settings))
    with pytest.raises(ValueError, match=message):
        resolved_shape(ModelConfig(path=str(folder), **settings))


def test_shape_and_shift_are_those_of_the_published_model_unless_they_are_set(folder: Path) -> None:
    assert resolved_shape(ModelConfig(path="random-wan-1.3b")) == VideoShape(81, 480, 832, 16)
    assert resolved_shape(ModelConfig(path=str(folder), size=256)) == VideoShape(81, 256, 256, 16)
    assert resolved_shape(ModelConfig(path=str(folder), frames=5, size=16)) == VideoShape(5, 16, 16, 16)
    assert resolved_shape(ModelConfig(path="random-wan-ti2v-5b")) == VideoShape(121, 704, 1280, 24)
    assert load_wan(ModelConfig(path=str(folder), **SHAPE, shift=7.5)).path.shift == 7.5
    with pytest.raises(ValueError, match=r"model\.shift = 3: .*is a 3D U-Net"):
        resolved_shape(ModelConfig(path="builtin", shift=3))


def test_the_longest_video_of_a_model_is_as_long_as_its_positions(folder: Path) -> None:
    model = load_wan(ModelConfig(path=str(folder), frames=125, height=8, width=256), text=False)
    with torch.no_grad():
        prediction = model.predict(torch.zeros(1, *model.latent_shape), 0.5, torch.zeros(1, 16, 16), 1.0)
    assert prediction.x0.shape[1:] == model.latent_shape == (4, 32, 2, 64)


UNIPC, EULER = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("settings", "shift"),
    [
        ({"_class_name": UNIPC, "flow_shift": 5, "shift": 7}, 5),
        ({"_class_name": EULER, "flow_shift": 5, "shift": 7}, 7),
        ({"_class_name": UNIPC, "shift": 7}, 1),
        ({"_class_name": EULER}, 1),
        ({"_class_name": "SomebodysScheduler", "flow_shift": 5}, 5),
        ({"shift": 7.5}, 7.5),
    ],
)
def test_the_shift_is_that_of_the_key_which_the_schedulers_class_reads(
    folder: Path, tmp_path: Path, settings: dict[str, Any], shift: float
) -> None:
    copy = copied(folder, tmp_path / "copy")
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    assert path_outline(ModelConfig(path=str(copy))).shift == shift
    assert load_wan(ModelConfig(path=str(copy), **SHAPE), text=False, denoiser=False).path.shift == shift


@pytest.mark.parametrize("value", [None, 0, -1, "three", True, math.nan])
def test_a_stored_shift_that_is_no_number_above_zero_is_named_with_its_file(
    folder: Path, tmp_path: Path, value: Any
) -> None:
    copy = copied(folder, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    change(file, flow_shift=value)
    named = rf"{re.escape(str(file))}: flow_shift = {json.dumps(value)}; allowed: .* model\.shift"
    for read in (path_outline, partial(load_wan, text=False, denoiser=False)):
        with pytest.raises(ValueError, match=named):
            read(ModelConfig(path=str(copy), **SHAPE))
    (told,) = check_shift(str(copy))
    assert (told.status, str(file) in told.found) == ("warning", True)
    assert path_outline(ModelConfig(path=str(copy), shift=3)).shift == 3


def test_a_boundary_without_a_second_transformer_means_nothing(folder: Path) -> None:
    before = (folder / "model_index.json").read_text()
    change(folder / "model_index.json", boundary_ratio=0.875, transformer_2=[None, None])
    assert model_folder(str(folder)) == folder
    (folder / "model_index.json").write_text(before)


# -------------------------------------------------------------------------------------------------------- structures


@pytest.mark.parametrize(
    ("path", "transformer", "vae"),
    [
        ("random-wan-1.3b", 1_418_996_800, 126_892_531),
        ("random-wan-14b", 14_288_491_584, 126_892_531),
        ("random-wan-ti2v-5b", 4_999_787_712, 704_688_668),
    ],
)
def test_the_published_structures_have_the_published_sizes(path: str, transformer: int, vae: int) -> None:
    networks = outline(structure_folder(path))
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [transformer, vae]


@pytest.mark.parametrize(("targets", "layers"), [(["attention"], 240), (["attention+ff"], 300)])
def test_adapters_sit_on_the_layers_of_the_published_model(targets: list[str], layers: int) -> None:
    denoiser = denoiser_outline("random-wan-1.3b")
    assert len(inject_lora(denoiser, 32, targets, seed=0)) == 2 * layers
    with pytest.raises(ValueError, match=r"'temporal' is for 3D U-Nets.*use 'attention'"):
        inject_lora(denoiser, 32, ["temporal"], seed=0)


def test_large_structures_have_no_weights() -> None:
    with pytest.raises(ValueError, match=r"'random-wan-14b' is a structure without weights; .*random-wan-1\.3b"):
        load_wan(ModelConfig(path="random-wan-14b"))


def test_a_structure_with_random_weights_is_always_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_wan()
    monkeypatch.setitem(folders.STRUCTURES, "random-small", str(folder))
    first, second = (load_wan(ModelConfig(path="random-small", **SHAPE, shift=5.0)) for _ in range(2))
    assert (first.path.shift, first.latent_shape) == (5.0, model.latent_shape)
    latents, text = noise_of(first), first.encode_prompts(PROMPTS)
    assert text.shape == (2, 512, 16)
    prediction = first.predict(latents, 0.5, text, 5.0)
    assert torch.equal(prediction.x0, second.predict(latents, 0.5, text, 5.0).x0)
    frames = first.decode_frames(prediction.x0, torch.tensor([[0, 8]] * 2))
    assert frames.isfinite().all()
    assert frames.std() > 1e-3
    assert (prediction.eps[0] - prediction.eps[1]).abs().max() > 1e-3


def test_no_weight_of_a_random_text_encoder_is_left_at_zero() -> None:
    model = tiny_wan()
    assert model.text is not None
    fill_random(model.text.encoder, seed=3)
    assert model.encode_prompts(PROMPTS)[0].std() > 0.1
