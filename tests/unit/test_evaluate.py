"""Evaluation: the same noise for every model, metrics as computed by hand, NaN never a number, tables that add up."""

import csv
import dataclasses
import io
import json
import math
from itertools import combinations
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from helpers import scheduler
from rich.console import Console
from torch import Tensor

from rlvid import randomness
from rlvid.diffusion.generate import generate, videos_at_once
from rlvid.evaluate import metrics
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.evaluate.results.summary import compare, compare_all, summarise
from rlvid.evaluate.score import VideoBatch, VideoScorer, evaluate_model, split
from rlvid.evaluate.tables import pages
from rlvid.files import write_atomic
from rlvid.toy.tiny import tiny_model, tiny_reward
from rlvid.world.captions import write_captions
from rlvid.world.render import render, sample_clips

PROMPTS = ["a red circle moving left on a black background", "a blue star growing, white background", "a dog"]


def row(model: str = "base", set_name: str = "in_domain", steps: int = 20, index: int = 0, **scores: float) -> Row:
    values = dict.fromkeys(METRICS, math.nan) | scores
    return Row(model, set_name, steps, index, f"prompt {index}", **values)


def clips_and_captions(count: int) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(3)
    clips = sample_clips(count, generator)
    return render(clips, frames=5, size=16), write_captions(clips, generator)


def test_generation_does_not_depend_on_the_batch_nor_on_the_other_prompts() -> None:
    model = tiny_model()
    done: list[tuple[int, int]] = []
    together = generate(model, PROMPTS, seed=1, steps=3, progress=lambda *each: done.append(each))
    one_by_one = generate(model, PROMPTS, seed=1, steps=3, batch=1)
    assert together.shape == (3, 4, 3, 16, 16)
    assert together.dtype == torch.float32
    assert 0 <= together.min() < together.max() <= 1
    assert done == [(3, 3)]
    torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=0)
    last = generate(model, PROMPTS[2:], seed=1, steps=3, first_index=2)
    torch.testing.assert_close(last, together[2:], atol=1e-5, rtol=0)
    assert (generate(model, PROMPTS[2:], seed=1, steps=3) - last).abs().max() > 1e-3
    assert (generate(model, PROMPTS[2:], seed=2, steps=3, first_index=2) - last).abs().max() > 1e-3


def test_of_large_videos_fewer_are_made_at_once() -> None:
    papers, wan = (4, 16, 32, 32), (16, 21, 60, 104)
    assert [videos_at_once(papers, most) for most in (1, 8, 16, 99)] == [1, 8, 16, 16]
    assert videos_at_once(wan, 16) == 1
    assert videos_at_once((16, 5, 32, 32), 16) == 12


def test_large_videos_are_made_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = tiny_model(), list[tuple[int, int]]()
    together = generate(model, PROMPTS, seed=1, steps=2)
    monkeypatch.setattr("rlvid.diffusion.generate._NUMBERS", 2 * math.prod(model.latent_shape))
    apart = generate(model, PROMPTS, seed=1, steps=2, progress=lambda *each: done.append(each))
    assert done == [(2, 3), (3, 3)]
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)


def test_generation_with_noise_on_the_way_belongs_to_the_sample_too() -> None:
    model = tiny_model()
    noisy = generate(model, PROMPTS, seed=1, steps=3, eta=1.0)
    torch.testing.assert_close(generate(model, PROMPTS, seed=1, steps=3, eta=1.0, batch=2), noisy, atol=1e-5, rtol=0)
    assert (generate(model, PROMPTS, seed=1, steps=3) - noisy).abs().max() > 1e-3


def test_generation_is_diffusers_ddim_from_the_samples_noise() -> None:
    model = tiny_model()
    ddim = scheduler(4, "exact")
    latents = randomness.normal(model.latent_shape, 5, "generate", [(0,)])
    text = model.encode_prompts(["", PROMPTS[0]])
    with torch.no_grad():
        for t in ddim.timesteps:
            uncond, cond = model.denoiser(latents.repeat(2, 1, 1, 1, 1), t, encoder_hidden_states=text).sample.chunk(2)
            latents = ddim.step(uncond + 2.0 * (cond - uncond), t, latents).prev_sample
        scale = model.vae.config.scaling_factor
        frames = [model.vae.decode(latents[:, :, f] / scale).sample / 2 + 0.5 for f in range(4)]
    made = generate(model, PROMPTS[:1], seed=5, steps=4, guidance=2.0)
    torch.testing.assert_close(made, torch.stack(frames, dim=1).clamp(0, 1), atol=1e-5, rtol=0)


def test_generation_with_reuse_calls_the_denoiser_at_the_first_two_and_at_every_nth_step() -> None:
    model, points = tiny_model(), list[int]()
    model.denoiser.register_forward_pre_hook(lambda _, arguments: points.append(int(arguments[1][0])))
    frames = generate(model, PROMPTS[:1], seed=0, steps=7, reuse=3)
    assert points == [model.path.grid(7)[step] for step in (0, 1, 3, 6)]
    assert 0 < (generate(model, PROMPTS[:1], seed=0, steps=7) - frames).abs().mean() < 0.05


def test_a_broken_model_gives_nan_and_never_a_colour() -> None:
    model = tiny_model()
    model.vae.decoder.conv_out.bias.data[0] = torch.inf
    frames = generate(model, PROMPTS[:1], seed=0, steps=1)
    assert frames[:, :, 0].isnan().all()
    assert frames[:, :, 1:].isfinite().all()


@pytest.mark.parametrize(("prompts", "batch", "steps"), [([], 1, 1), (PROMPTS, 0, 1), (PROMPTS, 1, 0)])
def test_generation_refuses_what_it_cannot_do(prompts: list[str], batch: int, steps: int) -> None:
    with pytest.raises(ValueError, match=r"prompts is empty|batch = 0|steps = 0"):
        generate(tiny_model(), prompts, seed=0, steps=steps, batch=batch)


def test_metrics_equal_a_computation_by_hand() -> None:
    clip = tiny_reward()
    frames, _ = clips_and_captions(4)
    prompts = ["one", "two", "one", "one"]
    image = clip.image_features(frames).double().numpy()
    text = clip.text_features(prompts).double().numpy()
    count = frames.shape[1]
    mean_feature = image.mean(1) / np.linalg.norm(image.mean(1), axis=1, keepdims=True)
    for b in range(4):
        cosine = [[float(image[b, f] @ image[b, g]) for g in range(count)] for f in range(count)]
        expected = {
            "consecutive": np.mean([cosine[f][f + 1] for f in range(count - 1)]),
            "all_pairs": np.mean([cosine[f][g] for f, g in combinations(range(count), 2)]),
            "vbench": np.mean([(max(0, cosine[f][f - 1]) + max(0, cosine[f][0])) / 2 for f in range(1, count)]),
        }
        for name, value in expected.items():
            found = metrics.temporal_consistency(clip, frames, name)[b].item()
            assert found == pytest.approx(value, abs=1e-5), name
        by_hand = np.mean([image[b, f] @ text[b] for f in range(count)])
        assert metrics.clipsim(clip, frames, prompts)[b].item() == pytest.approx(by_hand, abs=1e-5)
        pixels = frames[b].double().numpy()
        moved = np.mean([np.abs(pixels[f + 1] - pixels[f]).mean() for f in range(count - 1)])
        assert metrics.motion(frames)[b].item() == pytest.approx(moved, abs=1e-6)
        fellows = [a for a in range(4) if a != b and prompts[a] == prompts[b]]
        apart = metrics.diversity(clip.image_features(frames), prompts)[b].item()
        if fellows:
            assert apart == pytest.approx(np.mean([1 - mean_feature[a] @ mean_feature[b] for a in fellows]), abs=1e-5)
        else:
            assert math.isnan(apart)


def test_vbench_clamps_and_the_others_do_not() -> None:
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]])
    assert metrics.consistency(features).item() == -1
    assert metrics.consistency(features, "all_pairs").item() == pytest.approx(-1 / 3)
    assert metrics.consistency(features, "vbench").item() == 0.25
    with pytest.raises(ValueError, match="allowed: consecutive, all_pairs, vbench"):
        metrics.consistency(features, "median")
    with pytest.raises(ValueError, match="needs 2 or more"):
        metrics.motion(torch.zeros(1, 1, 3, 4, 4))


def test_evaluation_scores_every_video_of_every_set() -> None:
    model, reward, held_out = tiny_model(), tiny_reward(1), tiny_reward(2)
    sets = {"in_domain": PROMPTS, "scenes": ["navy waves", "black checks"]}
    scorer = VideoScorer(reward, held_out, clip=held_out, use_oracle=True)
    batches = [
        VideoBatch("base", name, steps, start, part, copies=1)
        for steps in (2, 3)
        for name, prompts in sets.items()
        for start, part in split(prompts, copies=1, most=2)
    ]
    assert [len(batch.texts) for batch in batches] == [2, 1, 2] * 2
    rows = evaluate_model(model, batches, scorer, seed=0, guidance=3.0, final="exact")
    assert [(r.set, r.steps, r.index, r.prompt) for r in rows] == [
        (name, steps, index, prompt) for steps in (2, 3) for name in sets for index, prompt in enumerate(sets[name])
    ]
    frames = generate(model, PROMPTS, seed=0, steps=2)
    with torch.no_grad():
        rewards = reward(frames, PROMPTS).mean(1)
        others = held_out(frames, PROMPTS).mean(1)
    assert [r.reward for r in rows[:3]] == pytest.approx(rewards.tolist(), abs=1e-5)
    assert [r.held_out for r in rows[:3]] == pytest.approx(others.tolist(), abs=1e-5)
    assert [r.clipsim for r in rows[:3]] == pytest.approx(others.tolist(), abs=1e-5)
    assert [math.isnan(r.oracle_subject) for r in rows[:3]] == [False, False, True]
    assert not any(math.isnan(r.oracle_sharpness) for r in rows)


def test_diversity_is_of_the_videos_of_a_prompt() -> None:
    model, reward = tiny_model(), tiny_reward(1)
    scorer = VideoScorer(reward, None, clip=reward, use_oracle=False)
    batches = [
        VideoBatch("base", "twice", 2, 0, tuple(PROMPTS[:2]), copies=2),
        VideoBatch("base", "once", 2, 0, tuple(PROMPTS[:1]), copies=1),
    ]
    rows = evaluate_model(model, batches, scorer, seed=0, guidance=3.0, final="exact")
    frames = generate(model, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], seed=0, steps=2, final="exact")
    with torch.no_grad():
        videos_BD = torch.nn.functional.normalize(reward.image_features(frames).mean(1), dim=1)
    distances = [1 - float(videos_BD[i] @ videos_BD[i + 1]) for i in (0, 2)]
    assert [r.diversity for r in rows[:4]] == pytest.approx([distances[0]] * 2 + [distances[1]] * 2, abs=1e-5)
    assert math.isnan(rows[4].diversity)


def test_a_video_that_is_not_finite_has_no_scores_and_does_not_touch_its_neighbours() -> None:
    frames, prompts = clips_and_captions(3)
    scorer = VideoScorer(tiny_reward(1), None, clip=tiny_reward(2), use_oracle=True)
    clean = scorer.scores(frames, prompts)
    spoilt = frames.clone()
    spoilt[1, 2, 0, 3, 3] = torch.nan
    scores = scorer.scores(spoilt, prompts)
    for name in METRICS:
        assert scores[name][1].isnan(), name
        torch.testing.assert_close(scores[name][[0, 2]], clean[name][[0, 2]], equal_nan=True, atol=1e-6, rtol=0)
    assert clean["held_out"].isnan().all()
    assert clean["oracle_score"].isfinite().all()
    assert all(value.isnan().all() for value in scorer.scores(spoilt[1:2], prompts[1:2]).values())


def test_large_videos_are_scored_in_parts_and_their_diversity_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    frames, captions = clips_and_captions(6)
    prompts = [captions[place] for place in (0, 0, 0, 1, 1, 1)]
    frames[1, 0, 0, 0, 0] = torch.nan
    reward, sizes = tiny_reward(1), list[int]()

    def counted(part: Tensor, texts: list[str]) -> Tensor:
        sizes.append(len(part))
        assert len(texts) == len(part)
        return reward(part, texts)

    scorer = VideoScorer(counted, tiny_reward(3), tiny_reward(2), use_oracle=True, further={"reward_own": reward})
    whole, features = scorer.scores(frames, prompts), scorer.features(frames[2:])
    monkeypatch.setattr("rlvid.evaluate.score.PIXELS_AT_ONCE", 2 * 5 * 16 * 16)
    parts = scorer.scores(frames, prompts, torch.device("cpu"))
    assert sizes == [5, 2, 2, 1]
    torch.testing.assert_close(parts, whole, equal_nan=True, atol=1e-6, rtol=0)
    torch.testing.assert_close(scorer.features(frames[2:]), features, atol=1e-6, rtol=0)
    assert whole["diversity"].isfinite().tolist() == [True, False, True, True, True, True]
    monkeypatch.setattr("rlvid.evaluate.score.PIXELS_AT_ONCE", 1)
    scorer.scores(frames[2:4], prompts[2:4])
    assert sizes[4:] == [1, 1], "a video is never cut"


def test_the_built_in_worlds_videos_are_scored_at_once() -> None:
    sizes = list[int]()

    def counted(part: Tensor, _: list[str]) -> Tensor:
        sizes.append(len(part))
        return part.mean((2, 3, 4))

    VideoScorer(counted, None, tiny_reward(2), use_oracle=False).scores(torch.rand(16, 8, 3, 32, 32), ["a"] * 16)
    assert sizes == [16]


def test_summaries_leave_out_and_count_what_is_not_finite() -> None:
    rows = [row(index=i, reward=r) for i, r in enumerate([0.1, 0.3, math.nan, math.inf, 0.8])] + [
        row("tuned", reward=2.0)
    ]
    base, tuned = summarise(rows)
    assert (base.count, base.broken, base.used["reward"]) == (5, 2, 3)
    assert base.mean["reward"] == pytest.approx(0.4)
    assert base.std["reward"] == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))
    assert base.used["held_out"] == 0
    assert math.isnan(base.mean["held_out"])
    assert tuned.mean["reward"] == 2.0
    assert math.isnan(tuned.std["reward"])


def test_comparison_is_paired_and_its_interval_is_that_of_the_mean_difference() -> None:
    random = np.random.default_rng(1)
    before = random.normal(0.3, 0.2, 200)
    gain = random.normal(0.05, 0.03, 200)
    base = [row(index=i, reward=b) for i, b in enumerate(before)]
    tuned = [row("tuned", index=i, reward=b + g) for i, (b, g) in enumerate(zip(before, gain, strict=True))]
    found = next(c for c in compare(base, tuned[::-1]) if c.metric == "reward")
    assert (found.base, found.tuned, found.pairs, found.excluded) == ("base", "tuned", 200, 0)
    assert found.difference == pytest.approx(gain.mean())
    assert found.in_base_std == pytest.approx(gain.mean() / before.std(ddof=1))
    alike = [dataclasses.replace(each, reward=21.3 * (1 + 1e-7 * (i % 3))) for i, each in enumerate(base)]
    (constant,) = [c for c in compare(alike, tuned[::-1]) if c.metric == "reward"]
    assert math.isnan(constant.in_base_std), "a spread that rounding made is no unit"
    half = 1.96 * gain.std(ddof=1) / math.sqrt(200)  # unpaired, it would be six times as wide
    assert found.low == pytest.approx(gain.mean() - half, abs=half / 8)
    assert found.high == pytest.approx(gain.mean() + half, abs=half / 8)
    tuned[0] = dataclasses.replace(tuned[0], reward=math.nan)
    again = next(c for c in compare(base, tuned) if c.metric == "reward")
    assert (again.pairs, again.excluded) == (199, 1)
    assert again.difference == pytest.approx(gain[1:].mean())


@pytest.mark.parametrize(
    ("base", "tuned", "complaint"),
    [
        ([row()], [row("tuned", index=1)], "one model's row only"),
        ([row(), row()], [row("tuned")], "twice"),
        ([row()], [dataclasses.replace(row("tuned"), prompt="other")], "two prompts"),
        ([row(), row("other", index=1)], [row("tuned"), row("tuned", index=1)], "2 models"),
    ],
)
def test_comparison_refuses_rows_that_do_not_pair(base: list[Row], tuned: list[Row], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        compare(base, tuned)


def example_rows() -> list[Row]:
    rows = []
    for model, extra in (("base", 0.0), ("tuned", 0.1)):
        for set_name in ("in_domain", "scenes"):
            for i in range(4):
                scores = {
                    "reward": 0.2 + 0.1 * i + extra,
                    "held_out": 0.3 - extra,
                    "clipsim": 0.3 - extra,
                    "motion": 0.05,
                }
                rows.append(row(model, set_name, index=i, oracle_subject=float(i > 1 or extra > 0), **scores))
    rows.append(row("base", "scenes", index=4))
    rows.append(row("tuned", "scenes", index=4, reward=0.5))
    return rows


def test_the_files_hold_what_was_measured(tmp_path: Path) -> None:
    rows = example_rows()
    paths = pages.write_results(tmp_path / "out", rows, facts={"seed": 0, "guidance": 3.0})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    page = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")
    assert "- seed: 0" in page
    assert "| in domain | base | 4 | 0.350 ± 0.129 | **0.300 ± 0.000** | **0.300** | 0.050 | 50 % |" in page
    assert "| in domain | tuned | 4 | **0.450 ± 0.129** | 0.200 ± 0.000 | 0.200 | 0.050 | **100 %** |" in page
    assert "- in domain, tuned over base: reward +0.100 [0.100, 0.100] (0.8 base std); held-out reward -0.100" in page
    assert "- scenes, base: 1 of 5 videos have no finite reward and are left out" in page
    assert "the two columns are one measurement" in page
    assert "nan" not in page
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert content["summaries"][0]["mean"]["reward"] == pytest.approx(0.35)
    assert content["summaries"][0]["mean"]["consistency"] is None
    assert {c["excluded"] for c in content["comparisons"] if c["set"] == "scenes" and c["metric"] == "reward"} == {1}
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "evaluation.csv").read_text(encoding="utf-8"))))
    assert float(lines[0]["reward_mean"]) == pytest.approx(0.35)
    assert lines[0]["consistency_mean"] == ""
    scores = "avg(reward) filter (not isnan(reward)), count(*) filter (not isnan(consistency))"
    query = f"select model, count(*), {scores} from '{paths[4]}' group by model order by model"
    (base, tuned) = duckdb.sql(query).fetchall()
    assert base == ("base", 9, pytest.approx(0.35), 0)
    assert tuned == ("tuned", 9, pytest.approx((8 * 0.45 + 0.5) / 9), 0)


@pytest.mark.parametrize(
    ("tuned", "width", "missing"),
    [
        ("tuned", 120, []),
        ("instructvideo × 0.5", 120, []),
        ("instructvideo × 0.25", 100, ["CLIPSIM", "Sharpness", "Background"]),
        ("instructvideo × 0.25", 80, ["CLIPSIM", "Sharpness", "Background", "Colour", "Motion direction"]),
    ],
)
def test_a_table_fits_the_console(tuned: str, width: int, missing: list[str]) -> None:
    models = {"base": "base", "tuned": tuned}
    rows = [dataclasses.replace(r, model=models[r.model], **dict.fromkeys(METRICS, 0.5)) for r in example_rows()]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(pages.render_table(summarise(rows), compare_all(rows), steps=20, width=width))
    text = console.export_text()
    assert "…" not in text
    assert all(word in text for word in (tuned, "0.500", "held-out", "oracle"))
    assert ("±" in text) == (tuned == "tuned")
    told = " ".join(text.split())
    assert ("left out" in told) == bool(missing)
    if missing:
        assert f"left out for want of width: {', '.join(missing)}; evaluation.md has them" in told


def test_the_console_shows_one_number_of_steps_in_120_columns() -> None:
    rows = [dataclasses.replace(r, **dict.fromkeys(METRICS, 0.5)) for r in example_rows()]
    comparisons = compare_all(rows)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(pages.render_table(summarise(rows), comparisons, steps=20))
    text = console.export_text()
    assert "Evaluation, 20 sampling steps" in text
    assert "…" not in text
    assert "oracle" in text
    assert "scenes, tuned over base: reward +0.000 [0.000, 0.000]" in text
    with pytest.raises(ValueError, match="there are: 20"):
        pages.render_table(summarise(rows), steps=50)
    with pytest.raises(ValueError, match="models: base, tuned"):
        compare_all(rows, base="other")


def test_what_is_shown_alike_is_not_told_apart_by_bold() -> None:
    rows = [row(index=i, reward=0.5, oracle_subject=float(i == 0)) for i in range(50)]
    rows += [row("tuned", index=i, reward=0.5, oracle_subject=float(i == 0)) for i in range(40)]
    page = pages.markdown(rows, summarise(rows))
    assert "| in domain | base | 50 | 0.500 ± 0.000 | 2 % |" in page
    assert "| in domain | tuned | 40 | 0.500 ± 0.000 | 2 % |" in page


def test_one_model_alone_is_neither_best_nor_compared(tmp_path: Path) -> None:
    pages.write_results(tmp_path, [row(reward=0.5)])
    page = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "| in domain | base | 1 | 0.500 |" in page
    assert "**" not in page
    assert "over base" not in page


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]
