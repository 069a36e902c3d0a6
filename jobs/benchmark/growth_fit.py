"""Exponents of growth: log-log fits of measured costs, the findings among them, a table and a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from rlvid.evaluate.tables.table import Cell, Grid
from rlvid.plots.curves import png_page
from rlvid.plots.style import RULE, STYLES

LIMIT, FLAT = 1.05, 0.05
"""Largest exponents that are no finding: of a cost that may grow with the work, and of one that must not."""
_LEAST_RISE = 16 * 2**20
"""Bytes; a smaller rise of memory counts as this, because allocators take and keep so much."""
IN_FIT = 3
"""Fewest sizes of a fit, where there are so many; fewer give no error, and no verdict."""
Stages = Mapping[str, Mapping[str, float]]
"""What ``growth_work.measure`` returns: stage -> ``seconds``, ``peak`` and ``rise`` in bytes."""


@dataclass(frozen=True)
class Exponent:
    """The slope of a line through (log work, log cost), and its standard error; NaN with too few sizes."""

    slope: float
    error: float

    def exceeds(self, limit: float) -> bool:
        """Returns whether the slope is above a limit by more than its error; never with an unknown error."""
        return self.slope - self.error > limit

    def __str__(self) -> str:
        if not math.isfinite(self.slope):
            return "–"
        return f"{self.slope:.2f}" + (f" ± {self.error:.2f}" if math.isfinite(self.error) else "")


@dataclass(frozen=True)
class Growth:
    """The costs of a stage of a quantity at all measured sizes.

    Attributes:
        name: of the quantity.
        stage: of its work.
        sizes: ascending.
        work: what a size means for the fit, such as pixels for the side of a frame.
        seconds: at each size.
        peaks: bytes at each size.
        rises: bytes of the peak above the memory before.
        flat: whether memory must not grow.
    """

    name: str
    stage: str
    sizes: tuple[int, ...]
    work: tuple[int, ...]
    seconds: tuple[float, ...]
    peaks: tuple[float, ...]
    rises: tuple[float, ...]
    flat: bool

    @property
    def time(self) -> Exponent:
        """The exponent of seconds."""
        return fit(self.work, self.seconds)

    @property
    def memory(self) -> Exponent:
        """The exponent of the rise of memory; of the whole peak where memory must not grow."""
        return fit(self.work, self.peaks if self.flat else [max(rise, _LEAST_RISE) for rise in self.rises])

    @property
    def undecided(self) -> bool:
        """Whether the sizes are too few for an error, and so for a verdict."""
        return math.isnan(self.time.error)

    @property
    def findings(self) -> list[str]:
        """Returns a line for each cost that grows faster than it may."""
        found, limits = [], {"seconds": (self.time, LIMIT), "memory": (self.memory, FLAT if self.flat else LIMIT)}
        for cost, (exponent, limit) in limits.items():
            if exponent.exceeds(limit):
                found.append(f"{self.name}, {self.stage}: {cost} grow with exponent {exponent}, above {limit:g}")
        return found


def fit(work: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Fits log cost to log work by least squares over the upper half of the sizes, of three at least."""
    first = min(len(work) // 2, max(0, len(work) - IN_FIT))
    x, y = np.log(work[first:]), np.log(costs[first:])
    if len(x) < 2:
        return Exponent(math.nan, math.nan)
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    if len(x) < IN_FIT:
        return Exponent(slope, math.nan)
    return Exponent(slope, float(np.sqrt(((y - slope * x) ** 2).sum() / (len(x) - 2) / (x @ x))))


def growths(name: str, found: Mapping[int, Stages], power: int, flat: str) -> list[Growth]:
    """Returns the growth of each stage of a quantity.

    Args:
        name: of the quantity.
        found: size -> its stages.
        power: of the size, which is the work.
        flat: the stage whose memory must not grow, if there is one.
    """
    sizes = tuple(sorted(found))

    def of(stage: str, cost: str) -> tuple[float, ...]:
        return tuple(found[size][stage][cost] for size in sizes)

    return [
        Growth(name, stage, sizes, tuple(size**power for size in sizes), of(stage, "seconds"), of(stage, "peak"),
               of(stage, "rise"), stage == flat)
        for stage in (found[sizes[0]] if sizes else ())
    ]  # fmt: skip


def table(found: Sequence[Growth]) -> Grid:
    """Returns a row for each stage: the range of sizes, costs at both ends, and exponents; findings are bold."""
    heads = ["Quantity", "Sizes", "Seconds", "Exponent", "Peak MiB", "Exponent"]
    rows: list[list[Cell | str]] = []
    for each in found:
        name = each.name if each.stage == each.name else f"{each.name}: {each.stage}"
        rows.append([
            name,
            _ends([f"{size:,}" for size in each.sizes]),
            _ends([f"{seconds:.3g}" for seconds in each.seconds]),
            Cell(str(each.time), each.time.exceeds(LIMIT)),
            _ends([f"{peak / 2**20:.0f}" for peak in each.peaks]),
            Cell(str(each.memory), each.memory.exceeds(FLAT if each.flat else LIMIT)),
        ])  # fmt: skip
    return Grid(heads, rows)


def _ends(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def draw(path: Path, found: Sequence[Growth]) -> None:
    """Writes a PNG: a log-log panel for each quantity, seconds at the left and peak memory, dotted, at the right."""
    names = list(dict.fromkeys(each.name for each in found))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with png_page(path, 4.6 * columns, 3.6 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        for panel, name in zip(panels, names, strict=False):
            _panel(panel, name, [each for each in found if each.name == name])


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Returns the powers of ten around positive values."""
    low = math.floor(math.log10(min(values)))
    return 10.0**low, 10.0 ** max(low + 1, math.ceil(math.log10(max(values))))


def _panel(panel: Axes, name: str, stages: Sequence[Growth]) -> None:
    memory = panel.twinx()
    for each, style in zip(stages, STYLES, strict=False):
        look = {"color": style.colour, "marker": style.marker, "markersize": 5, "clip_on": False}
        panel.loglog(each.sizes, each.seconds, label=f"{each.stage}: {each.time}", linewidth=1.8, **look)
        memory.loglog(each.sizes, [peak / 2**20 for peak in each.peaks], linestyle=":", linewidth=1.2, **look)
    for axis in (panel.xaxis, panel.yaxis, memory.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")  # matplotlib's own are formulas
        axis.set_minor_formatter(NullFormatter())
    sizes = _decades([size for each in stages for size in each.sizes])
    seconds = _decades([value for each in stages for value in each.seconds])
    peaks = _decades([peak / 2**20 for each in stages for peak in each.peaks])
    panel.set_title(name, loc="left", fontweight="bold")
    panel.set(xlabel="size", ylabel="seconds", xlim=sizes, ylim=seconds)
    memory.set(ylabel="peak MiB (dotted)", ylim=peaks)
    panel.grid(color=RULE, linewidth=0.6)
    panel.legend(frameon=False, fontsize=8)
