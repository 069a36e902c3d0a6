"""The plan of a Wan run: held to the operations and the memory of a real step of the tiny model, by one meter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import pytest
import torch
from helpers import clips
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlvid.algorithms.base import Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig, load_config, parse_config
from rlvid.diffusion.generate import generate
from rlvid.models.causal_decode import CausalDecoder
from rlvid.models.decoder_cache import tensors
from rlvid.models.load import load_video_model
from rlvid.models.lora import inject_lora
from rlvid.plan.counts import count
from rlvid.plan.measure import Meter
from rlvid.plan.memory import machine_memory, resident, stages
from rlvid.plan.network import NONE
from rlvid.plan.parts import last_frames, outline_parts
from rlvid.plan.plan import Plan, flops_by_stage, make_plan
from rlvid.plan.show import as_json, gib, render
from rlvid.reward.load import load_reward
from rlvid.toy.tiny_wan import save_tiny_wan

FRAMES = 33


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in diffusers' layout."""
    folder = tmp_path_factory.mktemp("stored")
    save_tiny_wan(folder)
    return folder


@pytest.fixture
def no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without advice, which measures the decoder several times more."""
    monkeypatch.setattr("rlvid.plan.plan.advice", lambda *_: ({}, {}))


def described(stored: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of the tiny model on a video long enough for the caches to weigh, without videos for TensorBoard."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(stored), "frames": FRAMES, "size": 32, "lora": {"targets": ["attention"]}},
        "sampling": {"steps": 2},
        "method": {"name": "draft"},
        "reward": {"name": "brightness", "held_out": None, "attenuation": "inf"},
        "train": {"batch_size": 1, "workers": 1, "checkpoint_activations": True},
        "output": {"videos_every": 0},
    }
    return parse_config(base | {name: base.get(name, {}) | values for name, values in sections.items()})


def real_step(config: RunConfig) -> tuple[int, int]:
    """Returns the FLOPs of a training step on the CPU, and the most bytes of tensors that it made."""
    model = load_video_model(config.model, text=True)
    inject_lora(model.denoiser, config.model.lora.rank, config.model.lora.targets, 0)
    reward = load_reward(config.reward.name)
    running = ALGORITHMS[config.method.name](Context(config, model, reward, None, Stopwatch(torch.device("cpu"))))
    batch = clips(running, (0,))
    model.negative(batch.text_BLD)
    with Meter([*model.denoiser.parameters(), *model.vae.parameters()]) as meter:
        for update in running.updates(batch):
            update.loss.backward()
    return meter.flops, meter.peak


@pytest.mark.parametrize("window", [1, 4, None])
def test_a_real_step_does_what_was_planned(stored: Path, window: int | None) -> None:
    """TAR's central frame alone is scored, so that every draw costs the same."""
    config = described(stored, model={"decode_window": window})
    # The measurement of the gradient's share is rare, and this step does without it.
    parts, counts = outline_parts(config), count(config, FRAMES)
    planned = {k: v for k, v in flops_by_stage(parts, counts, config).items() if k != "gradient share"}
    sweep = {k: v for k, v in stages(parts, counts, config).items() if k != "gradient share"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlvid.models.causal_decode.CausalDecoder.gradient_share", lambda *_: (torch.ones(1),) * 2)
        flops, peak = real_step(config)
    # A chunk without scored frames leaves out the gradients of its last layers, and the plan counts them.
    assert 0.98 * flops < sum(planned.values()) < 1.06 * flops
    assert max(sweep.values()) == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.usefixtures("no_advice")
def test_shorter_windows_need_less(stored: Path) -> None:
    settings = {"attenuation": 1.0, "segments": 2}
    plans = [make_plan(described(stored, model={"decode_window": w}, reward=settings)) for w in (1, 2, None)]
    for name in ("decode", "backward through the decoder"):
        one, two, every = (plan.stages[name] for plan in plans)
        assert one < two < every
    one, two, every = (plan.flops["backward through the decoder"] for plan in plans)
    assert one < two < every
    assert [plan.flops.get("gradient share", 0) > 0 for plan in plans] == [True, True, False]
    assert [plan.stages.get("gradient share", 0) > 0 for plan in plans] == [True, True, False]
    assert len({plan.flops["decode"] for plan in plans}) == 1


@pytest.mark.usefixtures("no_advice")
def test_offloaded_caches_need_less_for_the_same_operations(stored: Path) -> None:
    settings = {"attenuation": 1.0, "segments": 2}
    kept, aside = (make_plan(described(stored, model={"decode_offload": on}, reward=settings)) for on in (False, True))
    for name in ("decode", "backward through the decoder"):
        assert aside.stages[name] < kept.stages[name]
    assert aside.flops == kept.flops


def kept_aside(config: RunConfig) -> dict[str, int]:
    """Returns the bytes that a step really stores in the CPU's memory, and those of a measurement of the share."""
    found, calls = {"caches": 0, "share": 0}, {"in": "caches"}
    stored, measured = CausalDecoder._stored, CausalDecoder.gradient_share

    def counted(self: CausalDecoder, cache: Any) -> Any:
        kept = stored(self, cache)
        found[calls["in"]] += sum(each.nbytes for each in tensors(kept)) if self.settings.offload else 0
        return kept

    def aside(self: CausalDecoder, *given: Any) -> Any:
        calls["in"] = "share"
        shares = measured(self, *given)
        calls["in"] = "caches"
        return shares

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalDecoder, "_stored", counted)
        patch.setattr(CausalDecoder, "gradient_share", aside)
        patch.setattr("rlvid.algorithms.reward_gradient.SHARE_EVERY", 1)
        real_step(config)
    return found


@pytest.mark.usefixtures("no_advice")
@pytest.mark.parametrize(
    "model",
    [
        {"decode_offload": True},
        pytest.param({"decode_offload": True, "decode_cache_precision": "bfloat16"}, marks=pytest.mark.slow),
        {"decode_window": 1},
        pytest.param({"decode_window": 1, "decode_share": False}, marks=pytest.mark.slow),
        {"decode_window": 2, "decode_offload": True, "decode_cache_precision": "bfloat16"},
        {},
    ],
    ids=str,
)
def test_the_memory_of_the_cpu_is_that_of_a_real_step(stored: Path, model: dict[str, Any]) -> None:
    config = described(stored, model=model)
    plan, real = make_plan(config), kept_aside(config)
    assert [*plan.host.values()] == [size for size in real.values() if size]
    assert plan.host_peak == sum(real.values())
    assert (real["caches"] > 0) == bool(model.get("decode_offload"))
    assert (real["share"] > 0) == ("decode_window" in model and model.get("decode_share", True))
    shown = [line for line in render(plan) if isinstance(line, str) and line.startswith("main memory")]
    assert len(shown) == bool(plan.host)
    assert plan.as_dict().get("host_peak_bytes", 0) == plan.host_peak


@pytest.mark.usefixtures("no_advice")
def test_the_peak_of_videos_for_tensorboard_is_the_one_that_was_planned(stored: Path) -> None:
    config = described(stored, output={"videos_every": 25}, train={"batch_size": 6, "workers": 3})
    model = load_video_model(config.model, text=True)
    model.negative(model.encode_prompts(["a"]))
    with Meter([*model.denoiser.parameters(), *model.vae.parameters()]) as meter:
        generate(model, ["a", "b"], steps=2, guidance=3.0, batch=config.micro_batch)
    plan = make_plan(config)
    assert max(plan.videos.values()) == pytest.approx(meter.peak, rel=0.15)
    assert not make_plan(described(stored)).videos


@pytest.mark.usefixtures("no_advice")
def test_the_memory_of_the_cpu_is_for_all_videos_at_once_and_of_a_measurement_for_one(stored: Path) -> None:
    model = {"decode_window": 2, "decode_offload": True}
    one, two = (make_plan(described(stored, model=model, train={"batch_size": size})) for size in (1, 2))
    caches, share = (
        [plan.host[name] for plan in (one, two)]
        for name in ("the decoder's caches", "the measurement of decode/gradient_share")
    )
    assert caches[1] == 2 * caches[0] > 0
    assert share[1] == share[0] > 0
    assert not make_plan(described(stored, method={"name": "ddpo"})).host


@pytest.mark.slow
def test_the_measurement_of_the_share_is_not_planned_where_it_is_switched_off(stored: Path) -> None:
    on, off = (
        make_plan(described(stored, model={"decode_window": 1, "decode_share": share})) for share in (True, False)
    )
    for table in ("stages", "flops", "host"):
        there, gone = getattr(on, table), getattr(off, table)
        assert len(there) == len(gone) + 1
        assert {name: there[name] for name in gone} == pytest.approx(gone, rel=1e-4)
    assert off.peak < on.peak
    assert on.advice["model.decode_share=false"] == pytest.approx(off.peak, rel=1e-4)
    assert "model.decode_share=false" not in off.advice


@pytest.mark.usefixtures("no_advice")
def test_caches_in_half_precision_need_half(stored: Path) -> None:
    settings = {"attenuation": 1.0, "segments": 2}
    whole, half = (
        make_plan(described(stored, model={"decode_cache_precision": each}, reward=settings))
        for each in ("float32", "bfloat16")
    )
    for name in ("decode", "backward through the decoder"):
        assert half.stages[name] < whole.stages[name]
    assert half.flops == whole.flops


@pytest.mark.slow
def test_advice_has_its_price_in_main_memory(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"attenuation": 1.0, "segments": 2}
    plan, aside = (make_plan(described(stored, reward=settings, model={"decode_offload": on})) for on in (False, True))
    assert plan.advice["model.decode_offload=true"] == pytest.approx(aside.peak, rel=1e-4)
    assert plan.advice_host["model.decode_offload=true"] == aside.host_peak > 0
    assert plan.as_dict()["host_peak_bytes_with"] == plan.advice_host
    lines = [each for each in render(plan) if isinstance(each, str)]
    place = next(i for i, line in enumerate(lines) if "model.decode_offload=true lowers it" in line)
    assert f"takes {gib(aside.host_peak)} of main memory" in lines[place + 1]
    for room, told in ((aside.host_peak - 1, True), (aside.host_peak + 1, False), (None, False)):
        monkeypatch.setattr("rlvid.plan.show.machine_memory", lambda room=room: room)
        shown = [each for each in render(aside) if isinstance(each, str) and "this machine has" in each]
        assert bool(shown) == told
        if told:
            assert "less need: model.decode_offload=false, model.decode_cache_precision=bfloat16" in shown[0]


def test_the_memory_of_this_machine_is_known() -> None:
    found = machine_memory()
    assert found is not None
    assert found > 2**28


def test_chunks_are_counted_as_the_frames_fall(stored: Path) -> None:
    def of(**sections: dict[str, Any]) -> Any:
        counts = count(described(stored, **sections), FRAMES)
        calls = counts.decoder
        return calls.plain, calls.graph, calls.again, calls.backward, counts.frames

    assert of() == (5, 0, 5, 5, 1)  # the central frame, 16, is the last one of chunk 4
    assert of(model={"decode_window": 1}) == (5, 0, 1, 1, 1)
    assert of(model={"decode_window": 2}) == (5, 0, 2, 2, 1)
    assert of(train={"checkpoint_activations": False}) == (0, 5, 0, 5, 1)
    whole = {"name": "mixture", "mixture": [{"name": "brightness"}, {"name": "motion", "floor": 0.1}]}
    assert of(reward=whole) == (9, 0, 9, 9, FRAMES)
    assert of(reward=whole, model={"decode_window": 1}) == (9, 0, 9, 9, FRAMES)
    assert of(method={"name": "ddpo"}, sampling={"steps": 3}) == (5, 0, 0, 0, 1)


def test_the_last_frames_of_segments_need_the_most(stored: Path) -> None:
    assert last_frames(described(stored), FRAMES) == (16,)
    assert last_frames(described(stored, reward={"attenuation": 1.0, "segments": 4}), FRAMES) == (7, 15, 23, 31)


@pytest.mark.usefixtures("no_advice")
def test_the_text_encoder_does_not_stay_beside_training(stored: Path) -> None:
    config = described(stored)
    plan = make_plan(config)
    assert plan.parts.text_encoder.weights > 0
    assert resident(plan.parts, config)["other weights"] == plan.parts.autoencoder.weights
    assert plan.text_bytes > plan.parts.text_encoder.weights
    assert plan.as_dict()["text_embedding"]["flops"] > 0


@pytest.mark.usefixtures("no_advice")
def test_the_text_encoder_of_the_built_in_model_stays_beside_training(stored: Path) -> None:
    config = described(stored, model={"path": "builtin-wan", "frames": 5}, method={"name": "ddpo"})
    plan = make_plan(config)
    assert plan.parts.text_encoder.weights > 0
    both = plan.parts.autoencoder.weights + plan.parts.text_encoder.weights
    assert resident(plan.parts, config)["other weights"] == both
    assert plan.text_bytes == 0
    assert not [each for each in render(plan) if "stay beside training" in str(each)]


@pytest.mark.usefixtures("no_advice")
def test_half_precision_is_for_the_transformer_alone(stored: Path) -> None:
    full, half = (outline_parts(described(stored, model={"precision": p})) for p in ("float32", "bfloat16"))
    assert half.autoencoder.weights == full.autoencoder.weights == 4 * full.autoencoder.parameters
    # Norms, the time embedding and the adapter stay float32.
    assert 2 * full.denoiser.parameters < half.denoiser.weights < full.denoiser.weights
    assert half.denoiser.cost.plain_peak < full.denoiser.cost.plain_peak
    (hint,) = (line for line in render(make_plan(described(stored))) if "model.precision=bfloat16" in str(line))
    assert "the autoencoder stays float32" in str(hint)


@pytest.mark.usefixtures("no_advice")
def test_a_plan_warns_of_an_attention_that_keeps_the_scores(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(described(stored, method={"name": "ddpo"}, model={"frames": 5, "size": 8}))
    flat = replace(plan, parts=replace(plan.parts, autoencoder=NONE))

    def warnings(plan: Plan) -> list[str]:
        return [each for each in render(plan) if isinstance(each, str) and "matrix of scores" in each]

    assert not warnings(plan)
    with sdpa_kernel(SDPBackend.MATH):
        (found,) = warnings(plan)
        assert "in float32" in found
        assert "unset DIFFUSERS_ATTN_BACKEND" in found
        assert not warnings(flat)
        assert json.loads(as_json(plan))["warnings"] == [found]
    assert "warnings" not in json.loads(as_json(plan))
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("rlvid.plan.show.kept_growth", lambda _, device: 16.0 if device.type == "cuda" else 4.0)
        assert len(warnings(plan)) == 1
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), catch_warnings(action="ignore"):  # this one is for GPUs alone
        assert not warnings(plan)
    with monkeypatch.context() as patch:  # diffusers' check of a backend that takes half precision alone
        patch.setattr("rlvid.plan.show.kept_growth", lambda *_: int("float32"))
        assert not warnings(plan)


SIZES = [  # trained parameters of rank 4, layers with an adapter, latents of the usual video
    ("random-wan-1.3b", 1_418_996_800, 126_892_531, 240, (16, 21, 60, 104)),
    ("random-wan-ti2v-5b", 4_999_787_712, 704_688_668, 240, (48, 31, 44, 80)),
    ("random-wan-14b", 14_288_491_584, 126_892_531, 320, (16, 21, 60, 104)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "denoiser", "autoencoder", "layers", "latents"), SIZES)
def test_full_structures_are_planned_without_weights(
    path: str, denoiser: int, autoencoder: int, layers: int, latents: tuple[int, ...]
) -> None:
    config = parse_config({"model": {"path": path, "precision": "bfloat16"}, "train": {"batch_size": 1}})
    assert outline_latents(config) == latents
    small = config.model_copy(update={"model": config.model.model_copy(update={"frames": 5, "size": 64})})
    plan = make_plan(small)
    parts = plan.parts
    assert (parts.denoiser.parameters, parts.autoencoder.parameters) == (denoiser, autoencoder)
    assert parts.text_encoder.parameters == 5_680_910_336
    assert parts.adapted_layers == layers
    assert plan.peak > 2 * denoiser
    shown = "\n".join(each for each in render(plan) if isinstance(each, str))
    for words in (
        "transformer evaluations",
        "2 chunks decoded and 2 again",
        "the text encoder embeds each prompt once",
    ):
        assert words in shown


def outline_latents(config: RunConfig) -> tuple[int, ...]:
    """Returns the shape of the latents of the model's usual video."""
    from rlvid.plan.wan import shapes

    return shapes(config.model)[0]


@pytest.mark.slow
def test_the_shipped_run_is_planned_without_weights(tmp_path: Path) -> None:
    small = ["model.frames=5", "model.height=64", "model.width=64", "train.batch_size=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        plan: Plan = make_plan(load_config("wan-1.3b-hpsv2", small))
    assert plan.parts.reward.parameters == 986_109_441
    assert plan.counts.denoiser.plain + plan.counts.denoiser.graph == 16  # 8 steps, two branches
    assert plan.counts.reward.graph == 5  # motion is of whole videos


def test_the_shipped_run_has_the_settings_that_its_comments_name() -> None:
    config = load_config("wan-1.3b-hpsv2")
    assert (config.method.name, config.method.start, config.method.tau) == ("instructvideo", 0.66, None)
    assert (config.model.shift, config.sampling.guidance, config.model.decode_window) == (3.0, 5.0, None)
    assert config.model.lora.scale == 4
    assert [(part.name, part.floor) for part in config.reward.mixture] == [("hpsv2", None), ("motion", "base")]
    assert "静止不动的画面" in config.sampling.negative_prompt
    alone = load_config("wan-1.3b-hpsv2", ["reward.mixture=[]", "reward.name=hpsv2", "reward.path=h.pt"])
    assert (alone.reward.name, alone.reward.segments, alone.reward.attenuation) == ("hpsv2", 4, 1.0)
