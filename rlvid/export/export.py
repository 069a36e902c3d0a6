"""Exports a run: the full model in diffusers' layout, the adapter in PEFT's, and a model card.

The folder, which appears atomically::

    README.md                             the model card
    model_index.json, unet/ or transformer/, vae/, text_encoder/, tokenizer/, scheduler/     the merged model
    adapter/                              the adapter alone, where one was trained
    pytorch_lora_weights.safetensors      the same of a Wan model, for ``WanPipeline.load_lora_weights``
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
from diffusers import DDIMScheduler, ModelMixin
from safetensors.torch import save_file
from torch import Tensor

from rlvid.config import RunConfig
from rlvid.export.card import model_card
from rlvid.export.evaluation import ExportedModel, find_evaluated
from rlvid.files import atomic_folder
from rlvid.models.base import VideoModel
from rlvid.models.flow_shift import scheduler_file, shift_key
from rlvid.models.folders import RANDOM, STRUCTURES, WAN, family, model_folder
from rlvid.models.load import check_model, load_video_model
from rlvid.models.lora import merge_lora, read_lora, save_lora
from rlvid.models.noise_path import NoisePath, RectifiedFlow
from rlvid.models.stored import CLASSES, copy_part, oldest_transformers, save_text_encoder, save_tokenizer, wan_classes
from rlvid.models.text_limit import text_length
from rlvid.models.trained import blend, check_trained
from rlvid.models.unet3d import UNet3DModel
from rlvid.models.video_shape import resolved_shape
from rlvid.models.weights import read_json
from rlvid.runs.checkpoints import CheckpointRef
from rlvid.runs.find import find_run

PIPELINE_LORA = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives to an adapter's file."""


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
        ValueError: no such run or checkpoint, its adapter is limited to noise levels or does not fit the model, ``out``
            is taken, ``scale`` is no finite number, or the evaluation has not this model.
    """
    if not math.isfinite(scale):
        raise ValueError(f"--lora-scale {scale}: expected a finite number, such as 1")
    config, found = find_run(run, step)
    if (levels := config.model.lora.levels) is not None:
        raise ValueError(
            f"run {run}: its adapter acts at the noise levels model.lora.levels = {list(levels)} alone, and an "
            "exported model would have it at all levels; make its videos with rlvid generate"
        )
    if (path := config.model.path) in STRUCTURES and family(path) is WAN:
        raise ValueError(f"run {run}: model.path = {path!r} has no text encoder, so there is no whole model to export")
    if evaluation is not None:  # before minutes are spent on the weights
        find_evaluated(ExportedModel(found.folder.parent, found.step, scale), evaluation)
    check_model(path)
    check_trained(config.model, found.folder)
    with _whole(out) as folder:
        model = merged_model(config, found, scale)
        save_model(model, config, folder)
        if config.model.finetune == "lora":
            lora = config.model.lora
            state, factor = read_lora(found.folder / "adapter"), scale * lora.scale
            save_lora(state, lora.rank, lora.targets, folder / "adapter", factor)
            if family(config.model.path) is WAN:
                save_for_pipeline(state, folder / PIPELINE_LORA, factor)
        name, run_folder = out.resolve().name, found.folder.parent
        card = model_card(
            config, found, run_folder, name, scale, resolved_shape(config.model), evaluation,
            transformers=oldest_transformers(folder), text_rows=text_length(folder),
        )  # fmt: skip
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def merged_model(config: RunConfig, found: CheckpointRef, scale: float) -> VideoModel:
    """Returns a run's model in float32 on the CPU, with ``scale`` of the learned change merged into the denoiser."""
    model = load_video_model(config.model.model_copy(update={"precision": "float32"}), text=False)
    if config.model.finetune == "lora":
        merge_lora(model.denoiser, read_lora(found.folder / "adapter"), scale * config.model.lora.scale)
    else:
        base = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
        blend(model.denoiser, base, found.folder, scale)
    return model


def save_model(model: VideoModel, config: RunConfig, folder: Path) -> None:
    """Writes a model in diffusers' layout, with a scheduler that walks the chain of rlvid's own sampler.

    What nobody trained is the base's, byte for byte, for libraries change what they write. Only the base with random
    weights is in no file.
    """
    base = model_folder(config.model.path)
    of = family(config.model.path)
    if not torch.cuda.is_available():  # saving looks whether DeepSpeed is there, which then warns of the missing GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    assert isinstance(model.denoiser, ModelMixin), "the network itself, in no wrapper of training"
    model.denoiser.save_pretrained(folder / of.denoiser)
    if config.model.path == RANDOM:
        assert isinstance(model, UNet3DModel)
        model.vae.save_pretrained(folder / "vae")
        save_text_encoder(model.text_encoder, folder / "text_encoder")
        save_tokenizer(model.tokenizer, folder / "tokenizer")
    else:
        for name in ("vae", "text_encoder", "tokenizer"):
            copy_part(base / name, folder / name, network=name != "tokenizer")
    shutil.copyfile(base / of.denoiser / "config.json", folder / of.denoiser / "config.json")
    if of is WAN:
        _save_wan_pipeline(model.path, base, folder)
        return
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


def _save_wan_pipeline(path: NoisePath, base: Path, folder: Path) -> None:
    """Writes the base's scheduler with the run's shift, and ``model_index.json``.

    diffusers has no scheduler that walks Wan's own grid of levels with Euler's steps, as rlvid does. A boundary between
    two transformers, which means nothing to rlvid, would send diffusers' pipeline to the one that is not there.
    """
    assert isinstance(path, RectifiedFlow)
    copy_part(base / "scheduler", folder / "scheduler", network=False)
    file = scheduler_file(folder)
    settings = read_json(file, "scheduler")
    settings[shift_key(settings)] = path.shift
    index = base / "model_index.json"
    classes = read_json(index, "model") if index.is_file() else {"_class_name": WAN.pipeline, **wan_classes(base)}
    classes.pop("boundary_ratio", None)
    for target, content in ((file, settings), (folder / "model_index.json", classes)):
        target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_for_pipeline(state: dict[str, Tensor], path: Path, factor: float) -> None:
    """Writes an adapter for ``WanPipeline.load_lora_weights``; its B holds the factor, for readers expect alpha = r."""
    named = {f"transformer.{name}": factor * t if ".lora_B." in name else t for name, t in state.items()}
    save_file(named, path, metadata={"format": "pt"})


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write into, that becomes ``out`` when all went well, and else is gone."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists already; choose a folder that does not, or delete it")
    with atomic_folder(out) as folder:
        yield folder
