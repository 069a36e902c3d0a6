"""Graded faults of rendered clips: each is there, is where it must be, and is worse for the oracle too."""

from dataclasses import replace

import pytest
import torch

from rlvid.world.captions import labels_of, read_caption
from rlvid.world.faults import FAULTS, STRUCTURE, TIME, UNSEEN, can_have, spoil, swap_label, turn
from rlvid.world.grade import grade
from rlvid.world.pairs import ALIKE, KINDS, NEW, draw_pairs
from rlvid.world.render import MOTIONS, SHAPES, Clips, place, render, sample_clips


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def able(fault: str, count: int) -> Clips:
    clips = sample_clips(8 * count, generator(5))
    return clips[can_have(clips, fault).nonzero().flatten()[:count]]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_a_video_and_more_of_it_changes_more(fault: str) -> None:
    clips = able(fault, 12)
    clean = render(clips)
    mild, strong = (spoil(clips, fault, torch.full((12,), strength), generator(1)) for strength in (0.0, 1.0))
    near, far = ((each - clean).square().mean((1, 2, 3, 4)) for each in (mild, strong))
    assert mild.shape == clean.shape
    assert 0 <= float(mild.min()) <= float(mild.max()) <= 1
    assert (near > 1e-4).all(), near
    assert float((far > near).float().mean()) > 0.7
    again = spoil(clips, fault, torch.ones(12), generator(1))
    assert torch.equal(strong, again), "drawn from the generator alone"


@pytest.mark.parametrize("fault", [*STRUCTURE, *UNSEEN])
def test_a_fault_of_structure_leaves_the_motion_alone(fault: str) -> None:
    clips = able(fault, 8)
    frozen = replace(clips, motion_B=torch.full_like(clips.motion_B, MOTIONS.index("still")))
    frames = spoil(frozen, fault, torch.ones(8), generator(2))
    assert torch.allclose(frames, frames[:, :1].expand_as(frames), atol=1e-5)


def test_a_frozen_video_stands_still_and_a_jittering_one_shakes() -> None:
    clips = able("frozen", 6)
    still = spoil(clips, "frozen", torch.ones(6), generator(3))
    assert torch.allclose(still, still[:, :1].expand_as(still), atol=1e-5)
    fast = spoil(clips, "jittering", torch.ones(6), generator(3))
    change = (fast.diff(dim=1).abs().mean((1, 2, 3, 4)), render(clips).diff(dim=1).abs().mean((1, 2, 3, 4)))
    assert (change[0] > change[1]).all()


def test_a_turned_subject_goes_elsewhere_and_a_swapped_label_is_one_word() -> None:
    clips = sample_clips(60, generator(4))
    turned, swapped = turn(clips, generator(4)), swap_label(clips, generator(4))
    assert (turned.motion_B != clips.motion_B).all()
    patterns = clips.subject_B >= len(SHAPES)
    assert (turned.motion_B[patterns] != MOTIONS.index("growing")).all()
    for before, after in zip(labels_of(clips), labels_of(swapped), strict=True):
        differ = [getattr(before, n) != getattr(after, n) for n in ("subject", "colour", "background")]
        assert sum(differ) == 1
    x, _, _ = place(turned, 8)
    assert x.shape == (60, 8)


@pytest.mark.parametrize("kind", [*KINDS, NEW])
def test_the_oracle_prefers_the_better_side(kind: str) -> None:
    pairs = draw_pairs(kind, 40, generator(6))
    assert all(read_caption(caption) is not None for caption in pairs.captions)
    better, worse = (grade(each, pairs.captions)["score"] for each in (pairs.better_BFCHW, pairs.worse_BFCHW))
    assert float((better > worse).float().mean()) >= 0.95
    assert not {*pairs.faults} & {"cut"} or kind == "structure"


def test_of_two_clips_that_are_alike_neither_is_better() -> None:
    pairs = draw_pairs(ALIKE, 40, generator(9))
    assert {*pairs.faults} == {""}
    change_B = (pairs.better_BFCHW - pairs.worse_BFCHW).abs().mean((1, 2, 3, 4))
    assert float((change_B > 0.005).float().mean()) > 0.7, "they differ, unless a small subject hardly moves"
    sides = [grade(each, pairs.captions) for each in (pairs.better_BFCHW, pairs.worse_BFCHW)]
    for name in ("subject", "colour", "background", "motion"):
        assert all(float(side[name].mean()) >= 0.95 for side in sides), name


def test_faults_can_be_left_out_and_both_sides_can_be_of_low_quality() -> None:
    pairs = draw_pairs("structure", 30, generator(7), without=("cut", "warped"))
    assert {*pairs.faults} == {"blended", "rounded"}
    clean, poor = (draw_pairs("time", 20, generator(8), footage=share) for share in (0.0, 1.0))
    assert clean.faults == poor.faults
    assert {*clean.faults} <= {*TIME}
    assert all(float((a - b).abs().mean()) > 0.005 for a, b in zip(clean.better_BFCHW, poor.better_BFCHW, strict=True))
    with pytest.raises(ValueError, match="fault 'melted': allowed: blended"):
        spoil(able("frozen", 1), "melted", torch.ones(1), generator())
