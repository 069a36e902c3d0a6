"""The model card of a fine-tuned model: description, training, cost, scores, limits."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rlvid.config import RunConfig
from rlvid.config.model import BUILT_IN
from rlvid.escape import markdown_text
from rlvid.evaluate.results.about import read_about
from rlvid.evaluate.results.read import read_results, read_scores
from rlvid.evaluate.tables.pages import markdown
from rlvid.evaluate.tables.run_card import (
    LIMITS,
    base_title,
    describe_model,
    is_hub_id,
    over_optimisation,
    training_table,
    without_folders,
    worse_prompts,
)
from rlvid.export.evaluation import CardEvaluation, ExportedModel, find_evaluated
from rlvid.models.folders import WAN, family
from rlvid.models.stored import OLDEST
from rlvid.models.text_rows import TEXT_LENGTH
from rlvid.models.video_shape import VideoShape
from rlvid.runs.checkpoints import CheckpointRef, read_state


def model_card(
    config: RunConfig,
    checkpoint: CheckpointRef,
    run: Path,
    name: str,
    scale: float,
    shape: VideoShape,
    evaluation: Path | None = None,
    transformers: str = OLDEST["transformers"],
    text_rows: int = TEXT_LENGTH,
) -> str:
    """Returns the README.md of an exported model, in the form that the Hugging Face hub reads.

    Args:
        config: the run's.
        checkpoint: what was exported.
        run: the run's folder; the evaluation in it becomes the card's, if there is one.
        name: title of the card.
        scale: how much of what was learned is in the merged model.
        shape: of a video.
        evaluation: folder of another evaluation, which becomes the card's.
        transformers: the oldest version that reads the model.
        text_rows: of a prompt's embedding, of a Wan model.

    Raises:
        ValueError: the evaluation is damaged; or the one that was named has not the exported model.
    """
    evaluated = find_evaluated(ExportedModel(run, checkpoint.step, scale), evaluation)
    state = read_state(checkpoint.folder)
    parts = [_front_matter(config), f"# {markdown_text(name)}", _summary(config, checkpoint, scale)]
    parts += [
        _wan_usage(config, shape, text_rows)
        if family(config.model.path) is WAN
        else _usage(config, shape, transformers),
        training_table(config, state),
        _evaluation(evaluated),
        LIMITS,
        over_optimisation(run),
        *_worse(evaluated),
        _settings(config),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _worse(evaluated: CardEvaluation | None) -> list[str]:
    """Returns an evaluation's section on single prompts."""
    if evaluated is None:
        return []
    if evaluated.name is not None and evaluated.name not in evaluated.tuned:
        return []  # the base itself
    if evaluated.name is None:
        return ["## Prompts that got worse\n\nNot known: the evaluation is not of the exported model."]
    about = read_about(evaluated.folder)
    scores = read_scores(evaluated.folder, about)
    return [worse_prompts(scores, about.sets, about.models[0].name, [evaluated.name])]


def _front_matter(config: RunConfig) -> str:
    known: dict[str, Any] = {"base_model": config.model.path} if is_hub_id(config.model.path) else {}
    kind = "lora" if config.model.finetune == "lora" else "full-fine-tuning"
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


def _summary(config: RunConfig, checkpoint: CheckpointRef, scale: float) -> str:
    scaled = "" if scale == 1 else f" The merged weights hold {scale:g} of what was learned."
    adapter = " The adapter alone is in `adapter/`." if config.model.finetune == "lora" else ""
    return f"{describe_model(config, checkpoint)}{scaled} This folder is the whole model in diffusers' layout.{adapter}"


def _usage(config: RunConfig, shape: VideoShape, transformers: str) -> str:
    sampling, path = config.sampling, config.model.path
    base, where = (
        (path, "") if is_hub_id(path) else ("BASE", f"\n`BASE` is the folder of the base, {base_title(config)}.")
    )
    if path in BUILT_IN:
        shown = f"from rlvid.models.folders import builtin_folder as f; print(f({path!r}))"
        where = f"""\n`BASE` is the folder that `python -c "{shown}"` prints."""
    negative = f"negative_prompt={sampling.negative_prompt!r}, " if sampling.negative_prompt else ""
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
    "a prompt", {negative}num_frames={shape.frames}, height={shape.height}, width={shape.width},
    num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance:g},
).frames[0]
```

Seeds are rlvid's own: `rlvid generate --seed 0` and `torch.Generator().manual_seed(0)` draw different noise, so they
make different videos. The same `latents` make the same video.
{adapter if config.model.finetune == "lora" else ""}"""


def _wan_usage(config: RunConfig, shape: VideoShape, text_rows: int) -> str:
    sampling, path = config.sampling, config.model.path
    base, where = (path, "") if is_hub_id(path) else ("BASE", f" `BASE` is its folder, {base_title(config)}.")
    rows = f", max_sequence_length={text_rows}" if text_rows != TEXT_LENGTH else ""
    adapter = f"""
The adapter on the base, called with the same arguments.{where}

```python
pipeline = WanPipeline.from_pretrained("{base}", torch_dtype=torch.float32)
pipeline.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")
```

The settings of the base's scheduler may differ: `scheduler/` of this folder has the shift of the run.
"""
    return f"""## Use

It was written with transformers {version("transformers")} and diffusers {version("diffusers")}.

```python
import torch
from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("FOLDER", torch_dtype=torch.float32)
frames = pipeline(
    "a prompt", negative_prompt={sampling.negative_prompt!r}, num_frames={shape.frames}, height={shape.height},
    width={shape.width}, num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance:g}{rows},
).frames[0]
```

The pipeline's sampler is the base's. rlvid takes Euler's steps on Wan's own grid of noise levels, so its videos of the
same noise are not the same.
{adapter if config.model.finetune == "lora" else ""}"""


def _evaluation(evaluated: CardEvaluation | None) -> str:
    """Returns the table of the base and the exported model; of all models where the exported one is not there."""
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


def _settings(config: RunConfig) -> str:
    settings = without_folders(config.model_dump(mode="json", exclude={"output": True}))
    return f"## Settings\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```"
