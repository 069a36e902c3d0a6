"""Renderer of the built-in world: coloured shapes and patterns that move on a plain background.

Every clip is described by four labels (subject, colour, background, motion) and four numbers (where,
how large, which phase). Shapes are signed distance functions, so edges are anti-aliased analytically:
coverage = clamp(1/2 - distance in pixels, 0, 1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
PATTERNS = ("stripes", "checks", "waves")
SUBJECTS = SHAPES + PATTERNS
COLOURS = {
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.12, 0.70, 0.22),
    "cyan": (0.10, 0.82, 0.90),
    "blue": (0.15, 0.32, 0.98),
    "purple": (0.58, 0.18, 0.80),
    "pink": (1.00, 0.55, 0.78),
}
BACKGROUNDS = {
    "black": (0.02, 0.02, 0.02),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.50, 0.50, 0.50),
    "navy": (0.04, 0.07, 0.35),
    "brown": (0.36, 0.21, 0.09),
}
MOTIONS = ("left", "right", "up", "down", "still", "growing")
DEGRADATIONS = ("clean", "blurred", "noisy", "washed-out", "flickering")

RENDERER = 2
"""Raised when the same seed draws other clips, so that encoded ones are not taken for them."""

TRAVEL = 0.40
"""Distance a moving subject covers during a clip, in fractions of the frame's width."""

_DIRECTION = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])


@dataclass(frozen=True)
class Clips:
    """A batch of B clip descriptions; labels index the tuples above, floats are fractions of the frame.

    ``subject_B, colour_B, background_B, motion_B`` are int64; ``x_B, y_B`` (centre at half time, in
    [0, 1], y grows downwards), ``radius_B`` and ``phase_B`` (patterns only, in periods) are float32.
    """

    subject_B: Tensor
    colour_B: Tensor
    background_B: Tensor
    motion_B: Tensor
    x_B: Tensor
    y_B: Tensor
    radius_B: Tensor
    phase_B: Tensor

    def __len__(self) -> int:
        return len(self.subject_B)

    def __getitem__(self, index: Tensor | slice) -> "Clips":
        return Clips(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def cat(parts: list["Clips"]) -> "Clips":
        """Joins batches in order."""
        return Clips(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Clips)})


def sample_clips(count: int, generator: torch.Generator, subjects: tuple[str, ...] = SUBJECTS) -> Clips:
    """Draws ``count`` clips with uniform labels and jittered placement; patterns never grow."""

    def integer(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    subject_B = torch.tensor([SUBJECTS.index(s) for s in subjects])[integer(len(subjects))]
    pattern_B = subject_B >= len(SHAPES)
    motion_B = torch.where(pattern_B, integer(5), integer(6))
    colour_B, background_B = integer(len(COLOURS)), integer(len(BACKGROUNDS))
    return Clips(
        subject_B, colour_B, background_B, motion_B,
        uniform(0.43, 0.57), uniform(0.43, 0.57), uniform(0.20, 0.26), uniform(0.0, 1.0),
    )  # fmt: skip


def distance(subject: str, u: Tensor, v: Tensor) -> Tensor:
    """Returns the signed distance of points (u right, v up, in radii) to a shape's outline, negative inside."""
    r = torch.hypot(u, v)
    if subject == "circle":
        return r - 0.95
    if subject == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.85
    if subject == "triangle":
        slanted = u.abs() * math.cos(math.pi / 6) + v * math.sin(math.pi / 6)
        return torch.maximum(slanted, -v) - 0.55
    if subject == "star":
        sector = 2 * math.pi / 5
        angle = torch.remainder(torch.atan2(u, v) + sector / 2, sector) - sector / 2
        along, across = r * torch.cos(angle), r * torch.sin(angle).abs()
        inner_along, inner_across = 0.45 * math.cos(sector / 2), 0.45 * math.sin(sector / 2)
        length = math.hypot(1.1 - inner_along, inner_across)
        return ((along - 1.1) * inner_across + across * (1.1 - inner_along)) / length
    if subject == "ring":
        return (r - 0.72).abs() - 0.24
    if subject == "cross":
        long, short = 0.98, 0.33
        upright = torch.maximum(u.abs() - short, v.abs() - long)
        return torch.minimum(upright, torch.maximum(u.abs() - long, v.abs() - short))
    if subject == "heart":
        half = 0.78
        w = v + 0.22
        lobe = torch.hypot(u.abs() - half / 2, w - half / 2) - half / math.sqrt(2)
        return torch.minimum((u.abs() + w.abs() - half) / math.sqrt(2), lobe)
    if subject == "moon":
        return torch.maximum(r - 0.98, 0.80 - torch.hypot(u - 0.55, v - 0.25))
    raise ValueError(f"subject {subject!r}: no such shape; allowed: {', '.join(SHAPES)}")


def shape_coverage(subject: str, x: Tensor, y: Tensor, radius: Tensor, size: int) -> Tensor:
    """Returns the coverage in [0, 1] of a shape at centres x, y with a radius, N fractions each: (N, size, size)."""
    u, v = shape_points(x, y, radius, size)
    return (0.5 - distance(subject, u, v) * radius[..., None, None] * size).clamp(0, 1)


def shape_points(x: Tensor, y: Tensor, radius: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns the pixels' places u (right) and v (up) from a shape's centre, in radii: (N, size, size) each."""
    grid = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) / size
    u = (grid[None, :] - x[..., None, None]) / radius[..., None, None]
    v = (y[..., None, None] - grid[:, None]) / radius[..., None, None]
    u, v = torch.broadcast_tensors(u, v)
    return u, v


def pattern_coverage(subject: str, shift_x: Tensor, shift_y: Tensor, upright: Tensor, size: int) -> Tensor:
    """Returns coverage of a full-frame pattern shifted by fractions of the frame; ``upright`` picks vertical bands."""
    grid = (torch.arange(size, device=shift_x.device, dtype=shift_x.dtype) + 0.5) / size
    across = grid[None, :] - shift_x[..., None, None]
    down = grid[:, None] - shift_y[..., None, None]
    across, down = torch.broadcast_tensors(across, down)
    if subject == "checks":
        period, sharp = 0.5, 0.5 * size / math.pi
        wave = torch.sin(2 * math.pi * across / period) * torch.sin(2 * math.pi * down / period)
        return (0.5 + wave * sharp / 2).clamp(0, 1)
    position = torch.where(upright[..., None, None], across, down)
    if subject == "stripes":
        period = 0.4
        return (0.5 + torch.sin(2 * math.pi * position / period) * period * size / (2 * math.pi)).clamp(0, 1)
    if subject == "waves":
        return 0.5 + 0.5 * torch.sin(2 * math.pi * position / 0.8)
    raise ValueError(f"subject {subject!r}: no such pattern; allowed: {', '.join(PATTERNS)}")


def render(clips: Clips, frames: int = 8, size: int = 32) -> Tensor:
    """Renders clean clips.

    Args:
        clips: B descriptions.
        frames: F, at least 2.
        size: height and width in pixels.

    Returns:
        frames_BFCHW, float32 in [0, 1].
    """
    placement = place(clips, frames)
    return paint(clips, cover(clips, *placement, size))


def place(clips: Clips, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the centres x, y and the radius of each clip's subject in each frame, in fractions: (B, F) each."""
    time_F = torch.linspace(-0.5, 0.5, frames)
    offset_BF2 = TRAVEL * _DIRECTION[clips.motion_B][:, None, :] * time_F[None, :, None]
    x_BF = clips.x_B[:, None] + offset_BF2[..., 0]
    y_BF = clips.y_B[:, None] + offset_BF2[..., 1]
    growing_B1 = (clips.motion_B == MOTIONS.index("growing"))[:, None]
    radius_BF = clips.radius_B[:, None] * torch.where(growing_B1, 1.0 + 0.9 * time_F, torch.ones(frames))
    return x_BF, y_BF, radius_BF


def cover(clips: Clips, x_BF: Tensor, y_BF: Tensor, radius_BF: Tensor, size: int) -> Tensor:
    """Returns the coverage of each clip's subject at its places: (B, F, size, size) in [0, 1]."""
    upright_BF = ((clips.motion_B < 2) | ((clips.motion_B >= 4) & (clips.phase_B < 0.5)))[:, None].expand_as(x_BF)
    alpha_BFHW = torch.empty(*x_BF.shape, size, size)
    for index in clips.subject_B.unique().tolist():
        here = clips.subject_B == index
        name = SUBJECTS[index]
        if index < len(SHAPES):
            alpha_BFHW[here] = shape_coverage(name, x_BF[here], y_BF[here], radius_BF[here], size)
        else:
            phase_BF = clips.phase_B[here][:, None] * 0.4
            alpha_BFHW[here] = pattern_coverage(
                name, x_BF[here] + phase_BF, y_BF[here] + phase_BF, upright_BF[here], size
            )
    return alpha_BFHW


def paint(clips: Clips, alpha_BFHW: Tensor) -> Tensor:
    """Returns frames_BFCHW in the colours of each clip, from a coverage."""
    ink_B3 = torch.tensor(list(COLOURS.values()))[clips.colour_B]
    ground_B3 = torch.tensor(list(BACKGROUNDS.values()))[clips.background_B]
    alpha_BF1HW = alpha_BFHW[:, :, None]
    return ground_B3[:, None, :, None, None] * (1 - alpha_BF1HW) + ink_B3[:, None, :, None, None] * alpha_BF1HW


def blur(frames_BFCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur with one standard deviation (pixels) a clip; borders are replicated."""
    reach = 5
    taps_K = torch.arange(-reach, reach + 1, dtype=frames_BFCHW.dtype)
    kernel_BK = torch.softmax(-0.5 * (taps_K / sigma_B[:, None]) ** 2, dim=1)
    x_NBHW = frames_BFCHW.flatten(1, 2).transpose(0, 1)
    x_NBHW = F.pad(x_NBHW, (reach,) * 4, mode="replicate")
    x_NBHW = F.conv2d(x_NBHW, kernel_BK[:, None, None, :], groups=len(sigma_B))
    x_NBHW = F.conv2d(x_NBHW, kernel_BK[:, None, :, None], groups=len(sigma_B))
    return x_NBHW.transpose(0, 1).reshape(frames_BFCHW.shape)


def degrade(frames_BFCHW: Tensor, kind_B: Tensor, strength_B: Tensor, generator: torch.Generator) -> Tensor:
    """Spoils clips as low-quality footage is spoilt.

    Args:
        frames_BFCHW: float32 in [0, 1].
        kind_B: int64, indices into ``DEGRADATIONS`` (0 leaves the clip alone).
        strength_B: float32 in [0, 1]; 0 is a mild fault and 1 a strong one.
        generator: source of the noise and the flicker.

    Returns:
        frames_BFCHW in [0, 1].
    """
    s_B1111 = strength_B[:, None, None, None, None]
    out = frames_BFCHW.clone()
    for index, name in enumerate(DEGRADATIONS):
        here = kind_B == index
        if name == "clean" or not here.any():
            continue
        x, s = frames_BFCHW[here], s_B1111[here]
        if name == "blurred":
            out[here] = blur(x, 0.9 + 0.9 * strength_B[here])
        elif name == "noisy":
            out[here] = x + (0.08 + 0.10 * s) * torch.randn(x.shape, generator=generator)
        elif name == "washed-out":
            out[here] = 0.5 + (x - 0.5) * (0.60 - 0.25 * s)
        else:
            light = torch.randn(len(x), x.shape[1], 1, 1, 1, generator=generator)
            out[here] = x * (1 + (0.20 + 0.15 * s) * light)
    return out.clamp(0, 1)


def sample_degradation(
    count: int, generator: torch.Generator, share: float | Mapping[str, float] = 0.5
) -> tuple[Tensor, Tensor]:
    """Draws ``(kind_B, strength_B)`` with a ``share`` of degraded clips, strengths uniform.

    Kinds are uniform too, unless ``share`` gives one for each kind, as in ``{"washed-out": 0.5, "blurred": 0.2}``.

    Raises:
        ValueError: shares of unknown kinds, or of more than 1 in all.
    """
    names = DEGRADATIONS[1:]
    if isinstance(share, Mapping) and (set(share) - set(names) or sum(share.values()) > 1 + 1e-6):
        raise ValueError(f"shares {dict(share)}: of {', '.join(names)}, and at most 1 together")
    shares = share if isinstance(share, Mapping) else dict.fromkeys(names, share / len(names))
    edges = torch.tensor([shares.get(name, 0.0) for name in names]).cumsum(0)
    kind_B = torch.bucketize(torch.rand(count, generator=generator), edges, right=True) + 1
    return torch.where(kind_B > len(names), 0, kind_B), torch.rand(count, generator=generator)
