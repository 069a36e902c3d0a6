"""Graded faults of rendered clips: of structure, of time, and of what the caption says.

Models show such faults, and the photometric ones of ``rlvid.world.render.degrade`` are not among them: a shape that is
half another one, or rounded, cut or warped; a subject that stands still, shakes, goes elsewhere, changes its shape or
flickers; a second, fainter subject beside the first. Each has a strength in [0, 1], and a stronger one is the worse
video.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rlvid.world.render import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PATTERNS,
    SHAPES,
    SUBJECTS,
    Clips,
    cover,
    distance,
    paint,
    place,
    shape_points,
)

STRUCTURE = ("blended", "rounded", "cut", "warped")
TIME = ("frozen", "jittering", "turned", "morphing", "blinking")
UNSEEN = ("doubled",)
"""No votes are given on it, so that a reward can be asked about what it was not fitted on."""
FAULTS = STRUCTURE + TIME + UNSEEN
_STILL, _CIRCLE = MOTIONS.index("still"), SUBJECTS.index("circle")
_SIZE = 32


def spoil(clips: Clips, fault: str, strength_B: Tensor, generator: torch.Generator, frames: int = 8) -> Tensor:
    """Renders clips with a fault.

    Args:
        clips: B descriptions.
        fault: one of ``FAULTS``; see ``can_have`` for those that a clip can show.
        strength_B: in [0, 1]; 0 is a mild fault and 1 a strong one.
        generator: of what the fault draws, such as the other shape.
        frames: F.

    Returns:
        frames_BFCHW in [0, 1], 32 x 32.

    Raises:
        ValueError: no such fault.
    """
    at = x_BF, y_BF, radius_BF = place(clips, frames)
    strength_B1 = strength_B[:, None]
    if fault in (*STRUCTURE, "morphing"):
        return paint(clips, _misshapen(clips, fault, strength_B, generator, at))
    if fault == "blinking":
        light_BF = 1 - (0.4 + 0.6 * strength_B1) * torch.rand(x_BF.shape, generator=generator)
        return paint(clips, cover(clips, *at, _SIZE) * light_BF[..., None, None])
    if fault == "jittering":
        shake_2BF = (0.03 + 0.05 * strength_B1) * torch.randn(2, *x_BF.shape, generator=generator)
        return paint(clips, cover(clips, x_BF + shake_2BF[0], y_BF + shake_2BF[1], radius_BF, _SIZE))
    if fault == "doubled":
        angle_B = 2 * math.pi * torch.rand(len(clips), 1, generator=generator)
        aside = x_BF + 1.2 * radius_BF * torch.cos(angle_B), y_BF + 1.2 * radius_BF * torch.sin(angle_B), radius_BF
        faint_B = 0.4 + 0.6 * strength_B[:, None, None, None]
        return paint(clips, torch.maximum(cover(clips, *at, _SIZE), faint_B * cover(clips, *aside, _SIZE)))
    if fault == "frozen":
        wrong = [each_BF.mean(1, keepdim=True).expand_as(each_BF) for each_BF in at]
    elif fault == "turned":
        wrong = list(place(turn(clips, generator), frames))
    else:
        raise ValueError(f"fault {fault!r}: allowed: {', '.join(FAULTS)}")
    share_B1 = 0.5 + 0.5 * strength_B1
    x_BF, y_BF, radius_BF = (r.lerp(w, share_B1) for r, w in zip(at, wrong, strict=True))
    return paint(clips, cover(clips, x_BF, y_BF, radius_BF, _SIZE))


def can_have(clips: Clips, fault: str) -> Tensor:
    """Returns which clips can show a fault, (B,): a pattern has no outline to cut, and what is still cannot freeze."""
    shape_B = clips.subject_B < len(SHAPES)
    if fault == "frozen":
        return clips.motion_B != _STILL
    if fault == "rounded":
        return shape_B & (clips.subject_B != _CIRCLE)
    if fault == "turned":  # a pattern that moves along its bands looks as if it stood still
        return shape_B | (clips.motion_B != _STILL)
    if fault in ("cut", "morphing", "doubled"):
        return shape_B
    return torch.ones_like(shape_B)


def turn(clips: Clips, generator: torch.Generator) -> Clips:
    """Gives clips another motion."""
    count_B = torch.where(clips.subject_B < len(SHAPES), len(MOTIONS), len(MOTIONS) - 1)  # patterns never grow
    step_B = 1 + (torch.rand(len(clips), generator=generator) * (count_B - 1)).long()
    return replace(clips, motion_B=(clips.motion_B + step_B) % count_B)


def swap_label(clips: Clips, generator: torch.Generator) -> Clips:
    """Exchanges the subject, the colour or the background of clips: one word of their captions is wrong of them."""
    which_B = torch.randint(3, (len(clips),), generator=generator)

    def other(labels_B: Tensor, count: int, number: int) -> Tensor:
        step_B = torch.randint(1, count, (len(clips),), generator=generator)
        return torch.where(which_B == number, (labels_B + step_B) % count, labels_B)

    subject_B = other(clips.subject_B, len(SUBJECTS), 0)
    grows_B = (subject_B >= len(SHAPES)) & (clips.motion_B == MOTIONS.index("growing"))  # patterns never grow
    return replace(
        clips, subject_B=subject_B, colour_B=other(clips.colour_B, len(COLOURS), 1),
        background_B=other(clips.background_B, len(BACKGROUNDS), 2),
        motion_B=torch.where(grows_B, _STILL, clips.motion_B),
    )  # fmt: skip


def _misshapen(
    clips: Clips, fault: str, strength_B: Tensor, generator: torch.Generator, at: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Returns the coverage (B, F, H, W) of subjects whose outline is wrong."""
    other_B = _other_subject(clips, generator)
    angle_B, phase_B = (2 * math.pi * torch.rand(len(clips), generator=generator) for _ in range(2))
    found = cover(clips, *at, _SIZE)
    for index in range(len(clips)):
        one, strength = slice(index, index + 1), float(strength_B[index])
        x_F, y_F, radius_F = (each_BF[index] for each_BF in at)
        if clips.subject_B[index] >= len(SHAPES):
            found[index] = _wrong_pattern(clips[one], fault, strength, other_B[one], found[index], phase_B[index])
            continue
        u_FHW, v_FHW = shape_points(x_F, y_F, radius_F, _SIZE)
        subject = SUBJECTS[int(clips.subject_B[index])]
        if fault == "warped":
            swing = 0.12 + 0.28 * strength
            u_FHW, v_FHW = (
                u_FHW + swing * torch.sin(3.2 * v_FHW + phase_B[index]),
                v_FHW + swing * torch.sin(3.2 * u_FHW + angle_B[index]),
            )
        gap_FHW = distance(subject, u_FHW, v_FHW)
        if fault in ("blended", "morphing"):
            wrong_FHW = distance(SUBJECTS[int(other_B[index])], u_FHW, v_FHW)
            share = 0.45 + 0.35 * strength
            ramp_F = torch.linspace(0, 1, len(x_F)) if fault == "morphing" else torch.ones(len(x_F))
            gap_FHW = gap_FHW.lerp(wrong_FHW, (share * ramp_F)[:, None, None])
        elif fault == "cut":
            across_FHW = u_FHW * torch.cos(angle_B[index]) + v_FHW * torch.sin(angle_B[index])
            gap_FHW = torch.maximum(gap_FHW, across_FHW - (0.55 - 0.6 * strength))
        elif fault == "rounded":
            round_FHW = torch.hypot(u_FHW, v_FHW) - 0.8
            gap_FHW = gap_FHW.lerp(round_FHW, 0.35 + 0.5 * strength)
        found[index] = (0.5 - gap_FHW * radius_F[:, None, None] * _SIZE).clamp(0, 1)
    return found


def _other_subject(clips: Clips, generator: torch.Generator) -> Tensor:
    """Returns another subject of the same family for each clip; half a ring is a circle, so it is none for a circle."""
    shape_B = clips.subject_B < len(SHAPES)
    first_B, count_B = torch.where(shape_B, 0, len(SHAPES)), torch.where(shape_B, len(SHAPES), len(PATTERNS))
    step_B = 1 + (torch.rand(len(clips), generator=generator) * (count_B - 1)).long()
    other_B = first_B + (clips.subject_B - first_B + step_B) % count_B
    hidden_B = (clips.subject_B == _CIRCLE) & (other_B == SUBJECTS.index("ring"))
    return torch.where(hidden_B, SUBJECTS.index("square"), other_B)


def _wrong_pattern(
    clip: Clips, fault: str, strength: float, other_1: Tensor, alpha_FHW: Tensor, phase: Tensor
) -> Tensor:
    """Returns the coverage of a pattern that is half another one, or whose bands are bent."""
    if fault == "blended":
        at = place(clip, len(alpha_FHW))
        return alpha_FHW.lerp(cover(replace(clip, subject_B=other_1), *at, _SIZE)[0], 0.25 + 0.5 * strength)
    grid = (torch.arange(_SIZE) + 0.5) / _SIZE * 2 - 1
    v_HW, u_HW = torch.meshgrid(grid, grid, indexing="ij")
    swing = 0.12 + 0.28 * strength
    bent = torch.stack([u_HW + swing * torch.sin(4 * v_HW + phase), v_HW + swing * torch.sin(4 * u_HW + phase)], 2)
    where = bent.expand(len(alpha_FHW), -1, -1, -1)
    return F.grid_sample(alpha_FHW[:, None], where, padding_mode="reflection", align_corners=False)[:, 0]
