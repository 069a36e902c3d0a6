"""The page itself: what the template is filled with. Prompts and labels are foreign text and stay text."""

import math
from dataclasses import dataclass, field
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup

from rlvid import __version__
from rlvid.config.reward import RewardConfig
from rlvid.evaluate.results.pairwise import MAX_PAIRWISE_ROWS
from rlvid.evaluate.results.run_card import run_card, without_folders
from rlvid.plots.style import LOOKS
from rlvid.report.evidence import Case, Evidence
from rlvid.report.inputs import Gathered
from rlvid.report.runs import Run
from rlvid.report.seeds import over_seeds
from rlvid.report.select import Choice
from rlvid.report.summary import Told, gain_text, number, percent, shown_set, table, tell, title
from rlvid.runs.guard_log import warnings_of
from rlvid.stats import MIN_PROMPTS

_DIGITS = 5


@dataclass(frozen=True)
class Strip:
    """A still picture: its file, heading and words, and the moving files of its first prompt."""

    name: str
    heading: str
    told: str
    files: list[str]


@dataclass
class Shown:
    """What was written beside the page: file names, and the shape (F, H, W, 3) of all videos."""

    sprites: dict[tuple[str, Case], str] = field(default_factory=dict)
    files: dict[Case, list[str]] = field(default_factory=dict)
    strips: list[Strip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curves: list[tuple[str, str, str]] = field(default_factory=list)
    along: list[tuple[str, str, str]] = field(default_factory=list)
    paretos: list[tuple[str, str, str]] = field(default_factory=list)
    columns: int = 1
    shape: tuple[int, ...] = (1, 1, 1, 3)


def render(gathered: Gathered, choice: Choice, shown: Shown) -> dict[str, str]:
    """File name -> text of the page, its style and its script."""
    evidence = gathered.evidence
    environment = Environment(
        loader=PackageLoader("rlvid.report", "page"), undefined=StrictUndefined, trim_blocks=False,
        autoescape=select_autoescape(enabled_extensions=("html", "html.j2"), default=True),
    )  # fmt: skip
    frames, height, width, _ = shown.shape
    glyphs = {name: look.glyph for name, look in gathered.looks.items()}
    classes = {name: f"look-{LOOKS.index(look)}" for name, look in gathered.looks.items()}
    cases = _cases(evidence, shown)
    by_key = {case["key"]: case for case in cases}
    page = environment.get_template("index.html.j2").render(
        heading=_heading(evidence), lead=_lead(evidence), evidence=evidence, looks=classes, glyphs=glyphs,
        copies=evidence.copies, width=width, height=height, frames=frames, notes=[*gathered.notes, *shown.notes],
        told=told_of(gathered), pictured={model.name for model in gathered.pictured}, seeds=over_seeds(gathered),
        rows=gathered.seeds, most=MAX_PAIRWISE_ROWS, tiles=_tiles(evidence), judge_title=title(evidence.judge).lower(),
        featured=[(why, by_key[each.case], (evidence.base, each.model)) for why, each in choice.featured],
        cases=cases, metrics=evidence.shown(),
        tables=[(steps, table(evidence, steps)) for steps in evidence.steps], curves=shown.curves,
        along=shown.along, paretos=shown.paretos,
        strips=shown.strips, runs=[_run(gathered, run) for run in gathered.runs],
        facts=_facts(evidence, shown), version=__version__, data=_data(evidence, shown), title=title,
        shown_set=shown_set, fewest=MIN_PROMPTS,
    )  # fmt: skip
    card = min(48.0, max(18.0, 9.0 * len(gathered.pictured)))  # rem
    style = environment.get_template("report.css.j2").render(looks=LOOKS, width=width, height=height, card=card)
    return {"index.html": page, "report.css": style, "report.js": _read(environment, "report.js")}


def _read(environment: Environment, name: str) -> str:
    loader = environment.loader
    assert loader is not None
    return loader.get_source(environment, name)[0]


def told_of(gathered: Gathered) -> list[Told]:
    """The summary, with what the guards of the runs saw."""
    told = tell(gathered.evidence)
    first = gathered.evidence.tuned[:1]
    measured = next((r.config.reward for r in gathered.runs if set(first) & set(gathered.models_of(r))), None)
    for run in gathered.runs:
        models = {model.name for model in gathered.models_of(run)}
        for each in told:
            if each.model.name in models:
                each.cautions += [] if measured is None else _otherwise(measured, run.config.reward)
                each.cautions += [f"The guard of run {run.name}: {line}." for line in warnings_of(run.folder) or []]
    return told


def _otherwise(measured: RewardConfig, own: RewardConfig) -> list[str]:
    """What to know of a run trained on another reward than all models are measured by, or on the held-out one."""
    found = []
    if (own.parts, own.mixture) != (measured.parts, measured.mixture):
        names = " + ".join(name for name, _ in own.parts)
        found.append(f"It was trained on the reward {names}; what is called the reward here is {measured.name}.")
    if (measured.held_out, measured.held_out_path) in own.parts:
        found.append(f"The reward {measured.held_out} is held out here, but not for this model: it was trained on it.")
    return found


def _heading(evidence: Evidence) -> str:
    names = [model.label for model in evidence.tuned]
    if not names:
        return f"Videos of {evidence.base.label}"
    if len(names) > 3:
        return f"{len(names)} models against {evidence.base.label}"
    return f"{', '.join(names[:-1])}{' and ' if len(names) > 1 else ''}{names[-1]} against {evidence.base.label}"


def _lead(evidence: Evidence) -> str:
    prompts = sum(map(len, evidence.sets.values()))
    steps = " and ".join(map(str, evidence.steps))
    copies = f", {evidence.copies} videos a prompt" if evidence.copies > 1 else ""
    return (
        f"{len(evidence.scores):,} videos of {len(evidence.models)} models: {prompts} prompts in {len(evidence.sets)} "
        f"sets, D = {steps} denoising steps{copies}, the same noise for all models."
    )


def _tiles(evidence: Evidence) -> dict[str, list[dict[str, str]]]:
    """For each tuned model, the gain in the judging metric in every set with the first D."""
    found: dict[str, list[dict[str, str]]] = {}
    metric, steps = evidence.judge, evidence.steps[0]
    for model in evidence.tuned:
        found[model.name] = []
        for name in evidence.sets:
            gain = evidence.differences.get((model.name, name, steps, metric))
            if gain is None or not gain.pairs:
                continue
            interval = gain_text(gain, metric).partition(" [")[2].rstrip("]").replace(", ", " to ")
            found[model.name].append({
                "where": f"{title(metric)}, {shown_set(name)}, D = {steps}",
                "gain": number(gain.difference, metric, signed=True),
                "arrow": ("", "▲", "▼")[gain.way],
                "kind": ("", "up", "down")[gain.way],
                "interval": f"95 %: {interval}" if interval else f"{gain.pairs} pair",
            })  # fmt: skip
    return found


def _cases(evidence: Evidence, shown: Shown) -> list[dict[str, Any]]:
    return [
        {
            "number": place,
            "key": case,
            "prompt": evidence.prompt(case),
            "repeated": evidence.sets[case.set].count(evidence.prompt(case)) > 1,
            "sprites": {m.name: shown.sprites[m.name, case] for m in evidence.models},
            "files": shown.files.get(case, []),
        }
        for place, case in enumerate(evidence.cases)
    ]


def _data(evidence: Evidence, shown: Shown) -> dict[str, Any]:
    """What the script knows: ``cases[number][model][metric]`` is a value or null."""
    metrics = evidence.shown()
    frames, height, width, _ = shown.shape
    return {
        "fps": evidence.fps, "frames": frames, "columns": shown.columns, "size": [width, height],
        "models": [model.label for model in evidence.models],
        "metrics": [{"key": m, "title": title(m), "percent": percent(m)} for m in metrics],
        "cases": [
            [[_finite(evidence.scores[model.name, case][m]) for m in metrics] for model in evidence.models]
            for case in evidence.cases
        ],
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return round(value, _DIGITS) if math.isfinite(value) else None


def _run(gathered: Gathered, run: Run) -> dict[str, Any]:
    config, models = run.config, gathered.models_of(run)
    path = gathered.evidence.folders[0] / "evaluation.parquet"
    for folder, part in zip(gathered.evidence.folders, _names_by_folder(gathered.evidence), strict=True):
        if any(model.name in part for model in models):
            path = folder / "evaluation.parquet"
    names = [_own_name(gathered.evidence, model.name) for model in models]
    card = run_card(config, run.checkpoint, run.folder, path, names)
    return {
        "name": run.name,
        "what": f"{config.method.name} on the reward {config.reward.name!r}, {run.checkpoint.step} steps of "
        f"{config.train.batch_size} videos, seed {config.seed}.",
        "costs": run.costs(),
        "seconds": run.seconds,
        "card": _markdown(card),
        "config": yaml.safe_dump(without_folders(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
    }


def _names_by_folder(evidence: Evidence) -> list[set[str]]:
    found: dict[str, set[str]] = {str(folder): set() for folder in evidence.folders}
    for part in evidence.parts:
        found[str(part.path.parent.parent)] |= set(part.names.values())
    return list(found.values())


def _own_name(evidence: Evidence, name: str) -> str:
    """How a model is called in its own evaluation."""
    return next((old for part in evidence.parts for old, new in part.names.items() if new == name), name)


def _markdown(text: str) -> Markup:
    """Markdown as HTML in which nothing is loaded and no tag of the text's own survives."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = markdown.parse(text)
    for token in tokens:
        if "style" in token.attrs:  # a cell's alignment, which the page's policy refuses as a style
            token.attrs = {"class": "n"} if "right" in str(token.attrs["style"]) else {}
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))


def _facts(evidence: Evidence, shown: Shown) -> list[tuple[str, str]]:
    frames, height, width, _ = shown.shape
    facts = evidence.facts
    found = [
        ("Evaluated", str(facts.get("created", "–"))),
        ("Models", "; ".join(f"{m.label} ({_kind(m)})" for m in evidence.models)),
        ("Prompts", "; ".join(f"{shown_set(name)}: {len(prompts)}" for name, prompts in evidence.sets.items())),
        ("Denoising steps D", ", ".join(map(str, evidence.steps))),
        ("Videos", f"{frames} frames of {width} x {height} pixels, {evidence.fps:g} a second"),
        ("Seed of the noise", str(facts.get("seed", "–"))),
        *_rewards(facts),
        ("CLIPSIM and consistency by", without_folders(str(facts.get("clip") or "builtin-heldout"))),
    ]
    return found


def _rewards(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What is called the reward and the held-out reward here; nothing for evaluations that do not say it."""
    rewards = facts.get("rewards") or {}
    shown = ((title(metric), without_folders(str(name))) for metric, name in rewards.items() if name)
    return [(f"{heading} is", name) for heading, name in shown]


def _kind(model: Any) -> str:
    step = "" if model.step is None else f", step {model.step}"
    scale = "" if model.scale in (0, 1) else f", {model.scale:g} of what was learned"
    return f"{model.kind}{step}{scale}"
