"""The report's page: fills the template. Prompts and labels are foreign text and are escaped."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup

from rlvid import __version__
from rlvid.config.reward import RewardConfig
from rlvid.evaluate.results.about import Case, ModelRecord
from rlvid.evaluate.results.pairwise import MAX_PAIRWISE_ROWS
from rlvid.evaluate.results.read import EvaluationData
from rlvid.evaluate.tables.run_card import run_card, without_folders, worse_prompts
from rlvid.metric_names import metric_of, set_title
from rlvid.plots.style import STYLES
from rlvid.report.inputs import ReportInputs
from rlvid.report.runs import Run
from rlvid.report.seeds import over_seeds
from rlvid.report.select import CaseSelection
from rlvid.report.summary import ModelSummary, shown_metrics, summarise_models, table
from rlvid.runs.guard_log import read_recommendation, warnings_of
from rlvid.stats import MIN_PROMPTS

_DIGITS = 5
_PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Strip:
    """A still picture: its file, heading and words in its place, and the moving files of its first prompt."""

    name: str
    heading: str
    alt: str
    files: list[str]


@dataclass
class PageAssets:
    """The files beside the page: their names, and the shape (F, H, W, 3) of all videos."""

    sprites: dict[tuple[str, Case], str] = field(default_factory=dict)
    files: dict[Case, list[str]] = field(default_factory=dict)
    strips: list[Strip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curves: list[tuple[str, str, str]] = field(default_factory=list)
    along: list[tuple[str, str, str]] = field(default_factory=list)
    paretos: list[tuple[str, str, str]] = field(default_factory=list)
    columns: int = 1
    shape: tuple[int, ...] = (1, 1, 1, 3)


def render(inputs: ReportInputs, selection: CaseSelection, assets: PageAssets) -> dict[str, str]:
    """File name -> text of the page, its style and its script."""
    evaluation = inputs.evaluation
    environment = Environment(
        loader=FileSystemLoader(_PAGE), undefined=StrictUndefined, trim_blocks=False,
        autoescape=select_autoescape(enabled_extensions=("html", "html.j2"), default=True),
    )  # fmt: skip
    frames, height, width, _ = assets.shape
    glyphs = {name: style.glyph for name, style in inputs.styles.items()}
    classes = {name: f"look-{STYLES.index(style)}" for name, style in inputs.styles.items()}
    cases = _cases(evaluation, assets)
    by_key = {case["key"]: case for case in cases}
    page = environment.get_template("index.html.j2").render(
        heading=_heading(evaluation), lead=_lead(evaluation), evaluation=evaluation, looks=classes, glyphs=glyphs,
        copies=evaluation.about.copies, width=width, height=height, frames=frames, notes=[*inputs.notes, *assets.notes],
        summaries=summaries_of(inputs), pictured={model.name for model in inputs.pictured}, seeds=over_seeds(inputs),
        rows=inputs.seeds, most=MAX_PAIRWISE_ROWS, tiles=_tiles(evaluation),
        judge=metric_of(evaluation.judge).spoken,
        featured=[(why, by_key[each.case], (evaluation.base, each.model)) for why, each in selection.featured],
        cases=cases, metrics=shown_metrics(evaluation),
        tables=[(steps, table(evaluation, steps)) for steps in evaluation.about.steps], curves=assets.curves,
        along=assets.along, paretos=assets.paretos,
        strips=assets.strips, runs=[_run(inputs, run) for run in inputs.runs],
        facts=_facts(evaluation, assets), version=__version__, data=_data(evaluation, assets),
        set_title=set_title, fewest=MIN_PROMPTS,
    )  # fmt: skip
    card = min(48.0, max(18.0, 9.0 * len(inputs.pictured)))  # rem
    style = environment.get_template("report.css.j2").render(looks=STYLES, width=width, height=height, card=card)
    return {"index.html": page, "report.css": style, "report.js": (_PAGE / "report.js").read_text(encoding="utf-8")}


def summaries_of(inputs: ReportInputs) -> list[ModelSummary]:
    """Returns the summary, with the warnings of the runs' guards."""
    summaries = summarise_models(inputs.evaluation)
    first = inputs.evaluation.tuned[:1]
    measured = next((r.config.reward for r in inputs.runs if set(first) & set(inputs.models_of(r))), None)
    for run in inputs.runs:
        models = {model.name for model in inputs.models_of(run)}
        for each in summaries:
            if each.model.name in models:
                each.cautions += [] if measured is None else _otherwise(measured, run.config.reward)
                each.cautions += [f"The guard of run {run.name}: {line}." for line in _guard_lines(run)]
    return summaries


def _guard_lines(run: Run) -> list[str]:
    """Returns the warnings of a run's guard, and its recommendation."""
    best, warnings = read_recommendation(run.folder), warnings_of(run.folder) or []
    why = f" ({best.reason})" if best and best.reason else ""
    return warnings + ([f"it recommends {best.spec(run.name)}{why}"] if best else [])


def _otherwise(measured: RewardConfig, own: RewardConfig) -> list[str]:
    """Returns warnings for a run that was trained on another reward than the measured one, or on the held-out one."""
    found = []
    if (own.parts, own.mixture) != (measured.parts, measured.mixture):
        names = " + ".join(name for name, _ in own.parts)
        found.append(f"It was trained on the reward {names}; what is called the reward here is {measured.name}.")
    if (measured.held_out, measured.held_out_path) in own.parts:
        found.append(f"The reward {measured.held_out} is held out here, but not for this model: it was trained on it.")
    return found


def _heading(evaluation: EvaluationData) -> str:
    names = [model.label for model in evaluation.tuned]
    if not names:
        return f"Videos of {evaluation.base.label}"
    if len(names) > 3:
        return f"{len(names)} models against {evaluation.base.label}"
    return f"{', '.join(names[:-1])}{' and ' if len(names) > 1 else ''}{names[-1]} against {evaluation.base.label}"


def _lead(evaluation: EvaluationData) -> str:
    prompts = sum(map(len, evaluation.about.sets.values()))
    steps = " and ".join(map(str, evaluation.about.steps))
    copies = f", {evaluation.about.copies} videos a prompt" if evaluation.about.copies > 1 else ""
    count = len(evaluation.models)
    models = f"{count} models" if count > 1 else "1 model"
    return (
        f"{len(evaluation.scores):,} videos of {models}: {prompts} prompts in {len(evaluation.about.sets)} sets, D = "
        f"{steps} denoising steps{copies}{', the same noise for all models' if count > 1 else ''}."
    )


def _tiles(evaluation: EvaluationData) -> dict[str, list[dict[str, str]]]:
    """Returns each tuned model's gain in the judging metric, in every set with the first D."""
    found: dict[str, list[dict[str, str]]] = {}
    metric, steps = metric_of(evaluation.judge), evaluation.about.steps[0]
    for model in evaluation.tuned:
        found[model.name] = []
        for name in evaluation.about.sets:
            gain = evaluation.differences.get((model.name, name, steps, metric.key))
            if gain is None or not gain.pairs:
                continue
            interval = f"95 %: {metric.number(gain.low)} to {metric.number(gain.high)}"
            found[model.name].append({
                "where": f"{metric.name}, {set_title(name)}, D = {steps}",
                "gain": metric.change(gain.difference),
                "arrow": ("", "▲", "▼")[gain.way],
                "kind": ("", "up", "down")[gain.way],
                "interval": interval if math.isfinite(gain.low) else f"{gain.pairs} pair",
            })  # fmt: skip
    return found


def _cases(evaluation: EvaluationData, assets: PageAssets) -> list[dict[str, Any]]:
    times = {name: Counter(prompts) for name, prompts in evaluation.about.sets.items()}
    return [
        {
            "number": place,
            "key": case,
            "prompt": evaluation.prompt(case),
            "repeated": times[case.set][evaluation.prompt(case)] > 1,
            "sprites": {m.name: assets.sprites[m.name, case] for m in evaluation.models},
            "files": assets.files.get(case, []),
        }
        for place, case in enumerate(evaluation.cases)
    ]


def _data(evaluation: EvaluationData, assets: PageAssets) -> dict[str, Any]:
    """Returns the data of the page's script: ``cases[number][model][metric]`` is a value or null."""
    metrics = shown_metrics(evaluation)
    frames, height, width, _ = assets.shape
    return {
        "fps": evaluation.about.fps, "frames": frames, "columns": assets.columns, "size": [width, height],
        "models": [model.label for model in evaluation.models],
        "metrics": [
            {"key": m.key, "title": m.name, "percent": m.unit == "%", "digits": m.digits} for m in metrics
        ],
        "cases": [
            [[_finite(evaluation.scores[model.name, case][m.key]) for m in metrics] for model in evaluation.models]
            for case in evaluation.cases
        ],
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return round(value, _DIGITS) if math.isfinite(value) else None


def _run(inputs: ReportInputs, run: Run) -> dict[str, Any]:
    config = run.config
    evaluation, names = inputs.evaluation, [model.name for model in inputs.models_of(run)]
    worse = worse_prompts(evaluation.scores, evaluation.about.sets, evaluation.base.name, names) if names else ""
    card = run_card(config, run.checkpoint, run.folder, worse)
    return {
        "name": run.name,
        "what": f"{config.method.name} on the reward {config.reward.name!r}, {run.checkpoint.step} steps of "
        f"{config.train.batch_size} videos, seed {config.seed}.",
        "costs": run.costs(),
        "seconds": run.seconds,
        "card": _markdown(card),
        "config": yaml.safe_dump(without_folders(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
    }


def _markdown(text: str) -> Markup:
    """Markdown as HTML in which nothing is loaded and no tag of the text's own survives."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = markdown.parse(text)
    for token in tokens:
        if "style" in token.attrs:  # a cell's alignment, which the page's policy refuses as a style
            token.attrs = {"class": "n"} if "right" in str(token.attrs["style"]) else {}
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))


def _facts(evaluation: EvaluationData, assets: PageAssets) -> list[tuple[str, str]]:
    frames, height, width, _ = assets.shape
    about = evaluation.about
    return [
        ("Evaluated", about.created or "–"),
        ("Models", "; ".join(f"{m.label} ({_kind(m)})" for m in evaluation.models)),
        ("Prompts", "; ".join(f"{set_title(name)}: {len(prompts)}" for name, prompts in evaluation.about.sets.items())),
        ("Denoising steps D", ", ".join(map(str, evaluation.about.steps))),
        ("Videos", f"{frames} frames of {width} x {height} pixels, {evaluation.about.fps:g} a second"),
        ("Seed of the noise", "–" if about.seed is None else str(about.seed)),
        *((f"{metric_of(key).name} is", without_folders(name)) for key, name in (about.rewards or {}).items() if name),
        ("CLIPSIM and consistency by", without_folders(about.clip or "builtin-heldout")),
    ]


def _kind(model: ModelRecord) -> str:
    step = "" if model.step is None else f", step {model.step}"
    scale = "" if model.scale in (0, 1) else f", {model.scale:g} of what was learned"
    return f"{model.kind}{step}{scale}"
