"""A plan says what a run will do: held to counts by hand, torch's own counter, and the memory of a real step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clips
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from rlvid.algorithms.base import Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.cli import app
from rlvid.config import RunConfig, load_config, parse_config
from rlvid.config.train import SHOWN_VIDEOS
from rlvid.diffusion.generate import generate
from rlvid.evaluate.candidates import CandidateScorer
from rlvid.evaluate.score import VideoBatch
from rlvid.evaluate.scorers import guard_rewards, load_run_scorer
from rlvid.models.lora import inject_lora
from rlvid.models.recompute import prepare, recomputing
from rlvid.models.unet3d import LAYERS, load_model
from rlvid.plan.counts import Calls, count
from rlvid.plan.measure import measure
from rlvid.plan.memory import resident, stages
from rlvid.plan.parts import outline_parts
from rlvid.plan.plan import Plan, make_plan
from rlvid.reward.load import load_reward
from rlvid.toy.tiny import save_tiny_model, tiny_model

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in diffusers' layout."""
    folder = tmp_path_factory.mktemp("stored")
    save_tiny_model(folder)
    return folder


def described(stored: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of the tiny model on videos large enough for their activations to outweigh everything else."""
    model = {"path": str(stored), "frames": 8, "size": 64, "precision": "float32"}
    base = {"model": model, "sampling": {"steps": 4}, "train": {"batch_size": 2, "checkpoint_activations": True}}
    return parse_config(base | {name: base.get(name, {}) | values for name, values in sections.items()})


# ---------------------------------------------------------------------------------------------------------- counts

BY_HAND = [  # plain, graph, again, backward rows of the U-Net; decodes; optimiser steps: D = 20, guidance, S = 4
    ({"name": "instructvideo"}, (22, 2, 2, 2), 4, 1),  # 12 steps, two branches, one step with gradient
    ({"name": "instructvideo", "unconditional_gradient": False}, (23, 1, 1, 1), 4, 1),
    ({"name": "instructvideo", "kl": 0.1}, (24, 2, 2, 2), 4, 1),  # the base model once more
    ({"name": "draft", "gradient_steps": None}, (0, 40, 40, 40), 4, 1),
    ({"name": "draft-lv", "repeats": 3}, (40, 6, 6, 6), 12, 1),
    ({"name": "alignprop", "truncation": "fixed", "cut": 15}, (30, 10, 10, 10), 4, 1),
    ({"name": "ddpo"}, (40, 38, 38, 38), 4, 1),  # every random step replayed
    ({"name": "dpok"}, (50, 10, 10, 10), 4, 5),  # five policy steps, each with the base model beside it
    ({"name": "grpo"}, (40, 38, 38, 38), 4, 1),
    ({"name": "grpo", "window": 1}, (40, 2, 2, 2), 4, 1),  # one random step
    ({"name": "grpo", "window": 4, "kl": 0.1}, (48, 8, 8, 8), 4, 1),
    ({"name": "rwr"}, (40, 4, 4, 4), 4, 4),  # noise prediction without guidance
    ({"name": "raft", "share": 0.25}, (40, 1, 1, 1), 4, 4),  # a quarter of the batch, four times
]


@pytest.mark.parametrize(("method", "rows", "decodes", "steps"), BY_HAND, ids=lambda value: str(value)[:60])
def test_a_sample_costs_what_the_method_says(
    method: dict[str, Any], rows: tuple[int, ...], decodes: int, steps: int
) -> None:
    counts = count(parse_config({"method": method, "train": {"group_size": 2}}), frames=16)
    calls = counts.denoiser
    assert (calls.plain, calls.graph, calls.again, calls.backward) == rows
    assert counts.decoder.plain + counts.decoder.graph == counts.reward.plain + counts.reward.graph == decodes
    assert counts.held_out.plain == decodes
    assert counts.decoder.again == counts.decoder.backward == counts.decoder.graph
    assert counts.optimiser_steps == steps
    assert counts.archived == 4, "once, however often a video is decoded"


def test_counts_follow_the_settings() -> None:
    def of(**sections: dict[str, Any]) -> Any:
        return count(parse_config(sections), frames=16)

    assert of(sampling={"guidance": 1.0}).denoiser.plain == 11
    assert of(train={"checkpoint_activations": False}).denoiser.again == 0
    assert of(train={"checkpoint_activations": False}).decoder.again == 0
    assert of(reward={"segments": 4, "skip_below": 0.05}).decoder.graph < 4
    assert of(reward={"held_out": None}).held_out == Calls()
    assert of(method={"name": "ddpo"}, reward={"name": "oracle", "held_out": None}).reward.plain == 16
    split = of(train={"batch_size": 8, "workers": 2, "micro_batch": 2}).denoiser
    assert (split.plain, split.graph, split.plain_rows, split.graph_rows, split.held_rows) == (22, 2, 4, 4, 4)


def test_a_drawn_cut_counts_at_its_mean() -> None:
    """Uniform on 0 ... 49, the cut leaves 25.5 of 50 steps, of two branches each, with a graph."""
    for seed in range(3):
        config = parse_config({"seed": seed, "method": {"name": "alignprop", "truncation": "uniform"},
                               "sampling": {"steps": 50}})  # fmt: skip
        drawn = count(config, frames=16).denoiser
        assert drawn.plain + drawn.graph == 100
        assert drawn.graph == pytest.approx(51, abs=4)


# ----------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_are_those_that_torch_counts_in_a_real_computation() -> None:
    model, real = tiny_model(), tiny_model()
    inject_lora(model.denoiser, 2, TARGETS, 0)
    inject_lora(real.denoiser, 2, TARGETS, 0)
    model.denoiser.to("meta")
    inputs = torch.randn(1, *model.latent_shape), torch.ones(1, dtype=torch.int64), torch.randn(1, 24, 16)

    def run(unet: Any, device: str) -> torch.Tensor:
        latents, timestep, text = (each.to(device) for each in inputs)
        return unet(latents, timestep, encoder_hidden_states=text).sample

    cost = measure(model.denoiser, lambda: run(model.denoiser, "meta"), backward=True)
    with FlopCounterMode(display=False) as forward:
        output = run(real.denoiser, "cpu")
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert (cost.flops, cost.backward_flops) == (forward.get_total_flops(), backward.get_total_flops())
    assert 0 < cost.plain_peak < cost.kept < cost.peak
    prepare(model.denoiser, LAYERS)
    with recomputing(True):
        again = measure(model.denoiser, lambda: run(model.denoiser, "meta"), backward=True)
    assert again.flops == cost.flops
    assert 0 < again.backward_flops - cost.backward_flops <= cost.flops
    assert again.kept < cost.kept / 4
    assert again.peak < 0.6 * cost.peak
    assert not any(p.grad is not None for p in model.denoiser.parameters())


# ---------------------------------------------------------------------------------------------------------- memory


def measured_peak(compute: Callable[[], object], trace: Path) -> int:
    """Bytes that torch's allocator hands out at the most in a computation, beside what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    live = peak = 0
    for event in events:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize(("method", "recompute"), [("draft", True), ("ddpo", False)])
def test_the_peak_of_a_real_step_is_the_one_that_was_planned(
    stored: Path, tmp_path: Path, method: str, recompute: bool
) -> None:
    """A training step on the CPU, with the built-in rewards, under torch's own memory profiler."""
    settings = {"name": method, "gradient_steps": 2} if method == "draft" else {"name": method}
    config = described(stored, method=settings, train={"checkpoint_activations": recompute})
    parts = outline_parts(config)
    planned = max(stages(parts, count(config, 8), config).values())
    model = load_model(str(stored), frames=8, size=64)
    inject_lora(model.denoiser, 4, TARGETS, 0)
    rewards = load_reward("builtin"), load_reward("builtin-heldout")
    running = ALGORITHMS[method](Context(config, model, *rewards, Stopwatch(torch.device("cpu"))))
    model.predict(torch.randn(1, *model.latent_shape), 1, model.encode_prompts([""]), 3.0)  # the negative prompt
    batch = clips(running, (0, 1))

    def step() -> None:
        for update in running.updates(batch):
            update.loss.backward()

    measured = measured_peak(step, tmp_path / "trace.json")
    assert measured > 50e6, "too small to mean anything"
    assert 0.9 * measured < planned < 1.15 * measured


GUARD = {"every": 500, "count": 4, "videos_per_prompt": 1,
         "rewards": [{"name": "builtin-frames"}, {"name": "builtin-video"}]}  # fmt: skip


@pytest.mark.slow
def test_the_peak_of_a_real_guard_is_the_one_that_was_planned(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("rlvid.plan.guard", "rlvid.evaluate.candidates"):
        monkeypatch.setattr(f"{module}.AT_ONCE", 2)  # so that there are two batches
    config = described(stored, guard=GUARD, reward={"held_out": "builtin-heldout"})
    plan = make_plan(config)
    model = load_model(str(stored), frames=8, size=64)
    scorer = load_run_scorer(config, torch.device("cpu"), guard_rewards(config))
    running = CandidateScorer(model, scorer, ["a", "b", "c", "d"], 1, 1, seed=0, guidance=3.0, final="exact")
    measured = measured_peak(running.rows, tmp_path / "trace.json")
    planned = max(size for name, size in plan.guard.items() if name != "weights")
    assert plan.guard_peak == planned + plan.guard["weights"]
    assert measured > 20e6, "too small to mean anything"
    assert 0.9 * measured < planned < 1.15 * measured
    assert not make_plan(described(stored)).guard


@pytest.mark.slow
def test_the_peak_of_videos_for_tensorboard_is_the_one_that_was_planned(stored: Path, tmp_path: Path) -> None:
    config = described(stored, model={"decode_chunk": 64}, train={"batch_size": 4, "workers": 2})
    plan, model = make_plan(config), load_model(str(stored), frames=8, size=64)
    model.decode_chunk, videos = 64, 2  # as many at once as in a step, of this worker's three
    latents, every_BF = torch.randn(videos, *model.latent_shape), torch.arange(8).expand(videos, -1)

    def decode() -> None:
        with torch.no_grad():
            model.decode_frames(latents, every_BF)

    share = SHOWN_VIDEOS // 2 * ["a"]
    whole = measured_peak(lambda: generate(model, share, steps=2, batch=videos), tmp_path / "trace.json")
    decoding = measured_peak(decode, tmp_path / "trace.json")
    assert 0.9 * whole < plan.videos["videos, chain"] < 1.15 * whole
    assert 0.9 * decoding < plan.videos["videos, decode"] < 1.15 * decoding
    assert plan.peak == sum(plan.resident.values()) + max(*plan.stages.values(), *plan.videos.values())
    assert not make_plan(described(stored, output={"videos_every": 0})).videos


@pytest.mark.slow
def test_frames_that_are_decoded_for_the_held_out_reward_alone_are_planned(stored: Path, tmp_path: Path) -> None:
    def of(held_out: str) -> dict[str, int]:
        return make_plan(described(stored, reward={"name": "brightness", "held_out": held_out})).stages

    model, videos = load_model(str(stored), frames=8, size=64), described(stored).micro_batch
    latents, every_BF = torch.randn(videos, *model.latent_shape), torch.arange(8).expand(videos, -1)
    with torch.no_grad():
        measured = measured_peak(lambda: model.decode_frames(latents, every_BF), tmp_path / "trace.json")
    whole = of("oracle")  # of whole videos, and without a network; the trained one keeps nothing beside its frames
    assert 0.9 * measured < whole["held-out reward"] - whole["reward"] < 1.15 * measured
    frames = of("builtin-heldout")
    assert 0 < frames["held-out reward"] - frames["reward"] < 0.5 * measured
    rewards = [{"name": "brightness", "held_out": each} for each in (None, "oracle")]
    alone, beside = (make_plan(described(stored, method={"name": "ddpo"}, reward=each)).stages for each in rewards)
    assert alone["reward"] == beside["reward"], "frames of the held-out reward are counted apart"


def test_the_archive_of_a_step_holds_the_frames_that_are_rewarded(stored: Path) -> None:
    method, reward = {"name": "draft-lv", "repeats": 3}, {"held_out": "builtin-video", "segments": 2}
    plan = make_plan(described(stored, method=method, reward=reward))
    assert plan.disk["archive of a step, at most"] == 2 * 2 * 3 * 64 * 64


@pytest.mark.slow
def test_a_guard_that_blends_all_weights_keeps_the_base_in_main_memory(stored: Path) -> None:
    model = {"finetune": "full"}
    plan = make_plan(described(stored, model=model, guard={**GUARD, "scales": [0.5, 1]}))
    assert plan.guard_host == sum(p.nbytes for p in load_model(str(stored), frames=8, size=64).denoiser.parameters())
    assert plan.as_dict()["guard_host_bytes"] == plan.guard_host
    assert not make_plan(described(stored, model=model, guard=GUARD)).guard_host


@pytest.mark.parametrize("at_once", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_scoring_large_videos_takes_what_was_planned(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    for place in ("evaluate.score", "plan.guard"):
        monkeypatch.setattr(f"rlvid.{place}.PIXELS_AT_ONCE", at_once * 8 * 256 * 256)
    size = {"frames": 8, "size": 256}
    config = described(stored, model=size, guard=GUARD, reward={"held_out": "builtin-heldout", "chunk": 2})
    scorer = load_run_scorer(config, torch.device("cpu"), guard_rewards(config))
    frames, batch = torch.rand(4, 8, 3, 256, 256), VideoBatch("guard", "guard", 1, 0, ("a", "b", "c", "d"), 1)
    measured = measured_peak(lambda: scorer.rows(batch, frames), tmp_path / "trace.json")
    measured += frames[:at_once].nbytes  # of a part, which moves to the scorers' device
    assert 0.9 * measured < make_plan(config).guard["rewards"] < 1.15 * measured


def test_advice_keeps_its_word(stored: Path) -> None:
    train = {"batch_size": 8, "micro_batch": 4, "checkpoint_activations": False}
    config = described(stored, train=train, method={"name": "draft", "gradient_steps": 3})
    plan = make_plan(config)
    assert {"train.checkpoint_activations=true", "train.micro_batch=2", "train.micro_batch=1"} <= plan.advice.keys()
    for setting, promised in plan.advice.items():
        section, (key, value) = setting.split(".")[0], setting.split(".")[1].split("=")
        changed = config.model_dump(mode="json")
        changed[section][key] = json.loads(value)
        assert make_plan(parse_config(changed)).peak == pytest.approx(promised, rel=1e-6)
        assert promised <= 0.95 * plan.peak
    assert plan.peak == plan.checkpointing["kept"] > plan.checkpointing["recomputed"]
    assert plan.advice["train.checkpoint_activations=true"] == plan.checkpointing["recomputed"]
    assert not make_plan(described(stored, train={"batch_size": 1}, output={"videos_every": 0})).advice


def test_optimiser_state_is_spread_by_zero_stages(stored: Path) -> None:
    def of(stage: int, workers: int = 2) -> dict[str, int]:
        config = described(stored, train={"zero_stage": stage, "workers": workers})
        return resident(parts, config)

    parts = outline_parts(described(stored))
    trained = parts.denoiser.trainable
    assert [of(stage)["optimiser"] / trained for stage in range(4)] == [8, 6, 6, 6]
    assert [of(stage)["gradients"] / trained for stage in range(4)] == [4, 4, 2, 2]
    assert of(1, workers=1)["optimiser"] == 12 * trained
    assert of(0)["denoiser"] == of(2)["denoiser"] == 4 * (parts.denoiser.parameters + trained)


# ------------------------------------------------------------------------------------------------------- full size


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        return make_plan(load_config("modelscope-hpsv2"))


@pytest.mark.slow
def test_the_papers_run_is_planned_without_weights(paper: Plan) -> None:
    parts, counts = paper.parts, paper.counts
    assert (parts.denoiser.parameters, parts.denoiser.trainable, parts.adapted_layers) == (
        1_411_233_860,
        1_661_440,
        264,
    )
    assert (parts.autoencoder.parameters, parts.text_encoder.parameters) == (83_653_863, 340_387_840)
    assert parts.reward.parameters == 986_109_441  # ViT-H-14
    assert (counts.denoiser.plain + counts.denoiser.graph, counts.decoder.graph, counts.reward.graph) == (24, 4, 4)
    assert parts.latent_shape == (4, 16, 32, 32)
    assert paper.disk["adapter"] == 6_645_760
    assert 4.7e12 < parts.denoiser.cost.flops < 5.0e12
    # What docs/real-models.md says: 12.4 GiB, and 52 where all activations are kept.
    assert 10 * 2**30 < paper.peak < 13 * 2**30
    assert paper.checkpointing["kept"] > 4 * paper.peak


@pytest.mark.slow
def test_the_other_real_runs_are_planned_without_weights(paper: Plan) -> None:
    longer, other = (make_plan(load_config(f"modelscope-{name}")) for name in ("hpsv2-d50", "imagereward"))
    assert longer.counts.denoiser.plain + longer.counts.denoiser.graph == 60
    assert (longer.peak, longer.advice) == (paper.peak, paper.advice)
    assert round(other.parts.reward.parameters / 1e6) == 446
    assert other.counts == paper.counts
    assert 0 < other.parts.reward.cost.flops < paper.parts.reward.cost.flops


def test_real_runs_have_the_papers_settings() -> None:
    config = load_config("modelscope-hpsv2")
    assert (config.sampling.steps, config.sampling.guidance, config.method.tau) == (20, 3.0, 0.6)
    assert (config.sampling.final_level, config.optimizer.clip_norm) == ("paper", 0)
    assert config.reward.preprocess == "instructvideo"
    assert (config.reward.name, config.reward.segments, config.reward.attenuation) == ("hpsv2", 4, 1.0)
    assert (config.optimizer.lr, config.train.batch_size, config.train.steps) == (1e-5, 8, 20_000)
    assert (config.model.lora.rank, config.model.frames, config.model.size) == (4, 16, 256)
    longer, other = load_config("modelscope-hpsv2-d50"), load_config("modelscope-imagereward")
    assert longer.sampling == config.sampling.model_copy(update={"steps": 50})
    assert (longer.reward, longer.optimizer) == (config.reward, config.optimizer)
    assert (other.reward.name, other.reward.preprocess) == ("imagereward", None)  # ImageReward's own
    assert (other.sampling, other.optimizer) == (config.sampling, config.optimizer)


# --------------------------------------------------------------------------------------------------------- command


def test_the_command_prints_tables_and_json(stored: Path) -> None:
    settings = [f"model.path={stored}", "model.size=32", "train.workers=1"]
    shown = CliRunner().invoke(app, ["plan", "toy", *settings]).output
    for words in (
        "trainable in",
        "in units of 2^20",
        "25 U-Net evaluations and 3 again",
        "4 decodes",
        "chain without gradient",
        "peak:",
    ):
        assert words in shown
    assert "never drawn" not in shown
    shown = CliRunner().invoke(app, ["plan", "toy", *settings, "reward.segments=3"]).output
    assert "reward.segments = 3 does not divide" in shown
    assert "never drawn" in shown
    told = json.loads(CliRunner().invoke(app, ["plan", "toy", *settings, "--json"]).output)
    assert told["calls_per_sample"]["denoiser"] == {"plain": 22, "graph": 3, "again": 3, "backward": 3}
    assert told["peak_bytes"] == sum(told["resident_bytes"].values()) + max(told["stage_bytes"].values())
    assert told["flops_per_step"] == pytest.approx(8 * sum(told["flops_per_sample"].values()))
    assert "guard" not in shown
    shown = CliRunner().invoke(app, ["plan", "toy", *settings, "guard.every=20", "guard.scales=[0.5,1]"]).output
    assert "guard: " in shown
    assert "of main memory" not in shown


def test_a_plan_of_unfit_settings_is_refused(stored: Path) -> None:
    with pytest.raises(ValueError, match=r"reward\.segments = 9 exceeds the 8 frames"):
        make_plan(parse_config({"reward": {"segments": 9}}))
    with pytest.raises(ValueError, match="no linear layer of the denoiser is called 'query'"):
        make_plan(described(stored, model={"lora": {"targets": ["query"]}}))
