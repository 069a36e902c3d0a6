"""Styles that tell things apart in pictures and on pages: a colour, a dash, a marker and its letter each.

Colours are Okabe and Ito's, which the colour-blind tell apart; dash and marker say the same in black and white.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlvid.escape import one_line

INK, SOFT, RULE = "#1a1a1a", "#666666", "#c8c8c8"

Dash = str | tuple[int, tuple[int, ...]]
"""A line's dashes, as matplotlib takes them."""


@dataclass(frozen=True)
class PlotStyle:
    """One thing's style: ``colour`` on white and ``on_dark`` on black; matplotlib's dash and marker, and a text's."""

    colour: str
    on_dark: str
    dash: Dash
    marker: str
    glyph: str


STYLES = (
    PlotStyle("#0072B2", "#5CB8F0", "-", "o", "●"),
    PlotStyle("#D55E00", "#FF8C42", "--", "s", "■"),
    PlotStyle("#009E73", "#35CFA0", "-.", "^", "▲"),
    PlotStyle("#000000", "#FFFFFF", ":", "D", "◆"),
    PlotStyle("#A8508A", "#E6A3CB", (0, (7, 2)), "v", "▼"),
    PlotStyle("#B37A00", "#F2B632", (0, (3, 1, 1, 1, 1, 1)), "P", "✚"),
    PlotStyle("#2F8FC4", "#A6DBF7", (0, (1, 1)), "X", "✖"),
    PlotStyle("#0072B2", "#5CB8F0", (0, (9, 3)), "<", "◀"),
    PlotStyle("#D55E00", "#FF8C42", (0, (4, 1, 1, 1)), ">", "▶"),
    PlotStyle("#009E73", "#35CFA0", (0, (2, 2)), "*", "★"),
    PlotStyle("#A8508A", "#E6A3CB", (0, (8, 2, 2, 2)), "p", "⬟"),
    PlotStyle("#B37A00", "#F2B632", (0, (5, 1)), "h", "⬢"),
    PlotStyle("#2F8FC4", "#A6DBF7", (0, (1, 3)), "d", "♦"),
)
"""All styles in the order of their use; the fourth, in ink, is for the reference of a comparison. From the
eighth on colours come again, with other dashes and markers."""
REFERENCE = STYLES[3]
_OTHERS = tuple(style for style in STYLES if style is not REFERENCE)


def styles_of(names: list[str], reference: str | None = None) -> dict[str, PlotStyle]:
    """Assigns a style to each name; ``reference`` gets the one in ink. With more than twelve others, styles repeat."""
    others = [name for name in names if name != reference]
    found = {name: _OTHERS[place % len(_OTHERS)] for place, name in enumerate(others)}
    return {name: REFERENCE if name == reference else found[name] for name in names}


@contextmanager
def drawing(size: float, ink: str = INK, soft: str = INK, **further: Any) -> Iterator[None]:
    """Sets matplotlib up for a picture, so that a name with ``$`` or a backslash is no formula.

    Args:
        size: of the type, in points.
        ink: of texts.
        soft: of lines and ticks.
        further: settings of one picture.
    """
    import matplotlib  # here, so that pages without a picture do not wait for it

    settings: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), ink)
    settings |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), soft)
    settings |= {"font.family": "DejaVu Sans", "font.size": size, "text.parse_math": False, "text.usetex": False}
    with matplotlib.rc_context(settings | further):
        yield


def legend_label(text: str) -> str:
    """Returns a name as a legend's entry: in one line, and not beginning with ``_``, which matplotlib would skip."""
    line = one_line(text)
    return f"\N{ZERO WIDTH SPACE}{line}" if line.startswith("_") else line
