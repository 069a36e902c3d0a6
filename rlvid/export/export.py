"""Exports a run: the full model in diffusers' layout, the adapter in PEFT's, and a model card.

The folder, which appears atomically::

    README.md                             the model card
    model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/     the merged model
    adapter/                              the adapter alone, where one was trained
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, UNet3DConditionModel

from rlvid.config import RunConfig
from rlvid.export.card import model_card
from rlvid.export.evaluation import ExportedModel, find_evaluated
from rlvid.files import atomic_folder
from rlvid.models.folders import RANDOM, model_folder
from rlvid.models.lora import merge_lora, read_lora, save_lora
from rlvid.models.stored import CLASSES, copy_part, oldest_transformers, save_text_encoder, save_tokenizer
from rlvid.models.trained import blend
from rlvid.models.unet3d import UNet3DModel, load_model
from rlvid.runs.checkpoints import CheckpointRef
from rlvid.runs.find import find_run


def export_run(
    run: str | Path, out: Path, step: int | None = None, scale: float = 1.0, evaluation: Path | None = None
) -> Path:
    """Writes a run's model to a new folder; the run's own files stay as they are.

    Args:
        run: the run's folder, or the name of one under ``runs``.
        out: a folder that does not exist yet, or is empty.
        step: of the checkpoint; default: the latest.
        scale: how much of what was learned: 0 is the base, 1 the tuned model.
        evaluation: folder of the evaluation that the card shows; default: the run's own, if it has one.

    Returns:
        ``out``.

    Raises:
        ValueError: no such run or checkpoint, its adapter is limited to noise levels, ``out`` is taken, ``scale`` is no
            finite number, or the evaluation has not this model.
    """
    if not math.isfinite(scale):
        raise ValueError(f"--lora-scale {scale}: expected a finite number, such as 1")
    config, found = find_run(run, step)
    if (levels := config.model.lora.levels) is not None:
        raise ValueError(
            f"run {run}: its adapter acts at the noise levels model.lora.levels = {list(levels)} alone, and an "
            "exported model would have it at all levels; make its videos with rlvid generate"
        )
    if evaluation is not None:  # before minutes are spent on the weights
        find_evaluated(ExportedModel(found.folder.parent, found.step, scale), evaluation)
    with _whole(out) as folder:
        model = merged_model(config, found, scale)
        save_model(model, config, folder)
        if config.model.finetune == "lora":
            lora = config.model.lora
            save_lora(read_lora(found.folder / "adapter"), lora.rank, lora.targets, folder / "adapter", scale)
        name, run_folder = out.resolve().name, found.folder.parent
        card = model_card(
            config, found, run_folder, name, scale, model.frames, model.size, evaluation,
            transformers=oldest_transformers(folder),
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def merged_model(config: RunConfig, found: CheckpointRef, scale: float) -> UNet3DModel:
    """Returns a run's model in float32 on the CPU, with ``scale`` of the learned change merged into the denoiser."""
    model = load_model(config.model.path, frames=config.model.frames, size=config.model.size)
    if config.model.finetune == "lora":
        merge_lora(model.denoiser, read_lora(found.folder / "adapter"), scale)
    else:
        base = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
        blend(model.denoiser, base, found.folder, scale)
    return model


def save_model(model: UNet3DModel, config: RunConfig, folder: Path) -> None:
    """Writes a model in diffusers' layout, with a scheduler that walks the chain of rlvid's own sampler.

    What nobody trained is the base's, byte for byte, for libraries change what they write. Only the base with random
    weights is in no file.
    """
    base = model_folder(config.model.path)
    if not torch.cuda.is_available():  # saving looks whether DeepSpeed is there, which then warns of the missing GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    assert isinstance(model.denoiser, UNet3DConditionModel), "the network itself, in no wrapper of training"
    model.denoiser.save_pretrained(folder / "unet")
    if config.model.path == RANDOM:
        model.vae.save_pretrained(folder / "vae")
        save_text_encoder(model.text_encoder, folder / "text_encoder")
        save_tokenizer(model.tokenizer, folder / "tokenizer")
    else:
        for name in ("vae", "text_encoder", "tokenizer"):
            copy_part(base / name, folder / name, network=name != "tokenizer")
    shutil.copyfile(base / "unet" / "config.json", folder / "unet" / "config.json")
    sampler(config).save_pretrained(folder / "scheduler")
    index = {"_class_name": "TextToVideoSDPipeline", "_diffusers_version": diffusers.__version__, **CLASSES}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def sampler(config: RunConfig) -> DDIMScheduler:
    """Returns the base's noise schedule on the timesteps of ``rlvid.diffusion``, ending where the run's chains end."""
    base = DDIMScheduler.from_pretrained(model_folder(config.model.path) / "scheduler").config
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    return DDIMScheduler(
        **{name: base[name] for name in (*kept, "rescale_betas_zero_snr")},
        clip_sample=False,
        set_alpha_to_one=config.sampling.final_level == "exact",
        steps_offset=1,
        timestep_spacing="leading",
    )


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write into, that becomes ``out`` when all went well, and else is gone."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists already; choose a folder that does not, or delete it")
    with atomic_folder(out) as folder:
        yield folder
