"""Checks of a text-to-video model's folder: its weights, videos, noise levels and prompts; reads no numbers."""

from collections.abc import Iterator

from rlvid.config.model import ModelConfig
from rlvid.doctor.finding import Finding, finding
from rlvid.models.flow_shift import scheduler_file, scheduler_shift
from rlvid.models.folders import STRUCTURES, WAN, family, structure_folder
from rlvid.models.load import check_model, denoiser_outline
from rlvid.models.text_limit import model_text_limit
from rlvid.models.video_shape import resolved_shape


def check_model_folder(path: str) -> Iterator[Finding]:
    """Checks the model of ``model.path``; stops at the first error, for the rest depends on it."""
    of = family(path)
    try:
        check_model(path)
    except ValueError as error:
        yield Finding("weights", "error", str(error), "complete the folder, or name another: --model")
        return
    parameters = sum(each.numel() for each in denoiser_outline(path).parameters())
    title = "Wan" if of is WAN else "3D U-Net"
    yield Finding("weights", "ok", f"{path}: {title}, {parameters:,} parameters in {of.denoiser}/")
    yield _check_shape(path)
    if of is WAN:
        yield from check_shift(path)
    limit = model_text_limit(path)
    yield Finding("prompts", "ok", f"the text encoder reads {limit.tokens} tokens")


def _check_shape(path: str) -> Finding:
    """Checks that a model's videos have a usual shape; a Wan folder with few positions has none."""
    try:
        shape = resolved_shape(ModelConfig(path=path))
    except ValueError as error:
        return Finding("videos", "warning", str(error), "set model.frames and model.size in each run")
    return Finding("videos", "ok", f"by default {shape.frames} frames of {shape.pixels} pixels, {shape.fps} a second")


def check_shift(path: str) -> Iterator[Finding]:
    """Checks that a flow model's scheduler has a shift of noise levels; without it, sampling starts too far in."""
    folder, way_out = structure_folder(path), "set model.shift, for Wan2.1 3 to 12"
    try:
        shift = scheduler_shift(folder)
    except ValueError as error:
        yield Finding("noise levels", "warning", str(error), way_out)
        return
    found = f"{scheduler_file(folder)} has no shift" if shift is None else f"noise levels are shifted by {shift:g}"
    yield finding("noise levels", shift is not None or path in STRUCTURES, found, way_out, "warning")
