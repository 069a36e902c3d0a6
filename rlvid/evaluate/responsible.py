"""What a model card warns of: signs of over-optimisation that the guard saw, and prompts that got worse."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvid.escape import markdown_text
from rlvid.evaluate.read import KEY, read_table
from rlvid.train.looks import best_step, read_means, warnings_of

_SHOWN = 10
_FEWEST_LOOKS = 3  # the base's, and two in a row that lost
_NAMES = {"held_out": "held-out reward", "reward": "trained reward"}


@dataclass(frozen=True)
class Worse:
    """What became of one prompt: means over its videos with the base and with the tuned model."""

    set: str
    prompt: str
    before: float
    after: float

    @property
    def gain(self) -> float:
        """After less before."""
        return self.after - self.before


def over_optimisation(run: Path) -> str:
    """The card's section on what the guard saw (Markdown); says so where none looked."""
    lines = ["## Signs of over-optimisation", ""]
    warnings = warnings_of(run)
    if warnings is None:
        lines.append(
            "No guard looked on while this model was trained (`guard.every`), so none were looked for: that is not to "
            "say that there are none."
        )
    elif warnings:
        lines += ["The guard warned:", "", *(f"- {markdown_text(warning)}" for warning in warnings)]
        best = best_step(run)
        if best is not None:
            best = "the base model, before any step" if best == 0 else f"that of step {best}"
            lines += ["", f"By the held-out reward the best checkpoint is {best}."]
    else:
        looks = len(read_means(run)[0])
        lines.append(
            f"The guard looked {looks} time{'s' * (looks > 1)} while this model was trained, at the base too, and "
            + (
                "raised no warning."
                if looks >= _FEWEST_LOOKS
                else f"a warning takes {_FEWEST_LOOKS}, so none could be raised: that is not to say that all is well."
            )
        )
    return "\n".join(lines)


def find_evaluation(run: Path) -> Path | None:
    """The ``evaluation.parquet`` of a run, where there is one."""
    return next((p / "evaluation.parquet" for p in (run, run / "evaluation") if (p / "evaluation.parquet").is_file()),
                None)  # fmt: skip


def worse_prompts(path: Path, models: Iterable[str] | None = None, shown: int = _SHOWN) -> str:
    """The card's section on prompts that got worse (Markdown), the worst first.

    Args:
        path: an ``evaluation.parquet``, whose first model is the base.
        models: the models that are looked at; default: all but the base.
        shown: most prompts that are named for each.

    Raises:
        ValueError: the file is damaged.
    """
    rows = read_table(path.parent, path, (*KEY, "prompt"), metrics=True)
    base = rows[0]["model"] if rows else ""
    wanted = list(dict.fromkeys(row["model"] for row in rows if row["model"] != base))
    wanted = [model for model in wanted if models is None or model in set(models)]
    metric = next((m for m in _NAMES if any(math.isfinite(row.get(m, math.nan)) for row in rows)), None)
    found = {} if metric is None else {model: _outcomes(rows, base, model, metric) for model in wanted}
    parts = ["## Prompts that got worse", ""]
    if not any(found.values()):
        return "\n".join([*parts, "The evaluation has no pair of videos with a reward to compare."])
    for model, outcomes in found.items():
        worse = sorted((each for each in outcomes if each.gain < 0), key=lambda each: each.gain)
        parts += [
            f"{markdown_text(model)}: {len(worse)} of {len(outcomes)} prompts have a lower {_NAMES[metric]} than with "
            "the base. Each is the mean of few videos, so part of it is chance.", "",
        ]  # fmt: skip
        if worse:
            parts += [f"| Prompts | Prompt | Base | {markdown_text(model)} | Change |", "|---|---|---:|---:|---:|"]
            for each in worse[:shown]:
                named = f"{markdown_text(each.set.replace('_', ' '))} | {markdown_text(each.prompt)}"
                parts.append(f"| {named} | {each.before:.3f} | {each.after:.3f} | {each.gain:+.3f} |")
            parts.append("")
    return "\n".join(parts).rstrip()


def _outcomes(rows: list[dict[str, Any]], base: str, model: str, metric: str) -> list[Worse]:
    """For each prompt of each set, over D and copies; pairs of which either has no number are left out."""

    def keyed(name: str) -> dict[tuple, tuple[str, float]]:
        return {
            (row["set"], row["index"], row["steps"], row["copy"]): (row["prompt"], row[metric])
            for row in rows if row["model"] == name and math.isfinite(row[metric])
        }  # fmt: skip

    before, after = keyed(base), keyed(model)
    pairs: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for key in before.keys() & after.keys():
        prompt, value = before[key]
        pairs.setdefault((key[0], key[1], prompt), []).append((value, after[key][1]))
    return [
        Worse(name, prompt, *(sum(side) / len(side) for side in zip(*values, strict=True)))
        for (name, _, prompt), values in sorted(pairs.items())
    ]
