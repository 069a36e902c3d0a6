"""Pairs of rendered clips for one caption, of which one is better by construction."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlvid.world.captions import write_captions
from rlvid.world.faults import STRUCTURE, TIME, UNSEEN, can_have, spoil, swap_label
from rlvid.world.render import DEGRADATIONS, Clips, degrade, render, sample_clips, sample_degradation

KINDS = ("photometry", "mismatch", "structure", "time")
"""What is wrong with the worse clip: light and sharpness, a word of the caption, the outline, or the motion."""
NEW = "unseen"
"""A further kind, which is drawn where it is named alone: an outline that is wrong as in no other pair."""
ALIKE = "alike"
"""A kind without a better side, also drawn where it is named alone: two clean clips that differ in place and size."""
_FAULTS = {
    "photometry": DEGRADATIONS[1:],
    "mismatch": ("",),
    "structure": STRUCTURE,
    "time": TIME,
    NEW: UNSEEN,
    ALIKE: ("",),
}
_GRADED = (*DEGRADATIONS[1:], "cut", "warped", "jittering", "morphing", "blinking", "doubled")
"""Faults of which the stronger is the worse. The others lead to a whole video of another shape or motion: half way
there is no better than all the way."""
_APART = 0.4
"""Least difference of two strengths of one fault that are compared."""


@dataclass(frozen=True)
class DrawnPairs:
    """B pairs of clips.

    Attributes:
        captions: of each pair.
        better_BFCHW: in [0, 1].
        worse_BFCHW: the same.
        faults: the name of what is wrong with the worse one; empty for a mismatch, and where nothing is wrong.
    """

    captions: list[str]
    better_BFCHW: Tensor
    worse_BFCHW: Tensor
    faults: list[str]


def draw_pairs(
    kind: str,
    count: int,
    generator: torch.Generator,
    *,
    footage: float = 0.0,
    without: tuple[str, ...] = (),
    frames: int = 8,
) -> DrawnPairs:
    """Draws pairs of a kind: a clean clip and one with a fault, or a milder and a stronger fault where it is graded.

    Args:
        kind: one of ``KINDS``, ``NEW`` or ``ALIKE``.
        count: B.
        generator: of all draws.
        footage: share of pairs both sides of which are also blurred, noisy, washed out or flickering, alike.
        without: faults that are left out.
        frames: F.

    Raises:
        ValueError: all faults of the kind are left out.
    """
    names = [fault for fault in _FAULTS[kind] if fault not in without]
    if not names:
        raise ValueError(f"without all of {', '.join(_FAULTS[kind])} no pair of the kind {kind!r} is left")
    fault_B = torch.randint(len(names), (count,), generator=generator)
    clips = Clips.cat([_able(names[number], generator) for number in fault_B.tolist()])
    faults = [names[number] for number in fault_B.tolist()]
    better, worse = render(clips, frames), torch.empty(0)
    if kind == "mismatch":
        worse = render(swap_label(clips, generator), frames)
    elif kind == ALIKE:
        worse = render(_elsewhere(clips, generator), frames)
    else:
        mild_B = torch.rand(count, generator=generator) * (1 - _APART)
        strong_B = mild_B + _APART + torch.rand(count, generator=generator) * (1 - _APART - mild_B)
        graded_B = torch.rand(count, generator=generator) < 0.5
        graded_B &= torch.tensor([fault in _GRADED for fault in faults])
        first = generator.get_state()  # both faults draw the same shape, noise or direction
        worse = _with_faults(clips, better, faults, torch.where(graded_B, strong_B, mild_B), generator, frames)
        again = torch.Generator().set_state(first)
        milder = _with_faults(clips, better, faults, mild_B, again, frames)
        better = torch.where(graded_B[:, None, None, None, None], milder, better)
    kind_B, strength_B = sample_degradation(count, generator, footage)
    first = generator.get_state()
    sides = [degrade(each, kind_B, strength_B, torch.Generator().set_state(first)) for each in (better, worse)]
    return DrawnPairs(write_captions(clips, generator), sides[0], sides[1], faults)


def _able(fault: str, generator: torch.Generator) -> Clips:
    """Returns one clip that can show a fault."""
    while True:
        clip = sample_clips(1, generator)
        if not fault or fault in DEGRADATIONS or bool(can_have(clip, fault)):
            return clip


def _elsewhere(clips: Clips, generator: torch.Generator) -> Clips:
    """Returns clips of the same labels with a place, size and phase of their own."""
    drawn = sample_clips(len(clips), generator)
    return replace(clips, x_B=drawn.x_B, y_B=drawn.y_B, radius_B=drawn.radius_B, phase_B=drawn.phase_B)


def _with_faults(
    clips: Clips, clean_BFCHW: Tensor, faults: list[str], strength_B: Tensor, generator: torch.Generator, frames: int
) -> Tensor:
    found = clean_BFCHW.clone()
    for fault in dict.fromkeys(faults):
        here = torch.tensor([each == fault for each in faults])
        if fault in DEGRADATIONS:
            kind_B = torch.full((int(here.sum()),), DEGRADATIONS.index(fault))
            found[here] = degrade(clean_BFCHW[here], kind_B, strength_B[here], generator)
        else:
            found[here] = spoil(clips[here], fault, strength_B[here], generator, frames)
    return found
