"""The pairs of a study, their order for each person, and the side of each video."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, zip_longest

from rlvid.evaluate.results.about import Case
from rlvid.study.videos import Videos

AXES = {"quality": "video quality", "alignment": "video-text alignment"}
"""The two questions."""


@dataclass(frozen=True)
class Pair:
    """Two videos for one prompt and noise.

    ``first`` and ``second`` name models. In an attention check they are the same one, and the second video is the first
    under noise. ``digest`` is of the frames of both, so that a pair is known to be what it was.
    """

    number: int
    case: Case
    prompt: str
    first: str
    second: str
    check: bool
    digest: str


def choose_pairs(videos: Videos, models: list[str], count: int, checks: int, seed: int) -> list[Pair]:
    """Returns the pairs of a study, the same ones for the same seed, and attention checks strewn among them.

    Sets, numbers of steps and pairs of models get equal shares as far as they go. Where there are fewer than
    ``count`` pairs, all are taken. Each video is looked at. Spots where a model has no frames are left out.

    Raises:
        ValueError: fewer than two models, an unknown one, a missing video, no case where all models have frames, or
            videos that cannot stand side by side.
    """
    models = _known(videos, models)
    if not videos.cases:
        raise ValueError(f"{videos.folder}: its files of videos are empty; run rlvid evaluate again")
    for model in models:
        missing = [case for case in sorted(videos.cases) if not videos.has(model, case)]
        if missing:
            raise ValueError(
                f"{videos.folder}: {len(missing)} videos of model {model!r} are missing (the first: {missing[0]}); "
                "rlvid evaluate makes them"
            )
    cases = _comparable(videos, models)
    groups: dict[tuple[object, ...], list[tuple[Case, str, str]]] = defaultdict(list)
    for first, second in combinations(models, 2):
        for case in cases:
            groups[case.set, case.steps, first, second].append((case, first, second))
    for name, group in groups.items():
        _generator(seed, "pairs", *name).shuffle(group)
    rounds = zip_longest(*groups.values())
    real = [each for turn in rounds for each in turn if each is not None][:count]
    pick = _generator(seed, "checks")
    chosen = [(case, first, second, False) for case, first, second in real]
    chosen += [(case, first, first, True) for case, first, _ in pick.choices(real, k=checks)]
    pick.shuffle(chosen)
    seen: dict[tuple[str, Case], tuple[str, str]] = {}
    return [_look(videos, number, *each, seen) for number, each in enumerate(chosen)]


def without_frames(videos: Videos, models: list[str]) -> dict[str, set[Case]]:
    """Returns the cases in which a model's video has no frames, because a pixel was not finite, by model."""
    found = {name: {s for s in videos.cases if not videos.has_frames(name, s)} for name in models or videos.models}
    return {name: cases for name, cases in found.items() if cases}


def _comparable(videos: Videos, models: list[str]) -> list[Case]:
    lacking = without_frames(videos, models)
    cases = sorted(set(videos.cases).difference(*lacking.values()))
    if not cases:
        lacks = ", ".join(f"{name} lacks {len(each)}" for name, each in lacking.items())
        raise ValueError(
            f"{videos.folder}: for none of {len(videos.cases)} prompts with D and noise do all models have frames, as "
            f"pixels were no numbers ({lacks}); compare others with --models"
        )
    return cases


def _known(videos: Videos, models: list[str]) -> list[str]:
    names = list(dict.fromkeys(models or videos.models))
    for name in names:
        if name not in videos.models:
            raise ValueError(f"--models {name!r}: not in {videos.folder}; there: {', '.join(videos.models)}")
    if len(names) < 2:
        raise ValueError(f"a study compares two models or more; there: {', '.join(videos.models)}; asked: {len(names)}")
    return names


def _look(
    videos: Videos, number: int, case: Case, first: str, second: str, check: bool,
    seen: dict[tuple[str, Case], tuple[str, str]],
) -> Pair:  # fmt: skip
    for model in (first, second):
        if (model, case) not in seen:
            seen[model, case] = videos.inspect(model, case)
    (look, digest), (other_look, other_digest) = seen[first, case], seen[second, case]
    if look != other_look:
        raise ValueError(
            f"{case}: {first!r} has {look} and {second!r} {other_look}; only videos of one shape are compared"
        )
    return Pair(number, case, videos.cases[case], first, second, check, f"{digest}{other_digest}")


def order(seed: int, annotator: str, numbers: Iterable[int]) -> list[int]:
    """Returns the order in which somebody sees the pairs; the same one however the name is capitalised."""
    shuffled = sorted(numbers)
    _generator(seed, "order", annotator.casefold()).shuffle(shuffled)
    return shuffled


def second_on_left(seed: int, annotator: str, number: int) -> bool:
    """Returns whether somebody sees a pair's second video on the left; the same however the name is capitalised."""
    return _generator(seed, "side", annotator.casefold(), number).random() < 0.5


def noise_seed(seed: int, number: int) -> int:
    """Returns the seed of the noise in an attention check."""
    return _generator(seed, "noise", number).getrandbits(64)


def _generator(seed: int, purpose: str, *position: object) -> random.Random:
    """Belongs to what is drawn, so a draw depends neither on what was drawn before nor on a restart."""
    text = json.dumps([seed, purpose, *position])
    return random.Random(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
