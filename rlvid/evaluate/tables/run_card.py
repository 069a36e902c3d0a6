"""Sections of a run's card, for a model card and a report: what was trained, on what, limits, and warnings.

Warnings are the signs of over-optimisation that the guard saw, and the prompts that got worse.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvid import __version__
from rlvid.config import RunConfig
from rlvid.config.model import BUILT_IN, SamplingConfig
from rlvid.config.reward import RewardConfig
from rlvid.escape import markdown_code, markdown_text
from rlvid.evaluate.results.read import Scores
from rlvid.evaluate.tables.table import Grid, markdown_table
from rlvid.metric_names import metric_of, set_title
from rlvid.runs.checkpoints import CheckpointRef, State, read_state
from rlvid.runs.guard_log import read_means, read_recommendation, warnings_of

_SHOWN = 10
_MIN_EVALUATIONS = 3  # the base's, and two in a row that lost
_REWARDS = ("held_out", "reward")
"""Metrics that a prompt gets worse by: the first that was measured."""
_METHODS = {
    "instructvideo": "InstructVideo", "draft": "DRaFT", "draft-lv": "DRaFT-LV", "alignprop": "AlignProp",
    "ddpo": "DDPO", "dpok": "DPOK", "grpo": "GRPO", "rwr": "RWR", "raft": "RAFT",
}  # fmt: skip


LIMITS = """
## Intended use and limits

For research on reward fine-tuning, and for making short clips of the kind that the base makes. It knows what its base
knows, with the base's biases, and was pushed towards what one reward model likes: that is a preference learned from
other people's data, and no measure of truth, safety or taste. Do not use it to deceive, or to depict people without
their consent.

**Over-optimisation.** A reward that is maximised stops being a measure. The trained reward can rise while videos get
worse: colours over-saturated, detail invented, motion frozen, samples of a prompt all alike. So read the trained reward
only beside the held-out one, motion and diversity; prefer an earlier checkpoint where those fall; and export with a
smaller `--lora-scale` for less of the effect. A reward on single frames teaches nothing about motion.
"""


def run_card(config: RunConfig, checkpoint: CheckpointRef, run: Path, worse: str) -> str:
    """Returns the card of a run as a report shows it: without the hub's heading, usage and settings.

    Args:
        config: the run's.
        checkpoint: its latest.
        run: its folder.
        worse: of ``worse_prompts``; empty where no model of the run was evaluated.
    """
    state = read_state(checkpoint.folder)
    parts = [describe_model(config, checkpoint), training_table(config, state), LIMITS, over_optimisation(run), worse]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def over_optimisation(run: Path) -> str:
    """Returns the card's section on the guard's warnings (Markdown), or on the lack of a guard."""
    lines = ["## Signs of over-optimisation", ""]
    warnings = warnings_of(run)
    if warnings is None:
        lines.append(
            "No guard evaluated this model during training (`guard.every`), so its signs of over-optimisation are not "
            "known."
        )
    elif warnings:
        lines += ["The guard warned:", "", *(f"- {markdown_text(warning)}" for warning in warnings)]
    else:
        count = len(read_means(run)[0])
        lines.append(
            f"The guard made {count} evaluation{'s' * (count > 1)} during training, the base included, and raised no "
            "warning."
            if count >= _MIN_EVALUATIONS
            else f"The guard made {count} evaluation{'s' * (count > 1)} during training, the base included. A warning "
            f"takes {_MIN_EVALUATIONS}, so none could be raised: this is no proof that all is well."
        )
    if (best := read_recommendation(run)) is not None:
        which = f"that of step {best.step}" if best.step else "the base model, before any step"
        which += f", at scale {best.scale:g} of the learned change" if best.scale != 1 else ""
        why = f": {markdown_text(best.reason)}" if best.reason else ""
        lines += ["", f"By the guard's rule the best checkpoint is {which}{why}."]
    return "\n".join(lines)


def worse_prompts(scores: Scores, sets: Mapping[str, Sequence[str]], base: str, models: Iterable[str]) -> str:
    """Returns the card's section on prompts that got worse (Markdown), the worst first.

    Args:
        scores: of all videos.
        sets: the prompts.
        base: name of the base model.
        models: names of the models to compare.
    """
    metric = next((m for m in _REWARDS if any(math.isfinite(each.get(m, math.nan)) for each in scores.values())), "")
    found = {model: _outcomes(scores, sets, base, model, metric) for model in models} if metric else {}
    parts, known = ["## Prompts that got worse", ""], metric_of(metric)
    if not any(found.values()):
        return "\n".join([*parts, "The evaluation has no pair of videos with a reward to compare."])
    for model, outcomes in found.items():
        worse = sorted((each for each in outcomes if each[3] < each[2]), key=lambda each: each[3] - each[2])
        parts += [
            f"{markdown_text(model)}: {len(worse)} of {len(outcomes)} prompts have a lower {known.axis} "
            "than with the base. Each is the mean of few videos, so part of it is chance.", "",
        ]  # fmt: skip
        if worse:
            rows = [
                [set_title(name), prompt, known.number(before), known.number(after), known.change(after - before)]
                for name, prompt, before, after in worse[:_SHOWN]
            ]
            parts += [Grid(["Prompts", "Prompt", "Base", model, "Change"], rows, words=2).markdown(), ""]
    return "\n".join(parts).rstrip()


def _outcomes(
    scores: Scores, sets: Mapping[str, Sequence[str]], base: str, model: str, metric: str
) -> list[tuple[str, str, float, float]]:  # fmt: skip
    """Set, prompt, its means with the base and the model; over D and copies, without pairs that lack a number."""
    pairs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for (name, case), values in scores.items():
        if name == model and (base, case) in scores:
            before, after = (each.get(metric, math.nan) for each in (scores[base, case], values))
            if math.isfinite(before) and math.isfinite(after):
                pairs.setdefault((case.set, case.index), []).append((before, after))
    return [
        (name, sets[name][index], *(sum(side) / len(side) for side in zip(*values, strict=True)))
        for (name, index), values in sorted(pairs.items())
    ]


def is_hub_id(path: str) -> bool:
    """Returns whether ``model.path`` names a repository of the hub, and no folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).exists()


def method_title(config: RunConfig) -> str:
    """Returns the name of the run's method."""
    return _METHODS.get(config.method.name, config.method.name)


def base_title(config: RunConfig) -> str:
    """Returns the base model, in Markdown: its id on the hub, or the name of its folder."""
    path = config.model.path
    return (
        "the built-in model of rlvid"
        if path in BUILT_IN
        else markdown_code(path if is_hub_id(path) else Path(path).name)
    )


def describe_model(config: RunConfig, checkpoint: CheckpointRef) -> str:
    """One line: the base, the method, and which weights were trained."""
    lora = config.model.lora
    what = f"an adapter of rank {lora.rank} on {', '.join(map(markdown_code, lora.targets))}"
    if lora.levels is not None:
        what += f", which acts at the noise levels {lora.levels[0]:g} to {lora.levels[1]:g} alone"
    how = what if config.model.finetune == "lora" else "all weights of its denoiser"
    return (
        f"A text-to-video model: {base_title(config)}, fine-tuned on a reward with {method_title(config)} by "
        f"rlvid {__version__}. Trained: {how}; {checkpoint.step} steps."
    )


def training_table(config: RunConfig, state: State) -> str:
    """Returns the section on training: rewards, data, steps, costs and versions."""
    reward, data = config.reward, config.data
    held_out = (
        f"{markdown_code(reward.held_out)} was measured and never trained on"
        if reward.held_out
        else "none was measured"
    )
    made = {
        "builtin": f"{data.count} clips of the built-in renderer",
        "samples": f"{data.count} samples of the base model",
        "prompts": f"no clips; prompts of {markdown_code(Path(data.prompts or 'in_domain').name)}",
    }
    names = [made.get(source, markdown_code(Path(source).name)) for source in data.sources]
    if data.weights:
        names = [f"{name} (weight {weight:g})" for name, weight in zip(names, data.weights, strict=True)]
    clips = ", ".join(names)
    workers = state.workers
    rows = {
        "Base": base_title(config),
        "Method": f"{method_title(config)}, {_chain(config.sampling)}",
        "Trained on the reward": _rewards(reward),
        "Held-out reward": held_out,
        "Data": f"{clips}, as sources and prompts",
        "Steps": f"{state.step} of {config.train.batch_size} videos, of which {state.skipped} were skipped",
        "Videos shown to the reward": f"{state.videos:,}",
        "Seconds of training": f"{state.seconds:,.0f}",
        "Hardware": f"{workers} worker{'s' * (workers > 1)}, each on {markdown_text(state.hardware)}",
        "Precision": f"{config.model.precision}, trained weights float32; ZeRO stage {config.train.zero_stage}",
        "Versions": markdown_text(", ".join(f"{package} {number}" for package, number in state.versions.items())),
    }
    return "## Training\n\n" + markdown_table(["", ""], list(rows.items()), words=2)


def _chain(sampling: SamplingConfig) -> str:
    """Returns the chain of training in words."""
    parts = [f"D = {sampling.steps}", f"g = {sampling.guidance:g}"]
    if sampling.guidance_interval is not None:
        low, high = sampling.guidance_interval
        parts.append(f"guided at noise levels ({low:g}, {high:g}]")
    if sampling.prefix_steps is not None:
        parts.append(f"{sampling.prefix_steps} steps without gradient")
    if sampling.reuse > 1:
        parts.append(f"reuse = {sampling.reuse}")
    return ", ".join(parts)


def _rewards(reward: RewardConfig) -> str:
    """What was trained on; a mixture part by part."""
    if reward.mixture:
        return " + ".join(f"{part.weight:g} x {markdown_code(part.label)}" for part in reward.mixture)
    if reward.name == "custom" and reward.path:
        return f"a function of the author's own, {markdown_code(Path(reward.path).name)}"
    if reward.name == "fitted" and reward.path:
        return f"a fitted one, {markdown_code(Path(reward.path).name)}"
    return markdown_code(reward.name) + (" with random weights" if reward.path == "random" else "")


def without_folders(value: Any) -> Any:
    """Returns settings with paths cut to their last part: where things lie is nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and "/" in value and not is_hub_id(value) else value
