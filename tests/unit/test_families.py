"""The commands on both families of models: bad input is refused in one line before anything heavy; Wan goes through."""

import io
import json
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from helpers import SHAPES, save_run, save_tiny
from PIL import Image
from pyarrow import parquet
from studies import begin, client
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.benchmark import gpu_ray
from rlvid.cli import main
from rlvid.config.model import ModelConfig, SamplingConfig
from rlvid.data.clips import digest
from rlvid.data.embeddings import embedder_of, read_prompt
from rlvid.data.encoders import ClipEncoder, encode_items
from rlvid.data.sources import BaseSampler
from rlvid.data.writing import ClipWriter
from rlvid.doctor.attention import check_attention
from rlvid.doctor.examination import examination
from rlvid.doctor.model import check_model_folder, check_shift
from rlvid.evaluate.load import load_run
from rlvid.evaluate.models import find_models
from rlvid.evaluate.work import Evaluation
from rlvid.evaluate.workers import VideoWorker, embed_texts, run_evaluation
from rlvid.models import wan_parts
from rlvid.models.folders import is_text_apart
from rlvid.models.load import load_video_model
from rlvid.models.text_apart import KnownEmbedder, embed_apart
from rlvid.models.trained_files import trained_file
from rlvid.models.wan import WanModel
from rlvid.models.wan_text import UMT5Embedder
from rlvid.runs.checkpoints import checkpoint_name
from tuning import sweep

PROMPTS = ["a red circle moving left", "a dog"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of both families, a run of each, and models that are refused."""
    place = tmp_path_factory.mktemp("families")
    for base in SHAPES:
        save_tiny(place, base)
        run, _ = save_run(place / f"of-{base}", base=base)
        shutil.copytree(run, place / "runs" / base)
    shutil.copytree(place / "tiny-wan", place / "two")
    shutil.copytree(place / "tiny-wan" / "transformer", place / "two" / "transformer_2")
    shutil.copytree(place / "tiny-wan", place / "other")
    shutil.copyfile(place / "tiny" / "unet" / "config.json", place / "other" / "transformer" / "config.json")
    shutil.copytree(place / "tiny-wan", place / "image-to-video")
    index = json.loads((place / "tiny-wan" / "model_index.json").read_text())
    (place / "image-to-video" / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanImageToVideo"}))
    clips = place / "clips"  # of 3D U-Net latents
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"no video")
    (clips / "a.txt").write_text("a dog")
    return place


@pytest.fixture
def refused(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command that must end with exit code 2 and one line, and neither start Ray nor read weights; returns it."""
    import ray

    monkeypatch.chdir(home)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    for place in ("wan_parts.read_weights", "stored.read_weights"):
        monkeypatch.setattr(f"rlvid.models.{place}", lambda *_: pytest.fail("weights were read"))

    def command(*arguments: str) -> str:
        if arguments[0] == "sweep":
            code: Any = sweep.main(list(arguments[1:]))
        else:
            monkeypatch.setattr("sys.argv", ["rlvid", *arguments])
            with pytest.raises(SystemExit) as stopped:
                main()
            code = stopped.value.code
        line = capsys.readouterr().err
        assert (code, line.strip().count("\n")) == (2, 0), line
        return line

    return command


WAN, UNET = "model.path=tiny-wan", "model.path=tiny"
WAN_SHAPE = ("model.frames=9", "model.height=16", "model.width=32")
SETTINGS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((WAN, "model.frames=8", "model.size=16"), ("model.frames = 8", "4 n + 1, such as 5 or 9")),
    ((WAN, "model.frames=9", "model.size=20"), ("model.size = 20", "multiples of 8, such as 16 or 24")),
    ((WAN, "model.frames=9", "model.height=16", "model.width=36"), ("model.width = 36", "32 or 40")),
    ((WAN,), ("'tiny-wan'", "usual 81 frames of 480 x 832", "set model.size;", "125 frames and 256 pixels")),
    ((WAN, "model.frames=129", "model.size=16"), ("model.frames = 129", "up to 125")),
    ((WAN, "model.frames=9", "model.size=264"), ("model.size = 264", "up to 256")),
    ((WAN, *WAN_SHAPE, "model.shift=0"), ("model.shift = 0", "greater than 0")),
    (("model.path=two", *WAN_SHAPE), ("'two'", "second transformer (transformer_2)", "WanPipeline")),
    (("model.path=other", *WAN_SHAPE), ("'other'", "its denoiser is a UNet3DConditionModel", "WanTransformer3DModel")),
    (("model.path=image-to-video", *WAN_SHAPE), ("'image-to-video'", "of a WanImageToVideo", "WanPipeline")),
    (("model.path=random-wan-14b",), ("'random-wan-14b'", "structure without weights", "random-wan-1.3b")),
]
"""Settings of a model -> words of the message, for every command that has settings."""
METHODS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((WAN, *WAN_SHAPE, "model.lora.targets=[temporal]"), ("'temporal' is for 3D U-Nets",)),
    ((WAN, *WAN_SHAPE, "sampling.final_level=paper"), ("sampling.final_level = 'paper'", "allowed: 'exact'")),
    ((UNET, "model.frames=4", "model.size=16", "model.shift=3"), ("model.shift = 3", "is a 3D U-Net; leave it out")),
    ((UNET, "model.frames=4", "model.size=16", "model.decode_window=1"), ("model.decode_window = 1", "leave it out")),
    (
        (UNET, "model.frames=4", "model.size=16", "method=grpo", "train.group_size=4", "sampling.kernel=flow-sde"),
        ("sampling.kernel = 'flow-sde'", "allowed"),
    ),
]
"""Settings of a method that the model's family has not, for training alone."""


@pytest.mark.parametrize(("settings", "words"), [*SETTINGS, *METHODS])
@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_settings_that_a_family_has_not_are_refused(
    verb: str, settings: tuple[str, ...], words: tuple[str, ...], refused: Callable[..., str]
) -> None:
    line = refused(verb, "toy", "name=bad", "reward.segments=2", *settings)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(("settings", "words"), SETTINGS)
def test_a_model_that_cannot_encode_is_refused(
    settings: tuple[str, ...], words: tuple[str, ...], home: Path, refused: Callable[..., str]
) -> None:
    model = {name.removeprefix("model."): yaml.safe_load(value) for name, value in (s.split("=") for s in settings)}
    (home / "encode.yaml").write_text(yaml.safe_dump({"name": "mine", "model": model}))
    line = refused("encode", "clips", "encoded", "--config", "encode.yaml", "--address", "auto")
    assert all(word in line for word in words), line


COMMANDS = {
    "evaluate": ("evaluate", "{}", "--sets", "in_domain"),
    "generate": ("generate", "{}", "a dog"),
    "export": ("export", "{}", "--out", "exported"),
}


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize(
    ("base", "found", "words"),
    [
        ("tiny", "tiny-wan", ("adapter", "keys missing")),
        ("tiny-wan", "tiny", ("adapter", "keys missing")),
        ("tiny-wan", "two", ("second transformer (transformer_2)",)),
        ("tiny-wan", "other", ("its denoiser is a UNet3DConditionModel",)),
    ],
)
def test_a_run_whose_model_is_now_another_is_refused(
    verb: str, base: str, found: str, words: tuple[str, ...], home: Path, refused: Callable[..., str]
) -> None:
    run = home / "runs" / f"{base}-on-{found}"
    if not run.exists():
        shutil.copytree(home / "runs" / base, run)
        settings = yaml.safe_load((run / "config.yaml").read_text())
        shape = SHAPES["tiny" if found == "tiny" else "tiny-wan"]
        settings["model"] |= {"size": None, "height": None, "width": None, **shape, "path": str(home / found)}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    line = refused(*(each.format(run) for each in COMMANDS[verb]))
    assert all(word in line for word in words), line


# -------------------------------------------------------------------------------------- text encoder beside no denoiser


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fails where a transformer is loaded while a text encoder is in memory; the encoders that were loaded."""
    encoders: list[weakref.ref[Any]] = []
    load, fill = wan_parts._stored_text, wan_parts._fill_constants

    def text(*arguments: Any) -> UMT5Embedder:
        embedder = load(*arguments)
        encoders.append(weakref.ref(embedder.encoder))
        return embedder

    def denoiser(transformer: Any) -> None:
        assert [each for each in encoders if each() is not None] == [], "the text encoder is still in memory"
        fill(transformer)

    monkeypatch.setattr(wan_parts, "_stored_text", text)
    monkeypatch.setattr(wan_parts, "_fill_constants", denoiser)
    return encoders


def wan_spec(home: Path) -> ModelConfig:
    return ModelConfig(path=str(home / "tiny-wan"), **SHAPES["tiny-wan"])


def test_prompts_are_embedded_before_the_denoiser_is_loaded(home: Path, apart: list[Any]) -> None:
    model = load_run(home / "runs" / "tiny-wan", prompts=PROMPTS).use(1.0)
    assert isinstance(model, WanModel)
    assert isinstance(model.text, KnownEmbedder)
    whole = load_video_model(wan_spec(home), denoiser=False)
    for prompt in ("", *PROMPTS):
        assert torch.equal(model.encode_prompts([prompt]), whole.encode_prompts([prompt]))
    assert model.encode_prompts(PROMPTS).shape == (2, 16, 16)
    with pytest.raises(ValueError, match="'a cat' was not embedded"):
        model.encode_prompts(["a cat"])
    assert len(apart) == 2


def test_a_small_text_encoder_stays_beside_the_denoiser() -> None:
    for path in ("builtin", "random", "random-wan-1.3b"):
        assert not is_text_apart(path)
        assert embed_apart(ModelConfig(path=path), ["a dog"]) is True


def test_an_evaluation_embeds_its_prompts_once(home: Path, apart: list[Any], tmp_path: Path) -> None:
    run, prompts = home / "runs" / "tiny-wan", {"own": PROMPTS}
    plan = Evaluation.of(find_models([str(run)], scales=[0.5, 1.0]), prompts, steps_list=[2, 3], folder=tmp_path)
    rows = run_evaluation(plan)
    assert len(rows) == 3 * 2 * 2
    assert len(apart) == 1
    other = Evaluation.of(plan.models, prompts, steps_list=[2], folder=tmp_path / "actors")
    other.videos.mkdir(parents=True)
    worker = VideoWorker(other, None, embed_texts(other, range(len(other.shards))))  # as a Ray actor has them
    assert [worker.do(index) for index in range(len(other.shards))] == [2, 2, 2]
    for index, shard in enumerate(other.shards):
        same = next(i for i, each in enumerate(plan.shards) if (each.model, each.steps) == (shard.model, shard.steps))
        assert parquet.read_table(other.part(index)).equals(parquet.read_table(plan.part(same)))


def test_samples_of_the_base_read_embeddings(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, sampler = wan_spec(home), BaseSampler(0, SamplingConfig(steps=2))
    items = [{"index": i, "source": "", "caption": prompt} for i, prompt in enumerate(["", *PROMPTS])]
    whole = load_video_model(spec)
    expected = encode_items(whole, items[1:], sampler)
    with ClipWriter(tmp_path / "texts" / "2", {}) as writer:
        writer.add(encode_items(whole, items, read_prompt))
        writer.finish({"fingerprint": digest({})}, [])
    monkeypatch.setattr(wan_parts, "_stored_text", lambda *_: pytest.fail("the text encoder was loaded"))
    texts = partial(embedder_of, spec.path, str(tmp_path / "texts"))
    found = ClipEncoder(spec, sampler, "cpu", 1, denoiser=True, texts=texts)(pa.Table.from_pylist(items[1:]))
    assert found.equals(expected)


# ------------------------------------------------------------------------------------------------- from end to end


def test_wan_goes_through_the_commands(home: Path, rlvid: Callable[..., str], tmp_path: Path) -> None:
    """Evaluation, report, study, export and generation of one run; training itself is on Ray."""
    run, ev, out = tmp_path / "runs" / "wan", tmp_path / "ev", tmp_path / "model"
    shutil.copytree(home / "runs" / "tiny-wan", run)
    another = shutil.copytree(run, tmp_path / "runs" / "second")
    sets = tmp_path / "own.txt"
    sets.write_text("\n".join(PROMPTS))
    told = rlvid("evaluate", f"wan={run}", f"half={another}*0.5", "--sets", sets, "--steps", 2, "--out", ev)
    assert "Evaluation, 2 sampling steps" in told
    about = yaml.safe_load((ev / "evaluation.yaml").read_text())
    assert (about["frames"], about["size"], about["fps"], about["complete"]) == (9, [16, 32], 16.0, True)
    versus = (ev / "versus.md").read_text(encoding="utf-8")
    assert "half" in versus
    videos = parquet.read_table(ev / "videos").to_pylist()
    assert [len(video["frames"]) for video in videos] == [9] * 6
    assert Image.open(io.BytesIO(videos[0]["frames"][0])).size == (32, 16)

    assert "6 videos" in rlvid("report", ev)
    page = (ev / "report" / "index.html").read_text(encoding="utf-8")
    assert all(prompt in page for prompt in PROMPTS)

    store = begin(ev, count=2)
    film = client(store).get("/video", params={"annotator": "ada", "pair": 0})
    assert film.headers["content-type"] in ("video/mp4", "image/webp")
    store.save(0, "ada", 0, {"quality": "left", "alignment": "tie"})
    assert "ada" in rlvid("study", "results", ev)

    assert "WanPipeline.from_pretrained" in rlvid("export", f"{run}", "--out", out, "--evaluation", ev)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "The exported model is wan here" in card
    assert "2 sampling steps" in card
    rlvid("generate", run, "a red circle", "--steps", 2, "--out", tmp_path / "made")
    assert [path.name for path in sorted((tmp_path / "made").iterdir())] == [
        "000-a-red-circle.gif", "000-a-red-circle.mp4",
    ]  # fmt: skip


def test_the_doctor_checks_a_model(home: Path, tmp_path: Path) -> None:
    found = {each.name: each for each in examination("runs", None, None, quick=True, model=str(home / "tiny-wan"))}
    assert {name for name, each in found.items() if each.status != "ok"} == {"videos"}  # it has too few positions
    assert (found["videos"].status, "set model.frames" in found["videos"].way_out) == ("warning", True)
    denoiser = load_video_model(wan_spec(home), text=False).denoiser
    count = sum(each.numel() for each in denoiser.parameters())
    assert found["weights"].found.endswith(f"Wan, {count:,} parameters in transformer/")
    assert found["noise levels"].found == "noise levels are shifted by 3"
    shutil.copytree(home / "tiny-wan", tmp_path / "model")
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    (shift,) = check_shift(str(tmp_path / "model"))
    assert (shift.status, "model.shift" in shift.way_out) == ("warning", True)
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (damaged,) = check_model_folder(str(tmp_path / "model"))
    assert (damaged.status, "is damaged" in damaged.found) == ("error", True)
    with pytest.raises(ValueError, match="--run a --model b: a call checks one of the two"):
        list(examination("runs", None, "a", quick=True, model="b"))


def test_the_doctor_finds_an_attention_that_keeps_the_scores() -> None:
    (fine,) = check_attention()
    assert fine.status == "ok"
    with sdpa_kernel(SDPBackend.MATH):
        (found,) = check_attention()
    assert found.status == "warning"
    assert "the matrix of scores is kept in bfloat16 and float32" in found.found
    assert "times in float16" in fine.found


def test_a_run_of_all_weights_is_read_where_its_family_keeps_them(tmp_path: Path) -> None:
    for base, folder in (("tiny", "unet"), ("tiny-wan", "transformer")):
        run, config = save_run(tmp_path / base, base=base, finetune="full")
        file = trained_file(run / checkpoint_name(3))
        assert file == run / checkpoint_name(3) / folder / "diffusion_pytorch_model.safetensors"
        assert gpu_ray.adapter(run, config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})}))
