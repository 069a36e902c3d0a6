"""The report on the guard: tables in Markdown, of regret and of correlation, the numbers as JSON, and a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jobs.benchmark.correlation import LEAST, Correlation, correlate
from jobs.benchmark.regret import (
    ERRORS,
    ORACLE,
    RULES,
    Alarm,
    Mean,
    MeasuredRun,
    Outcome,
    RuleSummary,
    false_alarms,
    find_alarm,
    measure,
    summarise,
)
from rlvid.evaluate.tables.table import Grid, json_text
from rlvid.files import write_atomic
from rlvid.metric_names import NONE, SHARE, Metric, metric_of
from rlvid.plots.curves import Panel, Point, png_of_panels
from rlvid.plots.style import styles_of

ALONE, SCALED = "at scale 1 alone", "with scales"
COEFFICIENT = Metric("correlation", "Correlation", digits=2)
_STEM = "regret"


def write_report(out: Path, runs: Sequence[MeasuredRun], fixed: int) -> str:
    """Measures all rules and writes ``regret.md``, ``regret.json`` and ``regret.png``; returns the page.

    Args:
        out: the folder.
        runs: complete ones.
        fixed: the fixed number of steps.
    """
    ways = {ALONE: [each.at_scale_1() for each in runs], SCALED: list(runs)}
    outcomes = {way: [measure(run, fixed) for run in each] for way, each in ways.items()}
    summaries = {way: summarise(each) for way, each in outcomes.items()}
    alarms = [alarm for run in runs if (alarm := find_alarm(run))]
    correlations = {way: correlate(each) for way, each in ways.items()}
    page = page_of(outcomes, summaries, correlations, alarms, fixed)
    write_atomic(out / f"{_STEM}.md", page.encode())
    content = {
        "fixed": fixed,
        "outcomes": {way: [asdict(each) for each in found] for way, found in outcomes.items()},
        "rules": {way: {rule: asdict(each) for rule, each in found.items()} for way, found in summaries.items()},
        "alarms": [asdict(each) for each in alarms],
        "false alarms": asdict(false_alarms(alarms)),
        "correlations": {way: {m: asdict(each) for m, each in found.items()} for way, found in correlations.items()},
    }
    write_atomic(out / f"{_STEM}.json", json_text(content).encode())
    write_atomic(out / f"{_STEM}.png", picture(summaries))
    return page


def page_of(
    outcomes: dict[str, list[Outcome]],
    summaries: dict[str, dict[str, RuleSummary]],
    correlations: dict[str, dict[str, Correlation]],
    alarms: Sequence[Alarm],
    fixed: int,
) -> str:
    """Returns the tables, and how to read them."""
    lines = ["# Regret of the guard", ""]
    for way, found in outcomes.items():
        gain = [each for each in found if each.has_gain]
        groups = len({each.group for each in found})
        lines += [
            f"## Candidates {way}", "",
            f"{len(found)} runs of {groups} methods, learning rates and rewards; {len(gain)} with a best gain beyond "
            f"{ERRORS:g} standard errors.", "",
            rules_grid(summaries[way], fixed).markdown(), "",
        ]  # fmt: skip
    lines += [
        "Regret: the oracle's score of the best candidate less that of the rule's choice, here as a share of the best "
        "gain over the base, and as a score. Each rule, and the oracle, chooses on one half of the prompts, and both "
        "are read on the other. Loss: the base's score less that of the choice, over runs without such a gain. "
        "Intervals: 95 %, bootstrap over methods at a learning rate and on a reward.", "",
        alarms_line(alarms, len(outcomes[SCALED])), "", *correlation_lines(correlations),
        "## Runs", "", runs_grid(outcomes).markdown(), "",
    ]  # fmt: skip
    return "\n".join(lines)


def rules_grid(summaries: dict[str, RuleSummary], fixed: int) -> Grid:
    """Returns a row for each rule."""
    score = metric_of(ORACLE)

    def cell(metric: Metric, mean: Mean, sign: str = "") -> str:
        return metric.interval(mean.value, mean.low, mean.high, sign)

    rows = [
        [
            RULES[rule] + (f" ({fixed})" if rule == "fixed" else ""), cell(SHARE, each.share),
            SHARE.number(each.median), cell(score, each.regret),
            NONE if rule == "guard" else cell(SHARE, each.excess, "+"), cell(score, each.loss, "+"),
        ]
        for rule, each in summaries.items()
    ]  # fmt: skip
    heads = [
        "Rule",
        "Regret, share of the gain",
        "Its median",
        "Regret, score",
        "Share above the guard's",
        "Loss without a gain",
    ]
    return Grid(heads, rows)


def correlation_lines(correlations: dict[str, dict[str, Correlation]]) -> list[str]:
    """Returns the section on the rank correlation of each metric with the oracle's score."""
    lines = ["## Rank correlation with the oracle", ""]
    for way, found in correlations.items():
        lines += [f"Checkpoints {way}:", "", correlation_grid(found).markdown(), ""]
    return [
        *lines,
        "Spearman's correlation of a metric's mean with the mean of the oracle's score: 1 where both order the "
        "checkpoints alike, 0 where neither order says anything about the other. The base model is left out. Pooled: "
        "over the checkpoints of all runs together. Within a run: the mean over runs of each run's own correlation; a "
        f"run of fewer than {LEAST} checkpoints has none. Intervals: 95 %, bootstrap over runs.",
        "",
    ]


def correlation_grid(found: dict[str, Correlation]) -> Grid:
    """Returns a row for each metric."""
    rows = [
        [
            title_of(metric), str(each.runs), str(each.checkpoints),
            *(COEFFICIENT.interval(mean.value, mean.low, mean.high, "+") for mean in (each.pooled, each.within)),
        ]
        for metric, each in found.items()
    ]  # fmt: skip
    return Grid(["Metric", "Runs", "Checkpoints", "Pooled", "Within a run"], rows)


def title_of(metric: str) -> str:
    """Returns the name of a metric of a correlation; one of the trained reward may say which reward that is."""
    key, _, name = metric.partition(": ")
    return metric_of(key).name + (f", {name}" if name else "")


def runs_grid(outcomes: dict[str, list[Outcome]]) -> Grid:
    """Returns a row for each run and way: the best gain, and the choices of the oracle and of the guard."""
    score = metric_of(ORACLE)
    rows = [
        [
            each.run, way, " / ".join(dict.fromkeys(each.best)), " / ".join(dict.fromkeys(each.choices["guard"])),
            score.mean(each.gain, each.error), *(score.number(each.regret[rule]) for rule in RULES),
        ]
        for pair in zip(*outcomes.values(), strict=True)
        for way, each in zip(outcomes, pair, strict=True)
    ]  # fmt: skip
    regrets = [f"Regret of {name}" for name in RULES.values()]
    heads = ["Run", "Candidates", "The oracle's", "The guard's", "Best gain ± standard error", *regrets]
    return Grid(heads, rows, words=4)


def alarms_line(alarms: Sequence[Alarm], runs: int) -> str:
    """Returns a sentence on the false alarms."""
    if not alarms:
        return f"Alarms: none in {runs} runs."
    judged, share = [each.false for each in alarms if each.false is not None], false_alarms(alarms)
    found = "none of them with a later checkpoint."
    if judged:
        ends = f"[{SHARE.number(share.low)}, {SHARE.number(share.high)}]"
        found = (
            f"{len(judged)} of them with a later checkpoint, of which {sum(map(bool, judged))} false: "
            f"{SHARE.number(share.value)} {ends} (Wilson's interval). After a false alarm a later checkpoint is "
            "better, by the oracle and beyond noise, than all up to the alarm."
        )
    return f"Alarms: in {len(alarms)} of {runs} runs, {found}"


def picture(summaries: dict[str, dict[str, RuleSummary]]) -> bytes:
    """Draws the regret of each rule with scales against that at scale 1 alone, as PNG."""
    looks = styles_of(list(RULES), reference="guard")

    def bar(mean: Mean) -> tuple[float, float, float]:
        return 100 * mean.value, 100 * mean.low, 100 * mean.high

    points = [
        Point(RULES[rule], looks[rule], bar(summaries[ALONE][rule].share), bar(summaries[SCALED][rule].share))
        for rule in RULES
    ]
    panel = Panel(f"regret {ALONE}, % of the best gain", f"regret {SCALED}, % of the best gain", points=points)
    return png_of_panels([[panel]], 11, 6)
