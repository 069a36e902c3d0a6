"""How metrics stand in tables: their headings, which of them are shown, as what text, and which cell is the best."""

import math
from dataclasses import dataclass

from rlvid.escape import one_line
from rlvid.evaluate.results.rows import REWARD_PREFIX
from rlvid.evaluate.results.summary import Summary


@dataclass(frozen=True)
class Column:
    """How a metric is shown: headings (long, short), with ± std or not, in percent or not; whether more is better.

    Without a short heading, the console does not show it.
    """

    metric: str
    title: str
    short: str
    spread: bool = False
    percent: bool = False
    ranked: bool = True


COLUMNS = (
    Column("reward", "Reward", "reward", spread=True),
    Column("held_out", "Held-out reward", "held-out", spread=True),
    Column("clipsim", "CLIPSIM", "CLIPSIM"),
    Column("consistency", "Temporal consistency", "cons."),
    Column("consistency_all_pairs", "… of all pairs", ""),
    Column("consistency_vbench", "… of VBench", ""),
    Column("flickering", "Flickering", "", ranked=False),
    Column("motion", "Motion", "motion", ranked=False),
    Column("diversity", "Diversity", ""),
    Column("oracle_subject", "Subject", "subj.", percent=True),
    Column("oracle_colour", "Colour", "colour", percent=True),
    Column("oracle_background", "Background", "ground", percent=True),
    Column("oracle_motion", "Motion direction", "dir.", percent=True),
    Column("oracle_sharpness", "Sharpness", "sharp."),
    Column("oracle_score", "Oracle score", "oracle"),
)


def shown_columns(summaries: list[Summary]) -> list[Column]:
    """The columns for which any model has a number; further rewards follow the run's two."""
    extra = [m for m in dict.fromkeys(m for s in summaries for m in s.mean) if m.startswith(REWARD_PREFIX)]
    columns = [*COLUMNS[:2], *(Column(m, title_of(m), "", spread=True) for m in extra), *COLUMNS[2:]]
    return [c for c in columns if any(s.used.get(c.metric) for s in summaries)]


def title_of(metric: str) -> str:
    """What a metric is called at the head of a column."""
    if metric.startswith(REWARD_PREFIX):
        return f"Reward {metric.removeprefix(REWARD_PREFIX)}"
    return next(c.title for c in COLUMNS if c.metric == metric)


def text_of(summary: Summary, column: Column) -> str:
    """A mean as its cell shows it; a dash where there is none."""
    mean, std = summary.mean[column.metric], summary.std[column.metric]
    if not math.isfinite(mean):
        return "–"
    if column.percent:
        return f"{100 * mean:.0f} %"
    return f"{mean:.3f} ± {std:.3f}" if column.spread and math.isfinite(std) else f"{mean:.3f}"


def gain_text(difference: float, low: float, high: float) -> str:
    """``+0.123 [0.110, 0.135]``, without the interval where there is none; a dash without a difference."""
    if not math.isfinite(difference):
        return "–"
    interval = f" [{low:.3f}, {high:.3f}]".replace("-0.000", "0.000") if math.isfinite(low) else ""
    return f"{difference:+.3f}".replace("-0.000", "+0.000") + interval


def best_of(summaries: list[Summary], columns: list[Column]) -> set[tuple[int, str]]:
    """(id of summary, metric) of the cells that are best of their set, as far as the shown digits tell."""
    best = set()
    for name in dict.fromkeys(s.set for s in summaries):
        group = [s for s in summaries if s.set == name]
        for column in columns:
            scale, digits = (100, 0) if column.percent else (1, 3)
            means = {id(s): round(scale * s.mean[column.metric], digits) for s in group if s.used[column.metric]}
            if column.ranked and len(set(means.values())) > 1:
                best |= {(key, column.metric) for key, value in means.items() if value == max(means.values())}
    return best


def set_title(name: str) -> str:
    """What tables call a prompt set."""
    return one_line(name.replace("_", " "))
