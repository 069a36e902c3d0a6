"""The report of a fit: ``report.json``, a card (``README.md``), a picture of the calibration, and a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlvid.config.fit import BackboneConfig, FitConfig
from rlvid.data.clips import EncodedClips
from rlvid.data.find import Skipped
from rlvid.escape import markdown_text
from rlvid.evaluate.tables.table import Grid, json_text
from rlvid.files import write_atomic
from rlvid.fitting.judge import Judged, Share, Verdict, accuracy, judge
from rlvid.fitting.pairs import Pair
from rlvid.plots.curves import Line, Panel, png_of_panels
from rlvid.plots.style import styles_of
from rlvid.reward.fit.seal import SPEC

REPORT, MADE_WITH = "report.json", "made_with"
_NAMED = 5
"""Votes left out that a terminal shows; ``report.json`` has all."""
_HEADS = ("Axis", "Held-out pairs", "Accuracy", "95 %", "Single voter", "Fitted pairs", "Calibration error", "Log loss")


@dataclass(frozen=True)
class FitReport:
    """What came of a fit.

    Attributes:
        axes: that were fitted.
        pairs: that were read.
        skipped: votes and pairs that were left out, and why.
        verdicts: of each axis, on held-out pairs; and the accuracy on those it was fitted to.
        mean_A: of the raw scores of base samples.
        deviation_A: of the same.
        samples: how many these are.
        base: the model that made them; None where no pair names it, and they are all samples.
        seconds: of the whole command.
        config: of the fit.
        notes: lines on prompts that the backbone cuts.
    """

    axes: tuple[str, ...]
    pairs: int
    skipped: list[Skipped]
    verdicts: list[tuple[Verdict, Share]]
    mean_A: list[float]
    deviation_A: list[float]
    samples: int
    base: str | None
    seconds: float
    config: FitConfig
    notes: Sequence[str] = ()

    def grid(self) -> Grid:
        """Returns the table of the axes, and of the kinds of pairs where there are several."""
        rows = []
        for verdict, fitted in self.verdicts:
            voter = verdict.voter
            rows.append(
                [
                    verdict.axis,
                    *_share(verdict.accuracy),
                    "-" if voter is None else _percent(voter.share),
                    _percent(fitted.share),
                    f"{verdict.error:.3f}",
                    f"{verdict.log_loss:.3f}",
                ]
            )
            kinds = verdict.kinds if len(verdict.kinds) > 1 else {}
            rows += [[f"{verdict.axis}: {kind}", *_share(share), "", "", "", ""] for kind, share in kinds.items()]
        return Grid(_HEADS, rows)

    def words(self) -> list[str]:
        """Returns what the numbers say, a sentence each."""
        lines = []
        for verdict, fitted in self.verdicts:
            found, voter, instead = verdict.accuracy, verdict.voter, verdict.instead
            if found.low <= 0.5:
                lines.append(
                    f"{verdict.axis}: it is not shown to be better than a coin on {found.pairs} held-out pairs; more "
                    "votes are needed"
                )
            else:
                lines.append(
                    f"{verdict.axis}: it agrees with the majority on {_percent(found.share)} of {found.pairs} held-out "
                    "pairs"
                )
            if voter and instead:
                lines.append(
                    f"{verdict.axis}: with the majority of the other voters, a single voter agrees in "
                    f"{_percent(voter.share)}, and the reward in {_percent(instead.share)}"
                )
            if fitted.share - found.high > 0.1:
                lines.append(
                    f"{verdict.axis}: it agrees with {_percent(fitted.share)} of the pairs that it was fitted on, so "
                    "it knows these by heart; take fewer steps, fewer layers (backbone.layers), or more votes"
                )
        return lines


def judge_scores(
    rows: EncodedClips, axes: Sequence[str], pairs: Sequence[Pair], scored: Mapping[int, Sequence[float]]
) -> list[tuple[Verdict, Share]]:
    """Returns the verdict of each axis on held-out pairs, and the accuracy on the others.

    Args:
        rows: the folder of pairs.
        axes: that were fitted.
        pairs: as they were read, with all votes.
        scored: row -> the difference of the raw scores of both sides, on each axis.
    """
    votes = {pair.votes[0].where: pair.votes for pair in pairs}
    columns = [rows.column(name) for name in ("caption", "kind", "held_out", "source")]
    sides = dict[bool, list[Judged]]({True: [], False: []})
    for row, (prompt, kind, held_out, source) in enumerate(zip(*columns, strict=True)):
        for axis, difference in zip(axes, scored.get(row, ()), strict=row in scored):
            if own := [vote for vote in votes[source] if vote.axis == axis]:
                given, named = tuple(vote.preference for vote in own), all(vote.annotator for vote in own)
                sides[held_out].append(Judged(prompt, kind, axis, difference, given, named))
    return [(judge(sides[True], axis), accuracy([each for each in sides[False] if each.axis == axis])) for axis in axes]


def write_report(folder: Path, report: FitReport, made_with: dict[str, Any]) -> None:
    """Writes the report into the folder of a fitted reward."""
    axes = {
        verdict.axis: {"held_out": {k: v for k, v in asdict(verdict).items() if k != "axis"}, "fitted": asdict(fitted)}
        for verdict, fitted in report.verdicts
    }
    base: dict[str, Any] = {"model": report.base, "samples": report.samples}
    base |= {"mean": dict(zip(report.axes, report.mean_A, strict=True))}
    base |= {"deviation": dict(zip(report.axes, report.deviation_A, strict=True))}
    content = {
        "pairs": report.pairs, "axes": axes, "base": base, "seconds": report.seconds,
        "left_out": [str(each) for each in report.skipped], "notes": [*report.notes],
        "settings": report.config.model_dump(mode="json"), MADE_WITH: made_with,
    }  # fmt: skip
    write_atomic(folder / REPORT, json_text(content).encode())
    write_atomic(folder / "calibration.png", _calibration(report))
    write_atomic(folder / "README.md", _card(report).encode())


def show_report(report: FitReport, console: Console) -> None:
    """Prints the table, what it says, and what was left out."""
    console.print(report.grid().console("Held-out pairs"))
    for line in report.words():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    show_left_out(report.skipped, console)


def show_left_out(skipped: Sequence[Skipped], console: Console) -> None:
    """Prints how many votes or pairs were left out, and the first of them with the reasons."""
    if not skipped:
        return
    console.print(f"{len(skipped)} votes or pairs were left out:", highlight=False)
    for each in skipped[:_NAMED]:
        console.print(f"  {each}", markup=False, highlight=False, soft_wrap=True)
    if (more := len(skipped) - _NAMED) > 0:
        console.print(f"  and {more} more, in {REPORT}", highlight=False)


def _calibration(report: FitReport) -> bytes:
    diagonal, name = np.array([0.0, 1.0]), "as often as predicted"
    styles = styles_of([name, *(verdict.axis for verdict, _ in report.verdicts)], name)
    lines = [Line(name, styles[name], [(diagonal, diagonal)])]
    for verdict, _ in report.verdicts:
        _, predicted, seen = np.array(verdict.bins).T
        lines.append(Line(verdict.axis, styles[verdict.axis], [(predicted, seen)]))
    panel = Panel("predicted probability that A is preferred", "share of votes for A", lines=lines)
    return png_of_panels([[panel]], 6.0, 4.6)


def _card(report: FitReport) -> str:
    config, kinds = report.config, {"image": "single frames", "video": "whole videos"}
    layers, tower = config.backbone.layers, " of its text tower" if config.backbone.towers == "text" else ""
    size = ("all weights" if layers is None else f"the last {layers} groups of layers") + tower
    if layers == 0:
        size = "the head alone"
    unit = f"the model {report.base}" if report.base else f"all models, since no pair names {config.base}"
    seen = "This fit did not see the held-out prompts."
    if _begins_with_a_reward(config.backbone):
        seen += " Its backbone is itself a fitted reward, and may have seen them."
    lines = [
        "# A reward that was fitted to preferences", "",
        f"It scores {kinds[config.kind]} against their prompts. It was fitted with `rlvid reward fit` to "
        f"{report.pairs} pairs ({', '.join(map(markdown_text, report.axes))}).", "",
        "```yaml", "reward:", "  name: fitted", "  path: THIS_FOLDER", "```", "",
        "## How well it agrees with the votes", "", report.grid().markdown(), "",
        *(f"- {markdown_text(line)}" for line in report.words()), "",
        "Accuracy: the share of pairs with a majority in which the reward prefers the majority's choice; its interval "
        "is a bootstrap over prompts, at least Wilson's. Single voter: the share of votes that agree with the majority "
        "of the other votes on their pair. Calibration error: the mean distance of predicted and seen shares, in ten "
        f"bins (see calibration.png). {seen}", "",
        "## How it was made", "",
        f"- Begun with the CLIP of {config.backbone.name}; fitted: {size}.",
        f"- {config.steps} steps of {config.batch_size} pairs, learning rate {config.lr:g}, seed {config.seed}.",
        f"- The unit of scores: {report.samples} samples of {unit} have mean {config.mean:g} and standard deviation "
        f"{config.deviation:g}.",
        f"- {len(report.skipped)} votes or pairs were left out; {REPORT} says why.",
        *(f"- {markdown_text(line)}" for line in report.notes), "",
        "It knows what its voters were shown, and no more: on videos of other models or other prompts, ask people "
        "again.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _begins_with_a_reward(backbone: BackboneConfig) -> bool:
    """Returns whether a backbone was fitted to preferences: in this package, by its publisher, or in an earlier fit."""
    if backbone.path == "random":
        return False
    return backbone.name != "clip" or (Path(str(backbone.path)) / SPEC).is_file()


def _share(share: Share) -> tuple[str, str, str]:
    return str(share.pairs), _percent(share.share), f"{_percent(share.low)} to {_percent(share.high)}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}".replace("%", " %")
