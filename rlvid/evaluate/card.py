"""The model card: what a fine-tuned model is, how it came about, what it cost, what it scores, what it is not for."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rlvid import __version__
from rlvid.config import RunConfig
from rlvid.config.reward import RewardConfig
from rlvid.escape import markdown_code, markdown_text
from rlvid.evaluate.about import read_results
from rlvid.evaluate.evaluated import Evaluated, Exported, find_evaluated
from rlvid.evaluate.responsible import over_optimisation, worse_prompts
from rlvid.evaluate.tables import markdown
from rlvid.models.stored import OLDEST
from rlvid.train.checkpoint import Found, State, read_state

_METHODS = {
    "instructvideo": "InstructVideo", "draft": "DRaFT", "draft-lv": "DRaFT-LV", "alignprop": "AlignProp",
    "ddpo": "DDPO", "dpok": "DPOK", "rwr": "RWR", "raft": "RAFT",
}  # fmt: skip


def model_card(
    config: RunConfig,
    checkpoint: Found,
    run: Path,
    name: str,
    scale: float,
    frames: int,
    size: int,
    evaluation: Path | None = None,
    transformers: str = OLDEST["transformers"],
) -> str:
    """The README.md of an exported model, in the form that the Hugging Face hub reads.

    Args:
        config: the run's.
        checkpoint: what was exported.
        run: the run's folder; the evaluation in it becomes the card's, if there is one.
        name: title of the card.
        scale: how much of what was learned is in the merged model.
        frames: of a video.
        size: height and width in pixels.
        evaluation: folder of another evaluation, which becomes the card's.
        transformers: the oldest version that reads the model.

    Raises:
        ValueError: the evaluation is damaged; or the one that was named has not the exported model.
    """
    evaluated = find_evaluated(Exported(run, checkpoint.step, scale), evaluation)
    state = read_state(checkpoint.folder)
    parts = [_front_matter(config), f"# {markdown_text(name)}", _summary(config, checkpoint, scale)]
    parts += [
        _usage(config, frames, size, transformers),
        _training(config, state),
        _evaluation(evaluated),
        _LIMITS,
        over_optimisation(run),
        *_worse(evaluated),
        _settings(config),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def report_card(config: RunConfig, checkpoint: Found, run: Path, evaluation: Path, models: list[str]) -> str:
    """The card of a run as a report shows it: without the hub's heading, usage and settings.

    Args:
        config: the run's.
        checkpoint: its latest.
        run: its folder.
        evaluation: an ``evaluation.parquet`` with models of the run.
        models: their names there.
    """
    state = read_state(checkpoint.folder)
    parts = [_what(config, checkpoint), _training(config, state), _LIMITS, over_optimisation(run)]
    parts += [worse_prompts(evaluation, models)] if models else []
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _worse(evaluated: Evaluated | None) -> list[str]:
    """What an evaluation says of single prompts."""
    if evaluated is None:
        return []
    if evaluated.name is not None and evaluated.name not in evaluated.tuned:
        return []  # the base itself
    if evaluated.name is None:
        return ["## Prompts that got worse\n\nNot known: the evaluation is not of the exported model."]
    return [worse_prompts(evaluated.folder / "evaluation.parquet", [evaluated.name])]


def is_hub_id(path: str) -> bool:
    """Whether ``model.path`` names a repository of the hub, and no folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).exists()


def _method(config: RunConfig) -> str:
    return _METHODS.get(config.method.name, config.method.name)


def _front_matter(config: RunConfig) -> str:
    known: dict[str, Any] = {"base_model": config.model.path} if is_hub_id(config.model.path) else {}
    kind = "lora" if config.model.train == "lora" else "full-fine-tuning"
    known |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["text-to-video", "reward-fine-tuning", "rlvid", config.method.name, kind],
    }
    lines = ["---", yaml.safe_dump(known, sort_keys=False).strip()]
    if "base_model" not in known:
        lines.append("# base_model: owner/name of the base on the hub")
    lines += ["# license: yours to fill in; the base model's and the rewards' licences bind you too", "---"]
    return "\n".join(lines)


def _base(config: RunConfig) -> str:
    path = config.model.path
    return (
        "the built-in model of rlvid"
        if path == "builtin"
        else markdown_code(path if is_hub_id(path) else Path(path).name)
    )


def _what(config: RunConfig, checkpoint: Found) -> str:
    lora = config.model.lora
    what = f"an adapter of rank {lora.rank} on {', '.join(map(markdown_code, lora.targets))}"
    how = what if config.model.train == "lora" else "all weights of its denoiser"
    return (
        f"A text-to-video model: {_base(config)}, fine-tuned on a reward with {_method(config)} by "
        f"rlvid {__version__}. Trained: {how}; {checkpoint.step} steps."
    )


def _summary(config: RunConfig, checkpoint: Found, scale: float) -> str:
    scaled = "" if scale == 1 else f" The merged weights hold {scale:g} of what was learned."
    adapter = " The adapter alone is in `adapter/`." if config.model.train == "lora" else ""
    return f"{_what(config, checkpoint)}{scaled} This folder is the whole model in diffusers' layout.{adapter}"


def _usage(config: RunConfig, frames: int, size: int, transformers: str) -> str:
    sampling, path = config.sampling, config.model.path
    base, where = (path, "") if is_hub_id(path) else ("BASE", f"\n`BASE` is the folder of the base, {_base(config)}.")
    if path == "builtin":
        shown = "from rlvid.models.folders import builtin_folder as f; print(f())"
        where = f"""\n`BASE` is the folder that `python -c "{shown}"` prints."""
    adapter = f"""
The adapter on the base, with PEFT {OLDEST["peft"]} or later. The scheduler is this folder's, for the base's own samples
another chain.{where}

```python
import torch
from diffusers import DDIMScheduler, TextToVideoSDPipeline
from peft import PeftModel

scheduler = DDIMScheduler.from_pretrained("FOLDER", subfolder="scheduler")
pipeline = TextToVideoSDPipeline.from_pretrained("{base}", scheduler=scheduler, torch_dtype=torch.float32)
pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "FOLDER/adapter").merge_and_unload()
```

diffusers' own `load_lora_weights` does not load it: that function does not know this U-Net.
"""
    return f"""## Use

With transformers {transformers} or later and diffusers {OLDEST["diffusers"]} or later.
It was written with transformers {version("transformers")} and diffusers {version("diffusers")}.

```python
import torch
from diffusers import TextToVideoSDPipeline

pipeline = TextToVideoSDPipeline.from_pretrained("FOLDER", torch_dtype=torch.float32)
frames = pipeline(
    "a prompt", num_frames={frames}, height={size}, width={size},
    num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance:g},
).frames[0]
```

Seeds are rlvid's own: `rlvid generate --seed 0` and `torch.Generator().manual_seed(0)` draw different noise, so they
make different videos. The same `latents` make the same video.
{adapter if config.model.train == "lora" else ""}"""


def _training(config: RunConfig, state: State) -> str:
    reward, data = config.reward, config.data
    held_out = (
        f"{markdown_code(reward.held_out)} was measured and never trained on"
        if reward.held_out
        else "none was measured"
    )
    clips = {
        "builtin": f"{data.clips} clips of the built-in renderer",
        "samples": f"{data.clips} samples of the base model",
    }.get(data.source, markdown_code(Path(data.source).name))
    workers = state.workers
    rows = {
        "Base": _base(config),
        "Method": f"{_method(config)}, D = {config.sampling.steps}, g = {config.sampling.guidance:g}",
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
    return "\n".join(["## Training", "", "| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in rows.items())])


def _rewards(reward: RewardConfig) -> str:
    """What was trained on; a mixture part by part."""
    if reward.mixture:
        return " + ".join(f"{part.weight:g} x {markdown_code(part.label)}" for part in reward.mixture)
    if reward.name == "custom" and reward.path:
        return f"a function of the author's own, {markdown_code(Path(reward.path).name)}"
    return markdown_code(reward.name) + (" with random weights" if reward.path == "random" else "")


def _evaluation(evaluated: Evaluated | None) -> str:
    """The table of the base and the exported model; of all models where the exported one is not there."""
    if evaluated is None:
        return (
            "## Evaluation\n\nNone was made in the run's folder. `rlvid evaluate` compares the model with its base on "
            "rewards that were and were not trained on, and exporting again puts the table here; with `--evaluation "
            "FOLDER`, that of another folder."
        )
    path = evaluated.folder / "evaluation.json"
    if not path.is_file():
        return "## Evaluation\n\nIts table is missing (evaluation.json); evaluate and export again."
    summaries, comparisons, facts = read_results(path)
    facts = without_folders(facts)
    if evaluated.name is None:
        page = markdown([], summaries, comparisons, facts, level=2)
        return f"{page}\nThis may not be of the exported model: {markdown_text(evaluated.why)}."
    others = set(evaluated.tuned) - {evaluated.name}
    page = markdown(
        [],
        [each for each in summaries if each.model not in others],
        [each for each in comparisons if each.tuned == evaluated.name],
        {key: text for key, text in facts.items() if not (key in others and text.startswith("run "))},
        level=2,
    )
    return f"{page}\nThe exported model is {markdown_text(evaluated.name)} here."


_LIMITS = """
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


def _settings(config: RunConfig) -> str:
    settings = without_folders(config.model_dump(mode="json", exclude={"output": True}))
    return f"## Settings\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```"


def without_folders(value: Any) -> Any:
    """Settings with paths cut to their last part: where things lie is nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and "/" in value and not is_hub_id(value) else value
