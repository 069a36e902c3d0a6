"""Wan in runs: the model as workers build it, embeddings without a text encoder, losses, checkpoints, export."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from torch import Tensor, nn

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig, parse_config
from rlvid.config.model import ModelConfig
from rlvid.data.clips import digest
from rlvid.data.embeddings import StoredEmbedder, embedder_of, kept_embeddings, read_prompt
from rlvid.data.encode import exact_model, model_fingerprint
from rlvid.data.encoders import encode_items
from rlvid.data.shares import tensors
from rlvid.data.sources import BaseSampler, read_rendered
from rlvid.data.writing import ClipWriter
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.generate import generate
from rlvid.evaluate.load import load_run
from rlvid.export.export import export_run
from rlvid.models.load import load_video_model, path_outline
from rlvid.models.lora import lora_parameters, lora_scale
from rlvid.models.noise_path import RectifiedFlow
from rlvid.models.text_limit import model_text_limit
from rlvid.models.text_rows import pad_rows
from rlvid.models.trained import check_trained, load_trainable, load_trained, save_trained, trained_state
from rlvid.models.wan import WanModel
from rlvid.runs.checkpoints import checkpoint_name
from rlvid.toy.tiny import tiny_reward
from rlvid.toy.tiny_wan import save_tiny_wan
from rlvid.train.checkpoint import save_checkpoint
from rlvid.train.engine import TorchEngine
from rlvid.train.preflight import check

PROMPTS = ["a red circle moving left", "a dog"]
SHAPE: dict[str, Any] = {"frames": 9, "height": 16, "width": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan")
    save_tiny_wan(path)
    return path


@pytest.fixture(scope="module")
def texts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embeddings that ``encode_prompts`` keeps, made without Ray."""
    place, model = tmp_path_factory.mktemp("texts"), load_video_model(spec(folder), denoiser=False)
    items = [{"index": i, "source": "", "caption": prompt} for i, prompt in enumerate([*PROMPTS, "", "blue"])]
    with ClipWriter(place / "4", {}) as writer:
        writer.add(encode_items(model, items, read_prompt))
        writer.finish({"fingerprint": digest({})}, [])
    return str(place)


def spec(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), **{**SHAPE, **settings})


def config_of(folder: Path, method: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return parse_config(
        {
            "name": "run",
            "model": {"path": str(folder), **SHAPE, "lora": {"alpha": 8, "targets": ["attention+ff"]}},
            "sampling": {"steps": 4, "guidance": 3.0},
            "train": {"batch_size": 2},
            "reward": {"segments": 2},
            "method": method,
        }
        | sections
    )


def worker_model(config: RunConfig, texts: str) -> WanModel:
    """The model as ``rlvid.train.worker.Worker`` builds it, with an adapter that is not zero."""
    path, negative = config.model.path, config.sampling.negative_prompt
    model = load_trainable(config.model, 0, path, negative_prompt=negative, text=embedder_of(path, texts))
    generator = torch.Generator().manual_seed(3)
    for parameter in lora_parameters(model.denoiser):
        parameter.data += torch.randn(parameter.shape, generator=generator) / 8
    assert isinstance(model, WanModel)
    return model


def noise_of(model: WanModel) -> Tensor:
    return randomness.normal(model.latent_shape, 0, "clip", [(0,), (1,)])


# ------------------------------------------------------------------------------------------------------- embeddings


def test_workers_read_embeddings_and_load_no_text_encoder(
    folder: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_video_model(spec(folder))
    monkeypatch.setattr("rlvid.models.wan_parts._stored_text", lambda *_: pytest.fail("the text encoder was loaded"))
    model = worker_model(config_of(folder, {"name": "draft"}, sampling={"steps": 4, "negative_prompt": "blue"}), texts)
    assert torch.equal(model.encode_prompts(PROMPTS), whole.encode_prompts(PROMPTS))
    assert torch.equal(model.negative(torch.zeros(1, 16, 16)), whole.encode_prompts(["blue"]))
    with pytest.raises(ValueError, match="no embedding of the prompt 'a cat'"):
        model.encode_prompts(["a cat"])


def test_only_rows_before_the_zeros_are_kept_of_a_caption(folder: Path) -> None:
    model = load_video_model(spec(folder))
    items = [{"index": i, "source": "", "caption": prompt} for i, prompt in enumerate(PROMPTS)]
    clips = encode_items(model, items, lambda item, model: (item["caption"], read_rendered(0, item, model)[1]))
    assert clips["text_shape"].to_pylist() == [[6, 16], [3, 16]]
    assert clips["latent_shape"].to_pylist() == [[4, 3, 4, 8]] * 2
    captions, text, posterior = tensors(clips)
    assert text.shape == (2, 6, 16)
    assert torch.equal(pad_rows([*text], 16), model.encode_prompts(captions))
    assert posterior.mean.shape == (2, *model.latent_shape)


def test_no_embeddings_are_kept_where_workers_load_the_encoder_or_draw(folder: Path) -> None:
    for path in ("builtin", "random-wan-1.3b"):
        config = parse_config({"model": {"path": path}})
        assert kept_embeddings(config, None, PROMPTS, list, None) is None  # type: ignore[arg-type]
        assert embedder_of(path, None) is True


def test_the_length_of_prompts_is_the_models(folder: Path, texts: str) -> None:
    limit = model_text_limit(str(folder))
    assert (limit.tokens, limit.count(PROMPTS)) == (16, [6, 3])
    assert StoredEmbedder(texts, 16).embed(PROMPTS).shape == (2, 16, 16)
    assert model_text_limit("random-wan-1.3b").tokens == 512


def test_samples_of_the_base_have_the_negative_prompt_of_the_run(folder: Path) -> None:
    def sample(negative: str) -> Tensor:
        model = load_video_model(spec(folder))
        sampling = config_of(folder, {}, sampling={"steps": 2, "guidance": 5, "negative_prompt": negative}).sampling
        return BaseSampler(0, sampling)({"index": 0, "caption": "a dog", "source": ""}, model)[1].mean

    assert torch.equal(sample(""), sample(""))
    assert (sample("") - sample("blue")).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["draft", "instructvideo"])
def test_a_loss_reaches_the_adapter_of_the_model_that_workers_build(folder: Path, texts: str, method: str) -> None:
    config = config_of(folder, {"name": method})
    model = worker_model(config, texts)
    latents = None if method == "draft" else noise_of(model)
    batch = Batch(0, [0, 1], PROMPTS, model.encode_prompts(PROMPTS), latents)
    algorithm = ALGORITHMS[method](Context(config, model, tiny_reward(), None, Stopwatch(torch.device("cpu"))))
    for update in algorithm.updates(batch):
        assert update.loss.isfinite()
        update.loss.backward()
    gradients = [parameter.grad for parameter in lora_parameters(model.denoiser)]
    assert len(gradients) == 2 * 2 * (8 + 2)  # two blocks; A and B of eight linears of attention, two of the ffn
    for gradient in gradients:
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.norm() > 0
    frames = generate(model, PROMPTS, steps=2)
    assert frames.shape == (2, 9, 3, 16, 32)
    assert frames.isfinite().all()


def test_alpha_multiplies_the_adapters_share(folder: Path, texts: str) -> None:
    config = config_of(folder, {"name": "draft"})
    model = worker_model(config, texts)
    latents, text = noise_of(model), model.encode_prompts(PROMPTS)

    def x0() -> Tensor:
        with torch.no_grad():
            return model.predict(latents, 0.5, text, 1.0).x0

    strong = x0()  # alpha = 8 at rank 4
    lora_scale(model.denoiser, 0.5)
    half = x0()
    plain = load_trainable(
        config.model.model_copy(update={"lora": config.model.lora.model_copy(update={"alpha": None})}),
        0,
        config.model.path,
        text=False,
    )
    for own, other in zip(lora_parameters(plain.denoiser), lora_parameters(model.denoiser), strict=True):
        own.data.copy_(other.data)
    with torch.no_grad():
        torch.testing.assert_close(plain.predict(latents, 0.5, text, 1.0).x0, half, rtol=0, atol=1e-5)
    assert (strong - half).abs().max() > 1e-3


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_trained_weights_survive_the_disk(
    folder: Path, tmp_path: Path, finetune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = spec(folder, finetune=finetune, precision="bfloat16")
    model = load_trainable(settings, 0, str(folder), text=False)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            parameter.data += torch.randn(parameter.shape) / 8
    elsewhere = settings.model_copy(update={"path": folder.name})  # a worker is in another folder than its user
    monkeypatch.chdir(tmp_path)
    save_trained(trained_state(model.denoiser, settings), model.denoiser, elsewhere, tmp_path)
    assert (tmp_path / {"lora": "adapter", "full": "transformer"}[finetune]).is_dir()
    check_trained(settings, tmp_path)
    again = load_trainable(settings, 0, str(folder), text=False)
    load_trained(again.denoiser, settings, tmp_path)
    latents, text = torch.randn(1, *model.latent_shape), torch.randn(1, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.predict(latents, 0.5, text, 1.0).x0, model.predict(latents, 0.5, text, 1.0).x0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"frames": 10}, r"model\.frames = 10; .*9 or 13"),
        ({"lora": {"targets": ["temporal"]}}, "'temporal' is for 3D U-Nets"),
        ({"width": 36}, r"model\.width = 36; .*32 or 40"),
    ],
)
def test_a_run_that_the_model_cannot_do_is_refused_early(folder: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(config_of(folder, {"name": "draft"}, model={"path": str(folder), **SHAPE, **model}))


def test_the_shift_moves_the_grid_and_the_identity_of_samples_but_not_of_clips(folder: Path) -> None:
    assert path_outline(spec(folder)).grid(2) == [1.0, 0.75]
    assert path_outline(spec(folder, shift=1)).grid(2) == [1.0, 0.5]
    assert model_fingerprint(spec(folder, shift=1)) == model_fingerprint(spec(folder))
    exact = exact_model(spec(folder, height=None, width=None, size=16))
    assert (exact.size, exact.height, exact.width, exact.frames) == (None, 16, 16, 9)


# ------------------------------------------------------------------------------------------------------------- export


def save_run(home: Path, folder: Path, texts: str, **model: Any) -> tuple[Path, WanModel]:
    """A run's folder with a checkpoint of a random adapter, and the tuned model."""
    config = config_of(folder, {"name": "draft"})
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    model = worker_model(config, texts)
    method = ALGORITHMS["draft"](Context(config, model, nn.Identity(), None, Stopwatch(torch.device("cpu"))))
    train_state = {"step": 1, "workers": 1, "skipped": 0, "seconds": 0.0, "videos": 8}
    run, engine = home / "run", TorchEngine(model.denoiser, config.optimizer)
    save_checkpoint(run / checkpoint_name(1), 0, train_state, config, engine, method, model.denoiser)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return run, model


@pytest.mark.parametrize(
    ("scheduler", "key"),
    [(UniPCMultistepScheduler, "flow_shift"), (FlowMatchEulerDiscreteScheduler, "shift")],
)
def test_an_exported_scheduler_has_the_shift_of_the_run_where_its_class_reads_it(
    folder: Path, texts: str, tmp_path: Path, scheduler: Any, key: str
) -> None:
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if key == "flow_shift" else {}
    settings = {"_class_name": scheduler.__name__, "num_train_timesteps": 1000, **flow}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    run, _ = save_run(tmp_path, base, texts, shift=6.0)
    made = scheduler.from_pretrained(export_run(run, tmp_path / "out") / "scheduler")
    assert made.config[key] == 6.0
    made.set_timesteps(4)
    plain = scheduler.from_config(settings)
    plain.set_timesteps(4)
    assert made.sigmas[1] > plain.sigmas[1] + 0.1


def test_an_export_is_a_pipeline_of_diffusers_and_an_adapter_that_it_loads(
    folder: Path, texts: str, tmp_path: Path
) -> None:
    run, tuned = save_run(tmp_path, folder, texts)
    out = export_run(run, tmp_path / "out")
    merged, adapted = (WanPipeline.from_pretrained(each, torch_dtype=torch.float32) for each in (out, folder))
    assert merged.scheduler.config.flow_shift == 3.0
    latents, text = noise_of(tuned), tuned.encode_prompts(PROMPTS)

    def velocity(transformer: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = transformer(latents, torch.full((2,), 500.0), text, return_dict=False)[0]
        return found

    expected = velocity(tuned.denoiser)
    assert (velocity(adapted.transformer) - expected).abs().max() > 1e-2
    adapted.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    for pipeline in (merged, adapted):
        torch.testing.assert_close(velocity(pipeline.transformer), expected, rtol=0, atol=1e-5)
    written = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 8)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "WanPipeline.from_pretrained" in card
    assert "num_frames=9, height=16,\n    width=32" in card
    assert "max_sequence_length=16,\n" in card
    again = load_video_model(ModelConfig(path=str(out), **SHAPE))
    torch.testing.assert_close(again.predict(latents, 0.5, text, 1.0).x0, tuned.predict(latents, 0.5, text, 1.0).x0,
                               rtol=0, atol=1e-5)  # fmt: skip
    loaded = load_run(run)
    assert torch.equal(loaded.use(1.0).encode_prompts(PROMPTS), text)
    assert (
        loaded.use(0.0).predict(latents, 0.5, text, 1.0).x0 - again.predict(latents, 0.5, text, 1.0).x0
    ).abs().max() > 1e-3


@pytest.mark.parametrize("second", [{}, {"transformer_2": [None, None]}], ids=str)
def test_an_export_has_no_boundary_to_a_second_transformer(
    folder: Path, texts: str, tmp_path: Path, second: dict[str, Any]
) -> None:
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    index = json.loads((base / "model_index.json").read_text())
    index.pop("transformer_2", None)
    (base / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.875} | second))
    run, tuned = save_run(tmp_path, base, texts)
    pipeline = WanPipeline.from_pretrained(export_run(run, tmp_path / "out"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        PROMPTS[0], num_frames=9, height=16, width=32, num_inference_steps=2, max_sequence_length=16,
        latents=noise_of(tuned)[:1], output_type="latent",
    ).frames  # fmt: skip
    assert made.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, FlowMatchEulerDiscreteScheduler),
        ({}, FlowMatchEulerDiscreteScheduler),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True},
         UniPCMultistepScheduler),
        ({"_class_name": "FlowUniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
          "flow_shift": 3.0}, UniPCMultistepScheduler),
    ],
    ids=str,
)  # fmt: skip
def test_an_export_names_the_classes_of_a_folder_that_names_none(
    folder: Path, texts: str, tmp_path: Path, settings: dict[str, Any], expected: Any
) -> None:
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    (base / "model_index.json").unlink()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    run, tuned = save_run(tmp_path, base, texts, shift=6.0)
    pipeline = WanPipeline.from_pretrained(export_run(run, tmp_path / "out"), torch_dtype=torch.float32)
    assert isinstance(pipeline.scheduler, expected)
    pipeline.scheduler.set_timesteps(4)
    plain = expected.from_config(settings | {"flow_shift" if expected is UniPCMultistepScheduler else "shift": 6.0})
    plain.set_timesteps(4)
    torch.testing.assert_close(pipeline.scheduler.sigmas, plain.sigmas)
    text = tuned.encode_prompts(PROMPTS)
    found, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=text.shape[1])
    torch.testing.assert_close(found, text, rtol=0, atol=1e-5)


class Levels(FlowMatchEulerDiscreteScheduler):
    """Euler's steps on rlvid's own levels."""

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=RectifiedFlow(3.0).grid(steps), device=device)


def test_the_call_on_a_card_makes_the_videos_of_rlvid(
    folder: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rlvid's own sampler in the place of the base's, and from the same noise."""
    run, tuned = save_run(tmp_path, folder, texts)
    out = export_run(run, tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.S)[:1]
    noise, call, found = noise_of(tuned)[:1], WanPipeline.__call__, list[Tensor]()

    def called(self: WanPipeline, prompt: str, **arguments: Any) -> Any:
        self.set_progress_bar_config(disable=True)
        self.scheduler = Levels(shift=1.0)
        for each in (arguments, {k: v for k, v in arguments.items() if k != "max_sequence_length"}):
            found.append(call(self, prompt, **each, latents=noise.clone(), output_type="latent").frames)
        return call(self, prompt, **arguments)

    monkeypatch.setattr(WanPipeline, "__call__", called)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(out)), names)
    assert names["frames"].shape == (9, 16, 32, 3)
    with torch.no_grad():
        text = load_video_model(spec(folder), denoiser=False).encode_prompts(["a prompt"])
        expected = denoise(tuned, noise, text, tuned.path.grid(4), guidance=3.0, gradient_steps=0)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
    assert (found[1] - expected).abs().max() > 1e-2, "512 rows of text are other output"
