"""The oracle: the labels of clips of the built-in world, read from pixels by matching against the renderer.

Nothing here is learned. A clip of the world mixes two palette colours by a coverage map, so the oracle inverts that:
it finds the coverage that explains each frame (a bank of renderings, then Gauss-Newton), the two colours given the
coverage, and the motion from the fitted placements. Matching ignores brightness and contrast, so labels survive blur,
noise, flicker and washed-out contrast; ``sharpness`` and ``fidelity`` are what these faults cost.

Suffixes: N = B * F frames, T templates, M candidates, P = 32 * 32 pixels. A placement is (x, y, radius) of a shape
or (shift x, shift y, unused) of a pattern, in fractions of the frame.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from rlvid.world import render as world
from rlvid.world.captions import Labels, labels_of

SIZE = 32
"""Pixels at which the oracle looks; other sizes are resampled to it."""

_KINDS = (
    *((shape, True) for shape in world.SHAPES),
    ("stripes", True), ("stripes", False), ("checks", True), ("waves", True), ("waves", False),
)  # fmt: skip
"""Each subject with its orientation (upright or not)."""
_PERIOD = {"stripes": 0.4, "checks": 0.5, "waves": 0.8}
_GROWTH = 0.9  # of the radius, from the first to the last frame of a growing clip
_INK, _GROUND = (torch.tensor(list(palette.values())) for palette in (world.COLOURS, world.BACKGROUNDS))
_FAULT = 0.1  # root mean square error that halves fidelity


@dataclass(frozen=True)
class Reading:
    """The oracle's readings of B clips.

    ``labels`` names subject, colour, background and motion of each clip. ``sharpness_B`` in [0, 1] is the contrast
    across the fitted outline relative to that of the clean palette: 1 when clean, less when blurred or washed out.
    ``fidelity_B`` in (0, 1] is the closeness to the clean rendering of what was read, 1 / (1 + mse / 0.1^2), where
    subject and ground count half each, however small the subject: 1 when identical, less with any fault.
    """

    labels: list[Labels]
    sharpness_B: Tensor
    fidelity_B: Tensor


def _coverage(kind: int, placement_N3: Tensor) -> Tensor:
    """Returns coverage (N, P) of a kind at placements (N, 3)."""
    subject, upright = _KINDS[kind]
    x_N, y_N, radius_N = placement_N3.unbind(-1)
    if subject in world.SHAPES:
        return world.shape_coverage(subject, x_N, y_N, radius_N, SIZE).flatten(1)
    return world.pattern_coverage(subject, x_N, y_N, torch.full(x_N.shape, upright), SIZE).flatten(1)


def _placements(kind: int) -> Tensor:
    """Returns the placements (T, 3) that the bank tries for a kind."""
    subject, upright = _KINDS[kind]
    if subject in world.SHAPES:
        offset_T2 = torch.cartesian_prod(torch.arange(-9, 10) / SIZE, torch.arange(-9, 10) / SIZE)
        near_T2 = offset_T2.abs() < 0.1
        # Only subjects of ordinary size travel: far placements (a plus sign) need no other radius.
        radii = torch.logspace(math.log10(0.105), math.log10(0.39), 9).tolist()
        chosen = [near_T2.any(1) if 0.16 < radius < 0.30 else near_T2.all(1) for radius in radii]
        return torch.cat([F.pad(0.5 + offset_T2[c], (0, 1), value=r) for c, r in zip(chosen, radii, strict=True)])
    shift, still = torch.arange(0.0, _PERIOD[subject] - 1e-6, 0.5 / SIZE), torch.zeros(1)
    x, y = (shift, shift) if subject == "checks" else (shift, still) if upright else (still, shift)
    return F.pad(torch.cartesian_prod(x, y), (0, 1), value=0.5)


@cache
def _bank() -> tuple[Tensor, Tensor, list[int]]:
    """Returns all templates: coverages (T, P) with zero mean and unit norm, placements (T, 3), and T of each kind.

    Each comes sharp and blurred: a blurred ring is nearer to a sharp disc than to a sharp ring.
    """
    coverages, placements = [], []
    for kind in range(len(_KINDS)):
        placement_T3 = _placements(kind)
        sharp_TP = _coverage(kind, placement_T3)
        blurred_1T1HW = world.blur(sharp_TP.view(1, -1, 1, SIZE, SIZE), torch.tensor([1.3]))
        coverages += [sharp_TP, blurred_1T1HW.view_as(sharp_TP)]
        placements.append(placement_T3.repeat(2, 1))
    coverage_TP = torch.cat(coverages)
    coverage_TP = F.normalize(coverage_TP - coverage_TP.mean(1, keepdim=True), dim=1)
    return coverage_TP, torch.cat(placements), [len(p) for p in placements]


def _relief(frames_BFCHW: Tensor) -> Tensor:
    """Returns each frame's component (B, F, P) along the clip's main colour axis: mean zero, ground below zero."""
    pixels_BFCP = frames_BFCHW.flatten(3) - frames_BFCHW.flatten(3).mean(3, keepdim=True)
    axis_BC = torch.linalg.eigh((pixels_BFCP @ pixels_BFCP.mT).sum(1))[1][..., -1]
    relief_BFP = torch.einsum("bfcp,bc->bfp", pixels_BFCP, axis_BC)
    inside_P = F.pad(torch.ones(SIZE - 2, SIZE - 2), (1, 1, 1, 1)).flatten()  # ground is what the border shows
    return relief_BFP * torch.where((relief_BFP @ inside_P).sum(1) < 0, -1.0, 1.0)[:, None, None]


def _match(relief_BFP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matches every frame with the bank by normalised cross-correlation.

    Returns:
        The clip's kind (B,), the placement in each frame (B, F, 3), and each frame's share (B, F), which sums to 1,
        of the contrast that the match explains: dark or confused frames weigh little.
    """
    bank_TP, placement_T3, counts = _bank()
    best, where = [], []
    for relief_NP in F.normalize(relief_BFP, dim=2).flatten(0, 1).split(256):
        values, indices = zip(*(part.max(1) for part in (relief_NP @ bank_TP.T).split(counts, dim=1)), strict=True)
        best.append(torch.stack(values, dim=1))
        where.append(torch.stack(indices, dim=1))
    best_BFK, where_BFK = (torch.cat(each).unflatten(0, relief_BFP.shape[:2]) for each in (best, where))
    explained_BFK = relief_BFP.square().sum(2, keepdim=True) * best_BFK.clamp(min=0).square() + 1e-6
    kind_B = explained_BFK.sum(1).argmax(1)
    chosen_BF1 = kind_B[:, None, None].expand(-1, relief_BFP.shape[1], 1)
    index_BF = (where_BFK + torch.tensor([0, *counts[:-1]]).cumsum(0)).gather(2, chosen_BF1)[..., 0]
    return kind_B, placement_T3[index_BF], F.normalize(explained_BFK.gather(2, chosen_BF1)[..., 0], p=1, dim=1)


def _refine(relief_BFP: Tensor, kind: int, placement_BF3: Tensor) -> Tensor:
    """Gauss-Newton on the placement: relief = a + b * coverage(placement), with a and b free in every frame."""
    delta, reach = 0.1 / SIZE, 1.5 / SIZE
    relief_NP1 = relief_BFP.flatten(0, 1)[:, :, None]
    placement_N3 = start_N3 = placement_BF3.flatten(0, 1)
    for _ in range(5):
        coverage_NP = _coverage(kind, placement_N3)
        slopes = [(_coverage(kind, placement_N3 + delta * e) - coverage_NP) / delta for e in torch.eye(3)]
        basis_NP5 = torch.stack([torch.ones_like(coverage_NP), coverage_NP, *slopes], dim=2)
        gram_N55 = basis_NP5.mT @ basis_NP5 + 1e-3 * torch.eye(5)
        fit_N5 = torch.linalg.solve(gram_N55, basis_NP5.mT @ relief_NP1)[..., 0]
        step_N3 = fit_N5[:, 2:] / fit_N5[:, 1:2].clamp(min=1e-3)
        placement_N3 = placement_N3 + step_N3.clamp(-0.5 / SIZE, 0.5 / SIZE)
        placement_N3 = start_N3 + (placement_N3 - start_N3).clamp(-reach, reach)
    return placement_N3.view_as(placement_BF3)


def _palette_costs(seen_BF6: Tensor) -> Tensor:
    """Squared distance (B, 40) of the seen colours to each pair of the palette (colour * 5 + background).

    Each pair is tried under two accounts, and the cheaper counts: one contrast for the clip (washed out), or one
    brightness a frame (flicker). Their priors keep gray from being explained as dim white.
    """
    pair_M6 = torch.cat([_INK.repeat_interleave(len(_GROUND), 0), _GROUND.repeat(len(_INK), 1)], dim=1)

    def distance(candidate_MG6: Tensor) -> Tensor:
        return torch.cdist(seen_BF6, candidate_MG6.flatten(0, 1)).square().unflatten(2, candidate_MG6.shape[:2])

    contrast_G = torch.linspace(0.30, 1.0, 15)
    washed_BMG = distance(0.5 + (pair_M6[:, None] - 0.5) * contrast_G[:, None]).mean(1) + 0.002 * (1 - contrast_G)
    light_G = torch.linspace(0.1, 2.2, 43)
    lit_BFMG = distance((pair_M6[:, None] * light_G[:, None]).clamp(max=1)) + 0.03 * (light_G - 1).square()
    return torch.minimum(washed_BMG.amin(2), lit_BFMG.amin(3).mean(1))


def _paint(frames_BFCHW: Tensor, kind: int, placement_BF3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Palette pair (B,) of clips of one kind, their coverage (B, F, P), and their placement.

    The two colours of a frame are its least-squares mixture by the coverage. A pattern is its own negative half a
    period away, so which of its colours is the ground, only the palette tells.
    """
    subject, upright = _KINDS[kind]
    coverage_BFP = _coverage(kind, placement_BF3.flatten(0, 1)).unflatten(0, placement_BF3.shape[:2])
    basis_BFP2 = torch.stack([coverage_BFP, 1 - coverage_BFP], dim=3)
    moment_BF2C = basis_BFP2.mT @ frames_BFCHW.flatten(3).transpose(2, 3)
    seen_BF6 = torch.linalg.solve(basis_BFP2.mT @ basis_BFP2 + 1e-3 * torch.eye(2), moment_BF2C).flatten(2)
    cost_B, pair_B = _palette_costs(seen_BF6).min(1)
    if subject in world.SHAPES:
        return pair_B, coverage_BFP, placement_BF3
    other_cost_B, other_pair_B = _palette_costs(seen_BF6.roll(3, dims=2)).min(1)
    swap_B = other_cost_B < cost_B
    half_3 = torch.tensor([upright, not upright, False]) * (_PERIOD[subject] / 2)
    placement_BF3 = placement_BF3 + swap_B[:, None, None] * half_3
    coverage_BFP = torch.where(swap_B[:, None, None], 1 - coverage_BFP, coverage_BFP)
    return torch.where(swap_B, other_pair_B, pair_B), coverage_BFP, placement_BF3


def _track_shape(_kind: int, placement_BF3: Tensor, share_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Fits the motion (B,) to the slopes of x, y and log radius over time; also (x, y, radius, 0) at half time."""
    time_F1, share_BF1 = torch.linspace(-0.5, 0.5, share_BF.shape[1])[:, None], share_BF[..., None]
    value_BF3 = torch.cat([placement_BF3[..., :2], placement_BF3[..., 2:].log()], dim=2)
    late_BF1 = time_F1 - (share_BF1 * time_F1).sum(1, keepdim=True)
    slope_B3 = (share_BF1 * late_BF1 * value_BF3).sum(1) / (share_BF1 * late_BF1.square()).sum(1).clamp(min=1e-8)
    growing = world.MOTIONS.index("growing")
    target_M3 = F.pad(world._DIRECTION, (0, 1))
    target_M3[growing, 2] = 1.0
    unit_3 = torch.tensor([world.TRAVEL, world.TRAVEL, math.log((2 + _GROWTH) / (2 - _GROWTH))])
    motion_B = torch.cdist(slope_B3 / unit_3, target_M3).argmin(1)
    centre_BF2 = placement_BF3[..., :2] - world.TRAVEL * world._DIRECTION[motion_B][:, None] * time_F1
    radius_BF1 = placement_BF3[..., 2:] / (1 + _GROWTH * (motion_B == growing)[:, None, None] * time_F1)
    return motion_B, F.pad((share_BF1 * torch.cat([centre_BF2, radius_BF1], dim=2)).sum(1), (0, 1))


def _track_pattern(kind: int, placement_BF3: Tensor, share_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Returns motion (B,) that best aligns the shifts, and (x, y, radius, phase) as ``Clips`` has them.

    Sum and difference of the two shifts are periodic for all three patterns (checks repeat along the diagonals), so
    alignment is measured on the circle: |sum_f share_f exp(2 pi i (shift_f - travel_m t_f) / period)|.
    """
    subject, upright = _KINDS[kind]
    time_F1 = torch.linspace(-0.5, 0.5, share_BF.shape[1])[:, None]
    diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    travel_MF2 = world.TRAVEL * (world._DIRECTION[:5] @ diagonal)[:, None] * time_F1
    turn_BMF2 = ((placement_BF3[..., :2] @ diagonal)[:, None] - travel_MF2) / _PERIOD[subject]
    aligned_BM2 = (share_BF[:, None, :, None] * torch.exp(2j * math.pi * turn_BMF2)).sum(2)
    motion_B = aligned_BM2.abs().sum(2).argmax(1)
    turn_B2 = aligned_BM2[torch.arange(len(motion_B)), motion_B].angle() / (2 * math.pi)
    shift_B2 = turn_B2 * _PERIOD[subject] @ diagonal / 2
    phase = 0.25 if upright else 0.75  # render() reads the orientation from the phase, and shifts by 0.4 of it
    return motion_B, torch.cat([shift_B2 - 0.4 * phase, torch.tensor([0.2, phase]).expand(len(shift_B2), 2)], dim=1)


def _sharpness(frames_BFCHW: Tensor, coverage_BFP: Tensor, ink_B3: Tensor, ground_B3: Tensor) -> Tensor:
    """Slope of the clip along the slope of its fitted coverage, in units of the palette's contrast: (B,)."""
    axis_B3 = (ink_B3 - ground_B3) / (ink_B3 - ground_B3).square().sum(1, keepdim=True)
    seen_BFHW = torch.einsum("bfchw,bc->bfhw", frames_BFCHW, axis_B3)
    fitted_BFHW = coverage_BFP.view_as(seen_BFHW)
    slopes = [(fitted_BFHW.diff(dim=d).flatten(1), seen_BFHW.diff(dim=d).flatten(1)) for d in (2, 3)]
    along_B = torch.stack([(fitted * seen).sum(1) for fitted, seen in slopes]).sum(0)
    whole_B = torch.stack([fitted.square().sum(1) for fitted, _ in slopes]).sum(0)
    return (along_B / whole_B.clamp(min=1e-8)).clamp(0, 1)


def _prepare(frames_BFCHW: Tensor) -> Tensor:
    """Checks the frames and brings them to SIZE pixels, float32 on the CPU, in [0, 1]."""
    shape = tuple(frames_BFCHW.shape)
    if len(shape) != 5 or shape[0] < 1 or shape[1] < 2 or shape[2] != 3 or shape[3] != shape[4]:
        raise ValueError(f"frames: expected (B, F, 3, H, H) with B >= 1 and F >= 2, got {shape}")
    frames = frames_BFCHW.detach().to("cpu", torch.float32)
    if not frames.isfinite().all():
        raise ValueError("frames: expected numbers in [0, 1], got NaN or infinity")
    if shape[3] != SIZE:
        mode = "area" if shape[3] > SIZE else "bilinear"
        frames = F.interpolate(frames.flatten(0, 1), SIZE, mode=mode).unflatten(0, shape[:2])
    return frames.clamp(0, 1)


@torch.no_grad()
def read(frames_BFCHW: Tensor) -> Reading:
    """Reads B clips from their pixels alone.

    Args:
        frames_BFCHW: float, in [0, 1] (clamped to it); any H = W, looked at in 32 pixels. F is at least 2; the motion
            of patterns needs 4, for with fewer they travel half a period or more between frames.

    Returns:
        The reading, on the CPU.

    Raises:
        ValueError: wrong shape, or a number that is not finite.
    """
    frames_BFCHW = _prepare(frames_BFCHW)
    relief_BFP = _relief(frames_BFCHW)
    kind_B, placement_BF3, share_BF = _match(relief_BFP)
    coverage_BFP = torch.empty_like(relief_BFP)
    motion_B, pair_B, place_B4 = torch.zeros_like(kind_B), torch.zeros_like(kind_B), torch.zeros(len(kind_B), 4)
    for kind in kind_B.unique().tolist():
        here = kind_B == kind
        placement_bF3 = _refine(relief_BFP[here], kind, placement_BF3[here])
        pair_B[here], coverage_BFP[here], placement_bF3 = _paint(frames_BFCHW[here], kind, placement_bF3)
        track = _track_shape if _KINDS[kind][0] in world.SHAPES else _track_pattern
        motion_B[here], place_B4[here] = track(kind, placement_bF3, share_BF[here])
    subject_B = torch.tensor([world.SUBJECTS.index(subject) for subject, _ in _KINDS])[kind_B]
    colour_B, background_B = pair_B // len(_GROUND), pair_B % len(_GROUND)
    clips = world.Clips(subject_B, colour_B, background_B, motion_B, *place_B4.unbind(1))
    error_BFP = (frames_BFCHW - world.render(clips, frames_BFCHW.shape[1], SIZE)).square().mean(2).flatten(2)
    halves = [(error_BFP * w).sum((1, 2)) / w.sum((1, 2)).clamp(min=1e-3) for w in (coverage_BFP, 1 - coverage_BFP)]
    sharpness_B = _sharpness(frames_BFCHW, coverage_BFP, _INK[colour_B], _GROUND[background_B])
    return Reading(labels_of(clips), sharpness_B, 1 / (1 + (halves[0] + halves[1]) / 2 / _FAULT**2))
