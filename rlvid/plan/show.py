"""The plan in plain words and three tables."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
from rich.console import RenderableType
from rich.table import Table

from rlvid.metric_names import percent
from rlvid.models.attention import WAY_OUT, keeps_scores, kept_growth
from rlvid.models.unet3d import DTYPES
from rlvid.plan.counts import Calls
from rlvid.plan.memory import machine_memory
from rlvid.plan.plan import Plan
from rlvid.plan.trial import Trial
from rlvid.reward.load import scores_whole_videos


def render(plan: Plan) -> Iterator[RenderableType]:
    """Yields the tables and lines to print."""
    config, parts, counts = plan.config, plan.parts, plan.counts
    latents = " x ".join(map(str, parts.latent_shape))
    yield (
        f"{config.name}: {config.method.name} on the reward {config.reward.name}, {config.train.steps:,} steps of "
        f"{config.train.batch_size} videos, {config.train.workers} worker(s), {config.micro_batch} video(s) at once on "
        f"each, ZeRO stage {config.train.zero_stage}, {config.model.precision}"
    )
    adapted = f" in {parts.adapted_layers} layers" if parts.adapted_layers else ""
    yield (
        f"parameters: {parts.denoiser.parameters:,} base, {parts.denoiser.trainable:,} trainable{adapted}; autoencoder "
        f"{parts.autoencoder.parameters:,}, text encoder {parts.text_encoder.parameters:,}, reward "
        f"{parts.reward.parameters:,}, held-out reward {parts.held_out.parameters:,}"
    )
    if not parts.causal:
        whole = parts.denoiser.parameters + (parts.denoiser.trainable if parts.adapted_layers else 0)
        yield (
            f"in units of 2^20, as InstructVideo's paper counts: {parts.denoiser.trainable / 2**20:,.2f} M trainable "
            f"of {whole / 2**20:,.2f} M"
        )
    decoded = _number(_forward(counts.decoder))
    if parts.causal:
        decoded += f" chunks decoded and {_number(counts.decoder.again)} again"
    else:
        decoded += " decodes"
    yield (
        f"a sample: {parts.frames} frames of {parts.height} x {parts.width} pixels, latents {latents}; "
        f"{_number(_forward(counts.denoiser))} {'transformer' if parts.causal else 'U-Net'} evaluations and "
        f"{_number(counts.denoiser.again)} again in the backward pass, {decoded}, "
        f"{_number(_forward(counts.reward))} images rewarded, {_number(_forward(counts.held_out))} by the held-out "
        f"reward; {_number(counts.optimiser_steps)} optimiser step(s) a batch"
    )
    segments, rest = config.reward.segments, parts.frames % config.reward.segments
    if rest and math.isfinite(config.reward.attenuation) and not scores_whole_videos(config.reward):
        yield (
            f"reward.segments = {segments} does not divide the {parts.frames} frames of a video: the last "
            f"{'one is' if rest == 1 else f'{rest} are'} never drawn"
        )
    yield _work(plan)
    yield _memory(plan)
    yield from _hints(plan)
    yield from warnings(plan)
    yield from _main_memory(plan)
    if plan.text_bytes:
        yield (
            f"before training, on its own: the text encoder embeds each prompt once, {gib(plan.text_bytes)} and "
            f"{flops(plan.text_flops)} a prompt; it does not stay beside training"
        )
    if plan.floor:
        yield (
            f"before training, in a process of its own: the motion of {plan.floor.videos} videos of the base model "
            f"(floor: base), {gib(plan.floor.peak)} and {flops(plan.floor.flops)}"
        )
    if plan.guard:
        stage = max(("chain", "decode", "rewards"), key=plan.guard.__getitem__)
        weights = gib(plan.guard["weights"])
        host = f"; {gib(plan.guard_host)} of main memory for the base's weights" if plan.guard_host else ""
        yield f"guard: {gib(plan.guard_peak)} in a process of its own, {weights} of them weights; peak in {stage}{host}"
    yield _disk(plan)


def render_trial(plan: Plan, trial: Trial) -> Iterator[RenderableType]:
    """Yields the seconds of a worker's step on this machine."""
    train = plan.config.train
    table = Table("Stage", "Seconds a step", "Share", title="Measured here", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds in trial.stages.items():
        table.add_row(name, f"{seconds:.3g}", percent(seconds / trial.step))
    table.add_section()
    table.add_row("all", f"{trial.step:.3g}", percent(1, 0))
    yield table
    where = "a GPU" if trial.device == "cuda" else f"the CPU, {trial.threads} thread(s)"
    memory = ""
    if trial.memory is not None:
        memory = f"; {'peak' if trial.device == 'cuda' else 'the process grew by'} {gib(trial.memory)}"
    yield f"on {where}: one worker's part of a step, without Ray and DeepSpeed{memory}"
    whole, budget = trial.step * train.steps, train.max_seconds or math.inf
    ends = f"; train.max_seconds ends them after {_duration(budget)}" if budget < whole else ""
    yield (
        f"at this pace {train.steps:,} steps take {_duration(whole)}{ends}; the start, videos of TensorBoard, "
        "checkpoints and the guard come on top"
    )
    if trial.random:
        yield f"random weights stood in for {' and '.join(trial.random)}, whose files are not on this machine"


def _work(plan: Plan) -> Table:
    total, fixed = sum(plan.flops.values()), sum(plan.resident.values())
    unit, size_of_unit = _unit(total)
    table = Table(
        "Stage", f"{unit} a sample", "Share", "Peak memory", title="Work and memory of a worker", title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys([*plan.flops, *plan.stages]):
        work, size = plan.flops.get(name, 0.0), plan.stages.get(name, 0)
        if work or size:
            peak = f"{gib(fixed + size)}" if size else ""
            table.add_row(name, f"{work / size_of_unit:,.2f}", percent(work / total), peak)
    for name, size in plan.videos.items():
        table.add_row(name, "", "", gib(fixed + size))
    table.add_section()
    table.add_row("all", f"{total / size_of_unit:,.2f}", percent(1, 0), gib(plan.peak))
    return table


def _memory(plan: Plan) -> Table:
    table = Table("Stays through a step", "Memory", title="Of the peak memory", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in plan.resident.items():
        if size:
            table.add_row(name, gib(size))
    return table


def _hints(plan: Plan) -> Iterator[str]:
    stage = max(plan.all_stages, key=plan.all_stages.__getitem__)
    yield f"peak: {gib(plan.peak)} on each worker, in {stage}; a GPU's own workspace and fragmentation come on top"
    yield (
        f"  with activations recomputed in the backward pass {gib(plan.checkpointing['recomputed'])}, with all of them "
        f"kept {gib(plan.checkpointing['kept'])}"
    )
    for setting, peak in plan.advice.items():
        yield f"  {setting} lowers it to {gib(peak)}"
        if setting in plan.advice_host:
            yield f"    and takes {gib(plan.advice_host[setting])} of main memory on each worker"
    if plan.config.model.precision == "float32" and plan.parts.causal:
        yield (
            "  model.precision=bfloat16 halves most of the transformer's memory, where the device has it; the "
            "autoencoder stays float32"
        )
    elif plan.config.model.precision == "float32":
        yield "  model.precision=bfloat16 halves the weights and most of the rest, where the device has it"
    yield (
        f"a step of {plan.config.train.batch_size} videos: {flops(plan.flops_per_step)} over all workers; "
        f"the run: {flops(plan.flops_per_step * plan.config.train.steps)}"
    )


def as_json(plan: Plan, trial: Trial | None = None) -> str:
    """Returns the plan as JSON, with its warnings and what a trial measured."""
    found = plan.as_dict() | ({"warnings": said} if (said := list(warnings(plan))) else {})
    return json.dumps(found | ({"measured": asdict(trial) | {"step": trial.step}} if trial else {}), indent=2)


def warnings(plan: Plan) -> Iterator[str]:
    """Yields a warning where the transformer's attention keeps a matrix of scores, which the plan does not count.

    It is tested on the device that training on this machine would use.
    """
    if not plan.parts.causal:
        return
    precision = plan.config.model.precision
    on_gpu = plan.config.train.use_gpu is not False and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        growth = kept_growth(DTYPES[precision], device)
    except (RuntimeError, ValueError, AssertionError):  # a kernel for another device or precision, or a full GPU
        return
    if keeps_scores(growth):
        yield (
            f"warning: attention in {precision} keeps its matrix of scores, {growth:.1f} times the bytes for 4 times "
            f"the tokens; the plan counts a kernel without it, and training will need more: {WAY_OUT}"
        )


def _main_memory(plan: Plan) -> Iterator[str]:
    """Yields the host's memory for a decoder's caches, and a way out where this machine has less."""
    if not plan.host:
        return
    model, workers, room = plan.config.model, plan.config.train.workers, machine_memory()
    parts = " and ".join(f"{gib(size)} for {name}" for name, size in plan.host.items())
    yield f"main memory: {gib(plan.host_peak)} on each worker beside its process: {parts}"
    if room is None or plan.host_peak * workers < room:
        return
    ways = ["model.decode_share=false"] if model.decode_window is not None and model.decode_share else []
    ways += ["model.decode_offload=false"] if model.decode_offload else []
    ways += ["model.decode_cache_precision=bfloat16"] if model.decode_cache_precision == "float32" else []
    yield (
        f"  this machine has {gib(room)}, too little if all {workers} worker(s) run on it; less need: {', '.join(ways)}"
    )


def _disk(plan: Plan) -> Table:
    table = Table("On disk", "Size", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in plan.disk.items():
        if size:
            table.add_row(name, gib(size))
    return table


def _duration(seconds: float) -> str:
    """Returns seconds in the unit that a person would say."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def flops(number: float) -> str:
    """Returns floating-point operations as a number with a unit."""
    unit, size = _unit(number)
    return f"{number / size:,.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"


def _unit(number: float) -> tuple[str, float]:
    """Returns the unit of so many floating-point operations, and its size."""
    sizes = {"EFLOPs": 1e18, "TFLOPs": 1e12}
    return next(((unit, size) for unit, size in sizes.items() if number >= size / 10), ("GFLOPs", 1e9))


def gib(size: float) -> str:
    """Returns bytes as a number with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _forward(calls: Calls) -> float:
    return calls.plain + calls.graph


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"
