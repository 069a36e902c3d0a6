"""The built-in world: the renderer draws what the labels say, captions read back, and the oracle sees it in pixels."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from rlvid.world import oracle
from rlvid.world.captions import (
    PROMPT_SETS,
    Labels,
    labels_of,
    prompt_set,
    read_caption,
    write_caption,
    write_captions,
)
from rlvid.world.grade import grade
from rlvid.world.render import (
    BACKGROUNDS,
    COLOURS,
    DEGRADATIONS,
    MOTIONS,
    PATTERNS,
    SHAPES,
    SUBJECTS,
    TRAVEL,
    Clips,
    blur,
    degrade,
    pattern_coverage,
    render,
    sample_clips,
    sample_degradation,
    shape_coverage,
)

NAMES = ("subject", "colour", "background", "motion")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_clip(subject: str, motion: str, colour: str = "red", background: str = "black", phase: float = 0.0) -> Clips:
    indices = (SUBJECTS.index(subject), [*COLOURS].index(colour), [*BACKGROUNDS].index(background))
    labels = [torch.tensor([i]) for i in (*indices, MOTIONS.index(motion))]
    return Clips(*labels, *(torch.tensor([v]) for v in (0.5, 0.5, 0.22, phase)))


def coverage_of(frames_BFCHW: Tensor, clips: Clips) -> Tensor:
    """How far each pixel is from the ground towards the ink: (B, F, H, W)."""
    ink = torch.tensor([*COLOURS.values()])[clips.colour_B][:, None, :, None, None]
    ground = torch.tensor([*BACKGROUNDS.values()])[clips.background_B][:, None, :, None, None]
    return ((frames_BFCHW - ground) * (ink - ground)).sum(2) / (ink - ground).square().sum(2)


def centroids(coverage_FHW: Tensor) -> Tensor:
    """Centre of mass of each frame, (F, 2) as x, y in fractions of the frame."""
    grid = (torch.arange(coverage_FHW.shape[-1]) + 0.5) / coverage_FHW.shape[-1]
    mass = coverage_FHW.sum((1, 2))
    return (
        torch.stack([(coverage_FHW.sum(1) * grid).sum(1), (coverage_FHW.sum(2) * grid).sum(1)], dim=1) / mass[:, None]
    )


# ------------------------------------------------------------------------------------------- renderer


@pytest.mark.parametrize(("frames", "size"), [(8, 32), (16, 32), (2, 32), (8, 64)])
def test_render_has_the_size_asked_for_and_values_in_range(frames: int, size: int) -> None:
    clips = sample_clips(24, generator())
    out = render(clips, frames, size)
    assert out.shape == (24, frames, 3, size, size)
    assert out.dtype == torch.float32
    assert 0 <= out.min() < 0.03
    assert 0.97 < out.max() <= 1


def test_size_is_resolution_only() -> None:
    clips = sample_clips(24, generator())
    coarse = torch.nn.functional.avg_pool2d(render(clips, size=64).flatten(0, 1), 2).view(24, 8, 3, 32, 32)
    error = (coarse - render(clips)).abs()
    assert error.mean() < 0.005
    shifted = (coarse.roll(1, -1) - render(clips)).abs()
    assert shifted.mean() > 4 * error.mean()


def test_a_seed_fixes_the_clips() -> None:
    first, again, other = (sample_clips(32, generator(seed)) for seed in (3, 3, 4))
    for field in dataclasses.fields(Clips):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
    assert torch.equal(render(first), render(again))
    assert not torch.equal(first.subject_B, other.subject_B)


def test_sampling_covers_every_label_and_patterns_never_grow() -> None:
    clips = sample_clips(2000, generator())
    for name, count in zip(NAMES, (len(SUBJECTS), len(COLOURS), len(BACKGROUNDS), len(MOTIONS)), strict=True):
        assert len(getattr(clips, f"{name}_B").unique()) == count
    growing = clips.motion_B == MOTIONS.index("growing")
    assert not (growing & (clips.subject_B >= len(SHAPES))).any()
    only = sample_clips(64, generator(), ("moon", "checks"))
    assert {labels.subject for labels in labels_of(only)} == {"moon", "checks"}


@pytest.mark.parametrize("radius", [0.12, 0.2, 0.26])
def test_edges_are_anti_aliased_so_areas_are_exact(radius: float) -> None:
    x = torch.linspace(0.45, 0.55, 7)
    y, r = x.flip(0) + 0.013, torch.full_like(x, radius)
    circle = shape_coverage("circle", x, y, r, 32).mean((1, 2))
    torch.testing.assert_close(circle, math.pi * (0.95 * r) ** 2, rtol=0.01, atol=0)
    square = shape_coverage("square", x, y, r, 32).mean((1, 2))
    torch.testing.assert_close(square, (1.7 * r) ** 2, rtol=0.02, atol=0)
    ring = shape_coverage("ring", x, y, r, 32).mean((1, 2))
    torch.testing.assert_close(ring, math.pi * r**2 * (0.96**2 - 0.48**2), rtol=0.01, atol=0)
    partial = shape_coverage("circle", x, y, r, 32)
    assert ((partial > 0.05) & (partial < 0.95)).any()


def test_shapes_and_patterns_are_all_different() -> None:
    half, true = torch.tensor([0.5]), torch.tensor([True])
    drawn = [shape_coverage(s, half, half, half * 0.5, 32) for s in SHAPES]
    drawn += [pattern_coverage(p, half, half, true, 32) for p in PATTERNS]
    flat = torch.cat(drawn).flatten(1)
    distance = torch.cdist(flat, flat, p=1) / flat.shape[1] + torch.eye(len(flat))
    assert distance.min() > 0.02
    with pytest.raises(ValueError, match="hexagon"):
        shape_coverage("hexagon", half, half, half, 32)
    with pytest.raises(ValueError, match="dots"):
        pattern_coverage("dots", half, half, true, 32)


@pytest.mark.parametrize("frames", [8, 16])
@pytest.mark.parametrize(
    ("motion", "direction"),
    [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1)), ("still", (0, 0))],
)
def test_motion_moves_the_subject_by_travel(motion: str, direction: tuple[int, int], frames: int) -> None:
    clips = one_clip("star", motion)
    centre_F2 = centroids(coverage_of(render(clips, frames), clips)[0])
    expected = TRAVEL * torch.tensor(direction, dtype=torch.float32)
    torch.testing.assert_close(centre_F2[-1] - centre_F2[0], expected, atol=0.005, rtol=0)
    step = (centre_F2[1:] - centre_F2[:-1]) - expected / (frames - 1)
    assert step.abs().max() < 0.01


def test_growing_grows_in_place() -> None:
    clips = one_clip("circle", "growing")
    coverage = coverage_of(render(clips), clips)[0]
    area = coverage.mean((1, 2))
    assert (area.diff() > 0).all()
    assert (area[-1] / area[0]).sqrt().item() == pytest.approx(1.45 / 0.55, rel=0.01)
    assert centroids(coverage).std(0).max() < 1e-3


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("motion", "dim", "sign"), [("left", 3, -1), ("right", 3, 1), ("up", 2, -1), ("down", 2, 1)])
def test_patterns_shift_the_way_they_say(pattern: str, motion: str, dim: int, sign: int) -> None:
    # 65 frames at 160 pixels: one pixel a frame, so that a shifted frame is the next one.
    clips = one_clip(pattern, motion)
    coverage = coverage_of(render(clips, frames=65, size=160)[:, :3], clips)
    inner = slice(4, -4)
    ahead = coverage[:, 0].roll(sign, dim - 1)[:, inner, inner]
    back = coverage[:, 0].roll(-sign, dim - 1)[:, inner, inner]
    now = coverage[:, 1][:, inner, inner]
    assert (ahead - now).abs().max() < 1e-3
    assert (back - now).abs().max() > 0.01


# ---------------------------------------------------------------------------------------- degradations


def test_blur_is_the_gaussian_that_torchvision_has() -> None:
    frames = torch.rand(3, 2, 3, 32, 32)
    sigma = torch.tensor([0.9, 1.2, 1.6])
    out = blur(frames, sigma)
    for index, value in enumerate(sigma.tolist()):
        reference = gaussian_blur(frames[index], [11, 11], [value, value])
        inner = (..., slice(5, -5), slice(5, -5))  # they reflect at the border, we replicate
        torch.testing.assert_close(out[index][inner], reference[inner], atol=1e-5, rtol=0)
    flat = torch.full((1, 2, 3, 16, 16), 0.3)
    torch.testing.assert_close(blur(flat, torch.tensor([1.5])), flat)


def spoil(name: str, strength: float, frames: Tensor) -> Tensor:
    kind = torch.full((len(frames),), DEGRADATIONS.index(name))
    return degrade(frames, kind, torch.full((len(frames),), strength), generator(1))


def test_degradations_do_what_they_say() -> None:
    clean = render(sample_clips(48, generator()))
    assert torch.equal(spoil("clean", 1.0, clean), clean)
    for strength in (0.0, 1.0):
        torch.testing.assert_close(spoil("washed-out", strength, clean), 0.5 + (clean - 0.5) * (0.60 - 0.25 * strength))
        noise = spoil("noisy", strength, clean) - clean
        unclipped = (clean > 0.45) & (clean < 0.55)  # 2.5 standard deviations from either end
        assert noise[unclipped].std().item() == pytest.approx(0.08 + 0.10 * strength, rel=0.05)
        blurred = spoil("blurred", strength, clean)
        torch.testing.assert_close(blurred, blur(clean, torch.full((48,), 0.9 + 0.9 * strength)))

        gray = torch.full((200, 8, 3, 2, 2), 0.3)
        light = spoil("flickering", strength, gray)
        assert (light == light[..., :1, :1]).all()  # the whole frame at once
        assert (light / 0.3)[:, :, 0, 0, 0].std().item() == pytest.approx(0.20 + 0.15 * strength, rel=0.08)
    for name in DEGRADATIONS:
        out = spoil(name, 1.0, clean)
        assert out.min() >= 0
        assert out.max() <= 1


def test_only_the_clips_chosen_are_spoilt_and_a_seed_fixes_how() -> None:
    clean = render(sample_clips(64, generator()))
    kind, strength = sample_degradation(64, generator(2), share=0.5)
    out, again = (degrade(clean, kind, strength, generator(3)) for _ in range(2))
    assert torch.equal(out, again)
    spoilt = (out != clean).flatten(1).any(1)
    assert torch.equal(spoilt, kind > 0)
    assert not torch.equal(out, degrade(clean, kind, strength, generator(4)))


def test_share_of_degraded_clips() -> None:
    kind, strength = sample_degradation(4000, generator(), share=0.25)
    assert (kind > 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (sample_degradation(100, generator(), share=0.0)[0] == 0).all()
    counts = torch.bincount(sample_degradation(4000, generator(), share=1.0)[0], minlength=5)
    assert counts[0] == 0
    assert counts[1:].min() > 880
    assert 0 <= strength.min() < 0.01 < 0.99 < strength.max() <= 1


# -------------------------------------------------------------------------------------------- captions


def test_every_caption_reads_back_to_its_labels() -> None:
    for subject in SUBJECTS:
        for motion in MOTIONS:
            for index, colour in enumerate(COLOURS):
                labels = Labels(subject, colour, [*BACKGROUNDS][index % len(BACKGROUNDS)], motion)
                for template in range(4):
                    for phrasing in range(3):
                        caption = write_caption(labels, template, phrasing)
                        assert read_caption(caption) == labels, caption


def test_captions_describe_their_clips_in_varied_words() -> None:
    clips = sample_clips(64, generator())
    captions = write_captions(clips, generator(1))
    assert [read_caption(caption) for caption in captions] == labels_of(clips)
    assert captions == write_captions(clips, generator(1))
    assert captions != write_captions(clips, generator(2))


def test_articles() -> None:
    assert write_caption(Labels("star", "red", "navy", "left")) == "a red star moving left on a navy background"
    assert write_caption(Labels("ring", "orange", "black", "up")).startswith("an orange ring")
    assert write_caption(Labels("waves", "blue", "white", "down")).startswith("blue waves")


@pytest.mark.parametrize(
    "caption",
    ["", "a red star on a navy background", "a star moving left on a navy background", "a red star moving left",
     "a red dog moving left on a navy background"],
)  # fmt: skip
def test_an_incomplete_caption_is_not_read(caption: str) -> None:
    assert read_caption(caption) is None


def test_prompt_sets_are_distinct_and_disjoint() -> None:
    wanted: dict[Labels, str] = {}
    for name, subjects in PROMPT_SETS.items():
        prompts = prompt_set(name, 150)
        assert len(set(prompts)) == 150
        assert prompts == prompt_set(name, 150)
        assert prompts != prompt_set(name, 150, seed=1)
        for prompt in prompts:
            labels = read_caption(prompt)
            assert labels is not None
            assert labels.subject in subjects
            assert labels not in wanted
            wanted[labels] = name
    assert sorted(s for subjects in PROMPT_SETS.values() for s in subjects) == sorted(SUBJECTS)


def test_a_prompt_set_knows_its_limits() -> None:
    assert len(set(prompt_set("new_shapes", 480))) == 480  # 2 shapes, 8 colours, 5 backgrounds, 6 motions: all of them
    for count in (0, 481):
        with pytest.raises(ValueError, match="480 prompts"):
            prompt_set("new_shapes", count)
    with pytest.raises(ValueError, match="allowed: in_domain, new_shapes, scenes"):
        prompt_set("unseen", 4)


# ---------------------------------------------------------------------------------------------- oracle


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Batches are too small for threads to pay, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sampled() -> tuple[Clips, Tensor]:
    clips = sample_clips(128, generator(7))
    return clips, render(clips)


@pytest.fixture(scope="module")
def clean_reading(sampled: tuple[Clips, Tensor]) -> oracle.Reading:
    return oracle.read(sampled[1])


def accuracy(reading: oracle.Reading, clips: Clips) -> dict[str, float]:
    pairs = list(zip(reading.labels, labels_of(clips), strict=True))
    return {name: sum(getattr(r, name) == getattr(t, name) for r, t in pairs) / len(pairs) for name in NAMES}


def test_oracle_reads_clean_clips(sampled: tuple[Clips, Tensor], clean_reading: oracle.Reading) -> None:
    assert min(accuracy(clean_reading, sampled[0]).values()) >= 0.98
    assert clean_reading.sharpness_B.mean() > 0.98
    assert clean_reading.fidelity_B.mean() > 0.98
    assert clean_reading.fidelity_B.max() <= 1


def test_oracle_reads_degraded_clips(sampled: tuple[Clips, Tensor]) -> None:
    clips, frames = sampled
    kind, strength = sample_degradation(len(clips), generator(8), share=1.0)
    accuracies = accuracy(oracle.read(degrade(frames, kind, strength, generator(9))), clips)
    assert accuracies["subject"] >= 0.90
    assert min(accuracies[name] for name in ("colour", "background", "motion")) >= 0.93


def test_faults_cost_sharpness_and_fidelity(sampled: tuple[Clips, Tensor], clean_reading: oracle.Reading) -> None:
    frames, clean = sampled[1][:24], clean_reading
    mild, strong = ({n: oracle.read(spoil(n, s, frames)) for n in DEGRADATIONS[1:]} for s in (0.0, 1.0))
    for name in DEGRADATIONS[1:]:
        assert strong[name].fidelity_B.mean() < mild[name].fidelity_B.mean() < clean.fidelity_B[:24].mean() - 0.05
    for name in ("blurred", "washed-out"):
        assert strong[name].sharpness_B.mean() < mild[name].sharpness_B.mean() < clean.sharpness_B[:24].mean() - 0.25
    assert mild["noisy"].sharpness_B.mean() > 0.9  # noise is not softness
    washed = strong["washed-out"].sharpness_B
    torch.testing.assert_close(washed, torch.full_like(washed, 0.35), atol=0.05, rtol=0)  # the contrast that is left


@pytest.mark.parametrize(("frames", "size"), [(16, 32), (4, 32), (8, 64)])
def test_oracle_takes_other_lengths_and_sizes(sampled: tuple[Clips, Tensor], frames: int, size: int) -> None:
    clips = sampled[0][:24]
    reading = oracle.read(render(clips, frames, size))
    assert min(accuracy(reading, clips).values()) >= 0.95
    assert reading.sharpness_B.mean() > 0.95


def test_grade_gives_full_marks_to_what_the_prompt_asks(sampled: tuple[Clips, Tensor]) -> None:
    clips, frames = sampled[0][:32], sampled[1][:32]
    grades = grade(frames, write_captions(clips, generator()))
    assert set(grades) == {*NAMES, "sharpness", "fidelity", "score"}
    assert all(value.shape == (32,) and value.dtype == torch.float32 for value in grades.values())
    assert grades["score"].min() > 0.7
    assert grades["score"].mean() > 0.98


@pytest.mark.parametrize("wrong", NAMES)
def test_a_wrong_caption_is_graded_wrong(sampled: tuple[Clips, Tensor], wrong: str) -> None:
    clips, frames = sampled[0][:16], sampled[1][:16]
    others = {"subject": SHAPES, "colour": (*COLOURS,), "background": (*BACKGROUNDS,), "motion": MOTIONS}[wrong]
    captions = []
    for labels in labels_of(clips):
        other = next(o for o in others if o != getattr(labels, wrong))
        captions.append(write_caption(dataclasses.replace(labels, **{wrong: other})))
    grades = grade(frames, captions)
    for name in NAMES:
        assert grades[name].mean().item() == pytest.approx(0.0 if name == wrong else 1.0)
    torch.testing.assert_close(grades["score"], 0.75 * grades["fidelity"])


def test_a_prompt_from_elsewhere_has_no_grade() -> None:
    clips = Clips.cat([one_clip("heart", "up"), one_clip("heart", "up")])
    grades = grade(render(clips), ["a dog on the beach", "a red heart rising up on a black background"])
    for name in (*NAMES, "score"):
        assert grades[name].isnan().tolist() == [True, False]
    assert grades["score"][1] > 0.95
    assert not grades["fidelity"].isnan().any()
    assert not grades["sharpness"].isnan().any()


def test_empty_and_chaotic_clips_score_low() -> None:
    frames = torch.stack([torch.zeros(8, 3, 32, 32), torch.full((8, 3, 32, 32), 0.5), torch.rand(8, 3, 32, 32)])
    reading = oracle.read(frames)
    assert reading.fidelity_B.isfinite().all()
    assert reading.fidelity_B.max() < 0.45
    assert reading.sharpness_B.max() < 0.5


def test_oracle_refuses_what_is_not_a_clip() -> None:
    frames = render(one_clip("star", "left"))
    for bad in (frames[0], frames[:, :1], frames[:, :, :2], frames[..., :16], frames[:0]):
        with pytest.raises(ValueError, match="expected \\(B, F, 3, H, H\\)"):
            oracle.read(bad)
    with pytest.raises(ValueError, match="NaN"):
        oracle.read(frames * math.nan)
    with pytest.raises(ValueError, match="one for each of 1 clips, got 2"):
        grade(frames, ["a", "b"])
