"""Where models come from: the Hugging Face cache, pickles, random weights; and what it costs to decode."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import TemporalConvLayer
from helpers import clips, make
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from rlvid.config.model import ModelConfig
from rlvid.models import folders
from rlvid.models.folders import family, model_folder, movable, structure_folder
from rlvid.models.hub import MODELSCOPE
from rlvid.models.load import check_model
from rlvid.models.lora import inject_lora
from rlvid.models.unet3d import UNet3DModel, load_model
from rlvid.models.untrained import clip_tokenizer, outline, random_parts
from rlvid.models.video_shape import VideoShape, resolved_shape
from rlvid.toy.tiny import save_tiny_model, tiny_model

FETCH = 'hf download {} --include "*.json" --include "*.txt" --include "*model.safetensors"'


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in diffusers' layout."""
    folder = tmp_path_factory.mktemp("stored")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into(cache: Path, hub_id: str, source: Path) -> Path:
    """What `hf download` leaves in the cache."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(source, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return repository / "snapshots" / "abc"


def message(path: str | Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        load_model(str(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def noise_of(model: UNet3DModel) -> Tensor:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return model.predict(latents.to(model.vae.dtype), 301, model.encode_prompts(["a dog"]), 3.0).eps


# ------------------------------------------------------------------------------------------------------ hub ids


def test_a_hub_id_that_is_not_in_the_cache_is_told_with_the_command_that_fetches_it(cache: Path) -> None:
    for hub_id in (*MODELSCOPE, "somebody/other-model"):
        told = message(hub_id)
        assert told.startswith(f"model.path = {hub_id!r} is neither a folder nor in the Hugging Face cache")
        assert told.endswith(FETCH.format(hub_id))
    with pytest.raises(ValueError, match="neither a folder nor in the Hugging Face cache"):
        structure_folder("somebody/other-model")


WAN_SHARDS = 'hf download {} --include "*.json" --include "*.txt" --include "*.safetensors"'


@pytest.mark.parametrize(
    ("hub_id", "reason"),
    [
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "has a second transformer; supported: WanPipeline with one transformer"),
        ("Wan-AI/Wan2.2-I2V-A14B", "has a second transformer"),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "is conditioned on images, videos or sound; supported: WanPipeline"),
        ("Wan-AI/Wan2.1-VACE-1.3B-diffusers", "is conditioned on images"),
        ("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", "is conditioned on images"),
        ("zai-org/CogVideoX-2b", "has other classes; supported: ModelScopeT2V and its kin, and Wan"),
        ("hunyuanvideo-community/HunyuanVideo", "has other classes"),
        ("Lightricks/LTX-Video", "has other classes"),
    ],
)
def test_a_name_of_a_model_that_is_not_supported_is_refused_before_its_download(
    cache: Path, hub_id: str, reason: str
) -> None:
    for read in (model_folder, structure_folder, family):
        with pytest.raises(ValueError, match=r".") as error:
            read(hub_id)
        assert str(error.value).startswith(f"model.path = {hub_id!r} ")
        assert reason in str(error.value)
        assert "hf download" not in str(error.value)


@pytest.mark.parametrize(
    "hub_id", ["Wan-AI/Wan2.2-TI2V-5B-Diffusers", "somebody/wan-chronos", "somebody/finetuned-wan"]
)
def test_names_of_models_that_may_be_supported_are_not_refused(cache: Path, hub_id: str) -> None:
    with pytest.raises(ValueError, match="neither a folder nor in the Hugging Face cache") as error:
        model_folder(hub_id)
    assert str(error.value).endswith(WAN_SHARDS.format(hub_id))


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-TI2V-5B"])
def test_wans_own_layout_is_recognised_and_the_other_one_is_named(cache: Path, tmp_path: Path, name: str) -> None:
    """Before the download, after the download into the cache, and as a folder."""

    def told(path: str) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            model_folder(path)
        return str(error.value)

    published = f"Wan-AI/{name}-Diffusers"
    way_out = f"set model.path={published}, and fetch it with: {WAN_SHARDS.format(published)}"
    assert told(f"Wan-AI/{name}") == (
        f"model.path = 'Wan-AI/{name}': it is in the layout of Wan's own code; expected diffusers' layout: {way_out}"
    )
    own = tmp_path / name
    own.mkdir()
    (own / "config.json").write_text('{"_class_name": "WanModel", "model_type": "t2v", "dim": 1536}')
    (own / "diffusion_pytorch_model.safetensors").touch()
    downloaded = put_into(cache, f"Wan-AI/{name}", own)
    for path, folder in ((f"Wan-AI/{name}", downloaded), (str(own), own)):
        assert f"model.path = {path!r}: {folder} is in the layout of Wan's own code" in told(path)
        assert told(path).endswith(way_out)
    (own / "config.json").unlink()
    (own / "Wan2.1_VAE.pth").touch()
    assert "is in the layout of Wan's own code" in told(str(own))


def test_a_model_of_other_classes_in_the_cache_is_refused_before_more_of_it_is_fetched(cache: Path) -> None:
    folder = cache / "source"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
    (folder / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    put_into(cache, "zai-org/CogVideoX-2b", folder)
    for read in (model_folder, structure_folder):
        with pytest.raises(ValueError, match=r"model_index\.json is of a CogVideoXPipeline; supported: WanPipeline"):
            read("zai-org/CogVideoX-2b")
    put_into(cache, "somebody/nothing-known", folder / "transformer")
    with pytest.raises(ValueError, match="has neither unet nor transformer; fetch the rest with"):
        model_folder("somebody/nothing-known")


def test_a_structure_is_known_while_a_download_has_only_begun(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    put_into(cache, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", tmp_path / "begun")
    assert structure_folder("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == structure_folder("random-wan-1.3b")


def test_the_command_in_the_message_is_one_that_the_installed_tool_knows() -> None:
    hf = Path(sys.executable).with_name("hf")
    done = subprocess.run([hf, "download", "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "REPO_ID" in done.stdout
    assert "--include" in done.stdout


@pytest.mark.parametrize("asked", MODELSCOPE)
@pytest.mark.parametrize("there", MODELSCOPE)
def test_a_model_in_the_cache_is_found_under_either_of_its_ids(
    cache: Path, stored: Path, asked: str, there: str
) -> None:
    folder = put_into(cache, there, stored)
    assert model_folder(asked) == structure_folder(asked) == folder
    assert torch.equal(noise_of(load_model(asked, frames=4)), noise_of(tiny_model()))
    assert movable(asked) == asked


def test_a_model_that_is_half_in_the_cache_is_told_so(cache: Path, stored: Path) -> None:
    folder = put_into(cache, MODELSCOPE[0], stored)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    told = message(MODELSCOPE[0])
    assert f"{folder} lacks unet/*.safetensors; fetch the rest with: {FETCH.format(MODELSCOPE[0])}" in told
    assert resolved_shape(ModelConfig(path=MODELSCOPE[0])) == VideoShape(16, 16, 16, 8)


def test_the_structure_of_modelscope_is_known_without_its_weights(cache: Path) -> None:
    for path in (*MODELSCOPE, "random"):
        assert resolved_shape(ModelConfig(path=path)) == VideoShape(16, 256, 256, 8)
        unet, vae, encoder = outline(structure_folder(path))
        counts = [sum(p.numel() for p in part.parameters()) for part in (unet, vae, encoder)]
        # 5.65 GB, 335 MB and 1.36 GB of float32, as the published files are
        assert counts == [1_411_233_860, 83_653_863, 340_387_840]
        assert sum(p.numel() for p in inject_lora(unet, 4, ["to_q", "to_k", "to_v", "to_out.0"], 0)) == 1_661_440


# -------------------------------------------------------------------------------------------------------- files


class Code:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch should-not-be-here",)


def as_pickle(folder: Path, part: str, name: str, extra: dict[str, Any] | None = None) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    torch.save(load_file(file) | (extra or {}), folder / part / name)
    file.unlink()


def test_pickles_are_read_as_plain_tensors_and_never_run(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    as_pickle(folder, "unet", "diffusion_pytorch_model.bin")
    as_pickle(folder, "text_encoder", "pytorch_model.bin")
    assert torch.equal(noise_of(load_model(str(folder), frames=4)), noise_of(tiny_model()))
    for part, name in (("vae", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        other = tmp_path / part
        shutil.copytree(stored, other)
        as_pickle(other, part, name, {"code": Code()})
        assert "is a pickle that holds more than weights and could run code" in message(other)
    assert not (tmp_path / "should-not-be-here").exists()


def test_half_precision_files_are_read_where_there_are_no_others(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = tmp_path / part / f"{name}.safetensors"
        file.rename(file.with_name(f"{name}.fp16.safetensors"))
    assert torch.equal(noise_of(load_model(str(tmp_path), frames=4)), noise_of(tiny_model()))


def test_another_class_of_autoencoder_and_a_damaged_configuration_are_named(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "AutoencoderKLWan"}))
    assert "its autoencoder is a AutoencoderKLWan; supported: AutoencoderKL" in message(tmp_path)
    config.write_text("{")
    assert f"{config} is damaged" in message(tmp_path)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3943000000\n".encode()
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Hugging Face</title></head></html>\n"
UNET = "unet/diffusion_pytorch_model.safetensors"


def change(file: Path, **changed: Tensor | None) -> None:
    """Writes a file of weights anew, with a tensor changed, added or (None) left out."""
    found: dict[str, Any] = load_file(file) | {name.replace("__", "."): each for name, each in changed.items()}
    save_file({name: each for name, each in found.items() if each is not None}, file)


def shard(file: Path, index: bool = True) -> list[Path]:
    """Makes two files of one, with the list that says which tensor is where."""
    weights = load_file(file)
    names = [f"{file.stem}-0000{place}-of-00002.safetensors" for place in (1, 2)]
    places = {key: names[place % 2] for place, key in enumerate(weights)}
    for name in names:
        save_file({key: each for key, each in weights.items() if places[key] == name}, file.with_name(name))
    if index:
        file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    file.unlink()
    return [file.with_name(name) for name in names]


def reset(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a weight is missing": (
        lambda f: change(f / UNET, conv_in__weight=None), r"unet: not the .*1 keys missing \(conv_in.weight\)"
    ),
    "a key of another model": (
        lambda f: change(f / "vae/diffusion_pytorch_model.safetensors", loss__weight=torch.zeros(2)),
        r"vae: not the weights of this model: 1 keys foreign \(loss.weight\)",
    ),
    "another shape": (
        lambda f: change(f / "text_encoder/model.safetensors", text_model__final_layer_norm__bias=torch.zeros(3)),
        r"text_encoder: .*1 keys of another shape \(final_layer_norm.bias \(3,\) instead of \(16,\)\)",
    ),
    "quantised": (
        lambda f: change(f / UNET, conv_in__bias=torch.zeros(8, dtype=torch.int8)), "holds conv_in.bias as I8; expected"
    ),
    "a pointer": (lambda f: (f / UNET).write_bytes(POINTER), "model.safetensors is a Git LFS pointer"),
    "a page": (lambda f: (f / UNET).write_bytes(PAGE), "is a web page and not the file itself"),
    "empty": (lambda f: (f / UNET).write_bytes(b""), "diffusion_pytorch_model.safetensors is empty"),
    "cut off": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-8]), "is damaged"),
    "a pointer for settings": (lambda f: (f / "unet/config.json").write_bytes(POINTER), "config.json is a Git"),
    "a pointer for words": (lambda f: (f / "tokenizer/vocab.json").write_bytes(POINTER), "vocab.json is a Git"),
    "words that are cut off": (
        lambda f: (f / "tokenizer/vocab.json").write_text('{"a": 0, "b'), r"tokenizer: .*vocab.json is damaged"
    ),
    "a link to nowhere": (
        lambda f: ((f / UNET).unlink(), (f / UNET).symlink_to("../blobs/gone")), "is a link to a file that is not there"
    ),
    "a missing shard": (
        lambda f: shard(f / UNET)[1].unlink(), r"of 2 weight files 1 are missing .*-00002-of-00002"
    ),
    "a missing shard without a list": (lambda f: shard(f / UNET, index=False)[0].unlink(), "1 are missing .*-00001"),
    "an unfinished download": (
        lambda f: shard(f / UNET)[0].with_name("diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
        "names no weight files beside it",
    ),
    "files elsewhere": (
        lambda f: shard(f / UNET)[0].with_name("diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}})
        ),
        "names no weight files beside it",
    ),
    "a text encoder of another width": (
        lambda f: reset(f / "text_encoder/config.json", hidden_size=24), r"gives 24 numbers a token .*cross_attention"
    ),
    "an autoencoder of more channels": (
        lambda f: reset(f / "vae/config.json", latent_channels=7), r"has 7 channels of latents \(vae: latent_channels\)"
    ),
    "a setting of another type": (
        lambda f: reset(f / "unet/config.json", cross_attention_dim="16"),
        r'config.json is damaged \(cross_attention_dim = "16"; expected a whole number above 0'
    ),
    "another class of text encoder": (
        lambda f: (f / "text_encoder/config.json").write_text('{"model_type": "t5"}'), "text encoder is of type 't5'"
    ),
}  # fmt: skip


def test_a_denoiser_that_says_no_size_needs_one(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    reset(tmp_path / "unet" / "config.json", sample_size=None)
    with pytest.raises(
        ValueError, match=r"sample_size in unet/config\.json is no whole number above 0; set model\.size, or mo"
    ):
        resolved_shape(ModelConfig(path=str(tmp_path)))
    assert resolved_shape(ModelConfig(path=str(tmp_path), size=24)).sides == {"size": 24}
    assert resolved_shape(ModelConfig(path=str(tmp_path), height=16, width=24)).height == 16


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_not_whole_is_refused_before_its_numbers_are_read(
    stored: Path, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ValueError, match=words) as early:
        check_model(str(folder))
    assert str(early.value).startswith(f"model.path = {str(folder)!r}: ")
    assert re.search(words, message(folder))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(stored: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    change(tmp_path / UNET, conv_in__bias=torch.tensor([0.0] * 7 + [value]))
    check_model(str(tmp_path))
    assert re.search(r"unet: 1 weights are NaN or infinite \(conv_in.bias\)", message(tmp_path))


@pytest.mark.parametrize("index", [True, False])
def test_shards_and_the_names_of_older_versions_are_read(stored: Path, tmp_path: Path, index: bool) -> None:
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    shard(tmp_path / UNET, index)
    vae = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(vae)
    for new, old in older.items():
        weights = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): each for name, each in weights.items()}
    assert sum("proj_attn" in name for name in weights) == 4  # a weight and a bias in encoder and decoder
    save_file(weights, vae)
    encoder = tmp_path / "text_encoder" / "model.safetensors"
    save_file(load_file(encoder) | {"text_model.embeddings.position_ids": torch.arange(24)[None]}, encoder)
    check_model(str(tmp_path))
    model, same = load_model(str(tmp_path), frames=4), tiny_model()
    assert torch.equal(noise_of(model), noise_of(same))
    frames = torch.rand(1, 4, 3, 16, 16)
    assert torch.equal(model.encode_frames(frames).mean, same.encode_frames(frames).mean)


# ------------------------------------------------------------------------------------------------ random weights


def test_random_weights_depend_on_the_seed_alone_and_pass_everything_on(stored: Path) -> None:
    def build(seed: int, dtype: torch.dtype = torch.float32) -> UNet3DModel:
        own = {"tokenizer": tiny_model().tokenizer}  # of fewer words than CLIP's, as its text encoder
        return UNet3DModel(**random_parts(stored, dtype, "cpu", seed) | own, frames=4, height=16, width=16)

    first, again, other = build(0), build(0), build(1)
    assert torch.equal(noise_of(first), noise_of(again))
    assert not torch.equal(noise_of(first), noise_of(other))
    assert 0.01 < float(noise_of(first).std()) < 100
    assert noise_of(build(0, torch.bfloat16)).isfinite().all()
    temporal = [m for m in first.denoiser.modules() if isinstance(m, TemporalConvLayer)]
    assert temporal
    assert all(layer.conv4[-1].weight.abs().max() > 0 for layer in temporal)
    rows = first.denoiser.get_parameter("time_embedding.linear_1.weight")
    matrices = [p for p in first.denoiser.parameters() if p.dim() > 1]
    scaled = torch.cat([(p * math.sqrt(3 * math.prod(p.shape[1:]))).flatten() for p in matrices])
    assert float(scaled.std()) == pytest.approx(1, abs=0.03)
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert torch.equal(first.text_encoder.get_buffer("embeddings.position_ids")[0], torch.arange(24))

    parameters = inject_lora(first.denoiser, 2, ["to_q", "to_k", "to_v", "to_out.0"], 0)
    for parameter in parameters:
        nn.init.normal_(parameter)
    noise_of(first).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)


def test_random_is_the_structure_of_modelscope() -> None:
    assert model_folder("random") == folders.modelscope_folder()
    assert movable("random") == "random"


def test_clips_tokenizer_is_made_from_the_vocabulary_of_open_clip(tmp_path: Path) -> None:
    """It gives the ids of the published files; open_clip's own tokenizer agrees where it does not rewrite the text."""
    tokenizer = clip_tokenizer()
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.model_max_length) == (49408, 0, 77)
    words = [
        "a dog",
        "",
        "日本語 😀👍🏽",
        " many   spaces\t\n",
        "zero\u200bwidth",
        "1/2 ½ ²",
        "_under_score_",
        "x" * 300,
    ]
    theirs = SimpleTokenizer()(words).tolist()
    assert tokenizer(words, padding="max_length", truncation=True, max_length=77).input_ids == theirs

    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    vocabulary = json.dumps(SimpleTokenizer().encoder, ensure_ascii=False)
    for ours, name in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        vocabulary = vocabulary.replace(ours, name)
    merges = [" ".join(pair) for pair in SimpleTokenizer().bpe_ranks]
    (tmp_path / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    published = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(published | special))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "!"}))
    odd = [*words, "don't!!! I'll &amp; <|endoftext|> naïve ﬁne İ", "\x00 nul", "a\u0301"]
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    loaded = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded(odd, **options).input_ids == tokenizer(odd, **options).input_ids


# ------------------------------------------------------------------------------------------------------ decoding


def kept_bytes(model: UNet3DModel, latents: Tensor, recompute: bool) -> tuple[int, Tensor, Tensor]:
    """Bytes that autograd keeps while frames are decoded, the frames, and the gradient of the latents."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        frames = model.decode_frames(latents, torch.tensor([[0, 2, 3], [1, 2, 3]]), recompute=recompute)
    weights = torch.linspace(-1, 1, frames.numel()).reshape(frames.shape)
    (gradient,) = torch.autograd.grad((weights * frames).sum(), latents)
    return sum(kept.values()), frames, gradient


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_decoder_that_is_recomputed_gives_the_same_and_keeps_nothing(chunk: int) -> None:
    model = tiny_model()
    model.decode_chunk = chunk
    latents = torch.randn(2, *model.latent_shape).requires_grad_()
    kept, frames, gradient = kept_bytes(model, latents, recompute=False)
    less, same_frames, same_gradient = kept_bytes(model, latents, recompute=True)
    assert gradient.abs().max() > 0
    assert torch.equal(frames, same_frames)
    assert torch.equal(gradient, same_gradient)
    assert less < kept / 20


@pytest.mark.parametrize("recompute", [True, False])
def test_a_run_recomputes_the_decoder_when_it_recomputes_the_denoiser(recompute: bool) -> None:
    method = make({"name": "draft"}, train={"checkpoint_activations": recompute})
    calls: list[int] = []
    method.context.model.vae.decoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    for update in method.updates(clips(method)):
        update.loss.backward()
    assert calls == ([8, 8] if recompute else [8])


def test_prompts_are_never_encoded_in_a_step_and_the_negative_prompt_is_encoded_once() -> None:
    method = make({"name": "instructvideo"})
    batch, calls = clips(method), []
    method.context.model.text_encoder.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    for _ in range(2):
        for update in method.updates(batch):
            update.loss.backward()
    assert calls == [1]
