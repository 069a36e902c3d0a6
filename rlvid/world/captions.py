"""Captions of the built-in world, and the three prompt sets: written from labels, and read back to labels."""

import re
from dataclasses import dataclass

import torch

from rlvid.world.render import BACKGROUNDS, COLOURS, MOTIONS, PATTERNS, SHAPES, SUBJECTS, Clips, sample_clips

NEW_SHAPES = ("heart", "moon")
"""Shapes that the base model knows and that reward fine-tuning never sees."""

PROMPT_SETS = {
    "in_domain": tuple(s for s in SHAPES if s not in NEW_SHAPES),
    "new_shapes": NEW_SHAPES,
    "scenes": PATTERNS,
}

_COLOUR_NAMES, _BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)
_MOTION_PHRASES = {
    "left": ("moving left", "drifting left", "sliding to the left"),
    "right": ("moving right", "drifting right", "sliding to the right"),
    "up": ("moving up", "drifting up", "rising up"),
    "down": ("moving down", "drifting down", "sinking down"),
    "still": ("standing still", "staying still", "at rest"),
    "growing": ("growing", "getting bigger", "growing larger"),
}
_TEMPLATES = (
    "{subject} {motion} on {ground} background",
    "{subject} {motion} over {ground} background",
    "{subject} {motion}, {background} background",
    "on {ground} background, {subject} {motion}",
)
_MOTION_WORDS = {"rest": "still", "bigger": "growing", "larger": "growing"}


@dataclass(frozen=True)
class Labels:
    """The properties of a clip in a caption, by name."""

    subject: str
    colour: str
    background: str
    motion: str


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def write_caption(labels: Labels, template: int = 0, phrasing: int = 0) -> str:
    """Returns the caption of ``labels`` in one of four templates and three phrasings of the motion."""
    subject = f"{labels.colour} {labels.subject}"
    return _TEMPLATES[template].format(
        subject=subject if labels.subject in PATTERNS else _with_article(subject),
        motion=_MOTION_PHRASES[labels.motion][phrasing],
        ground=_with_article(labels.background),
        background=labels.background,
    )


def write_captions(clips: Clips, generator: torch.Generator) -> list[str]:
    """Returns a caption for each of B clips, the wording drawn from ``generator``."""
    template_B = torch.randint(len(_TEMPLATES), (len(clips),), generator=generator).tolist()
    phrasing_B = torch.randint(3, (len(clips),), generator=generator).tolist()
    return [write_caption(*each) for each in zip(labels_of(clips), template_B, phrasing_B, strict=True)]


def labels_of(clips: Clips) -> list[Labels]:
    """Returns the labels of B clips, by name."""
    return [
        Labels(SUBJECTS[s], _COLOUR_NAMES[c], _BACKGROUND_NAMES[b], MOTIONS[m])
        for s, c, b, m in zip(
            clips.subject_B.tolist(),
            clips.colour_B.tolist(),
            clips.background_B.tolist(),
            clips.motion_B.tolist(),
            strict=True,
        )
    ]


def read_caption(caption: str) -> Labels | None:
    """Returns the labels that a caption asks for, or None when one of the four is missing from it."""
    words = re.findall(r"[a-z]+", caption.lower())
    subject = next((w for w in words if w in SUBJECTS), None)
    colour = next((w for w in words if w in COLOURS), None)
    background = next((w for w in words if w in BACKGROUNDS), None)
    motion = next((m for w in words if (m := _MOTION_WORDS.get(w, w)) in MOTIONS), None)
    if subject is None or colour is None or background is None or motion is None:
        return None
    return Labels(subject, colour, background, motion)


def prompts_in_set(name: str) -> int:
    """Counts the distinct prompts of a set."""
    return len(PROMPT_SETS[name]) * len(COLOURS) * len(BACKGROUNDS) * (5 if name == "scenes" else len(MOTIONS))


def prompt_set(name: str, count: int, seed: int = 0) -> list[str]:
    """``count`` distinct prompts of a set (``in_domain``, ``new_shapes`` or ``scenes``), the same for the same seed.

    Raises:
        ValueError: unknown set, or more prompts than the set has.
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"prompt set {name!r} does not exist; allowed: {', '.join(PROMPT_SETS)}")
    subjects = PROMPT_SETS[name]
    available = prompts_in_set(name)
    if not 0 < count <= available:
        raise ValueError(f"prompt set {name!r} has {available} prompts; asked for {count}")
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[Labels, str] = {}
    while len(chosen) < count:
        clips = sample_clips(count, generator, subjects)
        for labels, caption in zip(labels_of(clips), write_captions(clips, generator), strict=True):
            chosen.setdefault(labels, caption)
    return list(chosen.values())[:count]
