"""The table of metrics: name, unit, number format and direction of each, for everything that a person reads.

The formats of an interval, of a mean with its deviation, and of the best value of a column are here too.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from rlvid.escape import one_line

K = TypeVar("K")

REWARD_PREFIX = "reward_"
"""How the key of a further reward begins; its name follows."""
NONE = "–"
"""The text in place of a missing number."""


@dataclass(frozen=True)
class Metric:
    """A metric and how it is shown.

    Attributes:
        key: in rows, files and configs.
        name: at the head of a column.
        meaning: for the legend below tables; a metric without one is explained beside the metric before it.
        short: at the head of a column on the console, which does not show a metric without one.
        unit: ``%`` for a share of 1 that is shown in percent.
        digits: after the point.
        spread: whether its means stand with their standard deviation.
        higher_is_better: None where neither way is.
        tabled: whether an evaluation's tables show it.
        alone: the name where nothing beside it says more; default: the name.
    """

    key: str
    name: str
    meaning: str = ""
    short: str = ""
    unit: str = ""
    digits: int = 3
    spread: bool = False
    higher_is_better: bool | None = True
    tabled: bool = True
    alone: str = ""

    @property
    def axis(self) -> str:
        """The name on an axis, in a legend, and wherever no other reward stands beside it."""
        return self.alone or self.spoken

    @property
    def spoken(self) -> str:
        """The name inside a sentence."""
        return self.name if self.name.isupper() else self.name[0].lower() + self.name[1:]

    @property
    def _scale(self) -> int:
        return 100 if self.unit == "%" else 1

    def number(self, value: float, sign: str = "") -> str:
        """Returns a value as text, without a sign of zero; ``sign`` is ``+`` where a rise has one."""
        if not math.isfinite(value):
            return NONE
        return f"{self._scale * value:{sign}z.{self.digits}f}" + (f" {self.unit}" if self.unit else "")

    def change(self, difference: float) -> str:
        """``+0.123``: a difference alone, without a sign where it shows as zero."""
        text = self.number(difference, "+")
        return text if any(digit in text for digit in "123456789") else text.lstrip("+")

    def mean(self, mean: float, half: float = math.nan) -> str:
        """``0.123 ± 0.045``: a mean and its deviation or half its interval, where that is finite."""
        return self.number(mean) + (self.margin(half) if math.isfinite(mean) else "")

    def margin(self, half: float) -> str:
        """`` ± 0.045``, to stand behind a number; nothing where ``half`` is not finite."""
        return f" ± {self.number(half)}" if math.isfinite(half) else ""

    def interval(self, value: float, low: float, high: float, sign: str = "") -> str:
        """``0.123 [0.110, 0.135]``: a value and its interval, where that is finite."""
        ends = f" [{self.number(low)}, {self.number(high)}]" if math.isfinite(value) and math.isfinite(low) else ""
        return self.number(value, sign) + ends

    def gain(self, difference: float, low: float, high: float) -> str:
        """``+0.123 [0.110, 0.135]``: a difference and its interval, where that is finite."""
        return self.interval(difference, low, high, "+")

    def best(self, means: Mapping[K, float]) -> set[K]:
        """Returns the keys of the best mean, at the digits that are shown; none if all are equal or none is better."""
        shown = {key: round(self._scale * mean, self.digits) for key, mean in means.items() if math.isfinite(mean)}
        if self.higher_is_better is None or len(set(shown.values())) < 2:
            return set()
        top = (max if self.higher_is_better else min)(shown.values())
        return {key for key, value in shown.items() if value == top}


KNOWN = {
    each.key: each
    for each in (
        Metric(
            "reward", "Reward",
            "Reward and held-out reward: mean ± standard deviation over videos of the mean score of all frames; only "
            "the first was trained on.",
            "reward", spread=True, alone="trained reward",
        ),
        Metric("held_out", "Held-out reward", "", "held-out", spread=True),
        Metric("clipsim", "CLIPSIM", "CLIPSIM: mean over frames of the cosine of image and prompt.", "CLIPSIM"),
        Metric(
            "consistency", "Temporal consistency",
            "Temporal consistency: mean cosine of consecutive frames; of all pairs of frames (TGVE); as VBench has it, "
            "half with the frame before and half with the first, negative ones as 0.",
            "cons.",
        ),
        Metric("consistency_all_pairs", "Temporal consistency of all pairs"),
        Metric("consistency_vbench", "Temporal consistency of VBench"),
        Metric(
            "flickering", "Flickering",
            "Flickering: VBench's, 1 less the mean absolute difference of consecutive 8-bit frames.",
            higher_is_better=None,
        ),
        Metric(
            "motion", "Motion",
            "Motion: mean absolute difference of consecutive frames in pixel values of [0, 1]; a frozen video has a "
            "consistency and a flickering of 1 and a motion of 0, so read them together.",
            "motion", higher_is_better=None,
        ),
        Metric("diversity", "Diversity", "Diversity: mean CLIP distance of a video to the other videos of its prompt."),
        Metric(
            "oracle_subject", "Subject",
            "Subject, colour, background and motion direction: share of videos that show what the prompt asks for, as "
            "the oracle reads it from the pixels.",
            "subj.", "%", 0,
        ),
        Metric("oracle_colour", "Colour", "", "colour", "%", 0),
        Metric("oracle_background", "Background", "", "ground", "%", 0),
        Metric("oracle_motion", "Motion direction", "", "dir.", "%", 0),
        Metric("oracle_sharpness", "Sharpness", "Sharpness: 1 for a clean rendering.", "sharp."),
        Metric(
            "oracle_score", "Oracle score",
            "Oracle score: those four hits times the closeness to a clean rendering; it is never trained on.",
            "oracle",
        ),
        Metric("oracle_fidelity", "Oracle fidelity", tabled=False),
        Metric("gain", "Least gain", digits=2, tabled=False),
        Metric("distance", "Distance from the base", higher_is_better=None, tabled=False),
        Metric("data/lost", "Lost samples", digits=0, higher_is_better=False, tabled=False),
        Metric("decode/gradient_share", "Share of the decoder's gradient", tabled=False),
        Metric("seconds", "Seconds", digits=0, higher_is_better=False, tabled=False),
    )
}  # fmt: skip
"""Key -> metric, in the order of tables."""
REWARD_TAGS = {"reward/trained": KNOWN["reward"].axis, "reward/held_out": KNOWN["held_out"].axis}
"""Training's scalars that curves show, and what curves call them."""
SHARE = Metric("share", "Share", unit="%", digits=0)
"""A share of 1, as text in percent."""
MAIN = ("reward", "held_out", "clipsim", "consistency", "motion", "diversity", "oracle_score")
"""The metrics of tables over seeds and of pairwise comparisons, besides further rewards."""


def percent(share: float, digits: int = 1) -> str:
    """``12.3 %``: a share of 1 with its digits after the point."""
    return replace(SHARE, digits=digits).number(share)


def metric_of(key: str) -> Metric:
    """Returns the metric of a key: one of the table, a further reward, or one that this version does not know."""
    if key in KNOWN:
        return KNOWN[key]
    if key.startswith(REWARD_PREFIX):
        return Metric(key, f"Reward {key.removeprefix(REWARD_PREFIX)}", spread=True)
    return Metric(key, key.replace("_", " ").capitalize(), higher_is_better=None, tabled=False)


def metric_key(label: str) -> str:
    """Returns the key of a further reward's metric, ``reward_NAME``."""
    return REWARD_PREFIX + re.sub(r"\W+", "_", label)


def main_metrics(keys: Iterable[str]) -> list[str]:
    """Returns those of ``keys`` that are in ``MAIN`` or further rewards."""
    return [key for key in keys if key in MAIN or key.startswith(REWARD_PREFIX)]


def set_title(name: str) -> str:
    """Returns the name of a prompt set in tables."""
    return one_line(name.replace("_", " "))
