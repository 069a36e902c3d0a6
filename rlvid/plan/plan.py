"""The plan of a run: what it counts, what it costs, what it needs."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlvid.config import RunConfig
from rlvid.diffusion.schedule import check_chain
from rlvid.models.video_shape import resolved_shape
from rlvid.plan.counts import Calls, Counts, count
from rlvid.plan.guard import guard_memory
from rlvid.plan.measure import Cost
from rlvid.plan.memory import advice, host, peak, resident, stages
from rlvid.plan.parts import Parts, outline_parts
from rlvid.plan.videos import Floor, measured_floor, shown_videos


@dataclass(frozen=True)
class Plan:
    """The plan of a run: bytes of one worker, FLOPs of one sample.

    Attributes:
        parts: the networks.
        counts: calls for each sample.
        flops: of each stage, for one sample.
        resident: bytes that stay through a step.
        stages: bytes that each stage of a step needs beside them.
        videos: bytes that each stage of TensorBoard's videos needs beside them, see ``shown_videos``.
        advice: settings that lower the peak, and the peak with each.
        advice_host: bytes of the CPU's memory with those of them that need any.
        host: bytes of the CPU's memory that a worker needs beside its process, by what they are.
        checkpointing: the peak with activations ``recomputed`` and with all of them ``kept``.
        disk: bytes of what is written.
        text_bytes: that embedding a prompt needs before training, where the text encoder does not stay; else 0.
        text_flops: of a prompt's embedding, which a step does not pay for.
        guard: bytes of the guard's process, see ``guard_memory``.
        floor: see ``measured_floor``.
    """

    config: RunConfig
    parts: Parts
    counts: Counts
    flops: dict[str, float]
    resident: dict[str, int]
    stages: dict[str, int]
    videos: dict[str, int]
    advice: dict[str, int]
    advice_host: dict[str, int]
    host: dict[str, int]
    checkpointing: dict[str, int]
    disk: dict[str, int]
    text_bytes: int
    text_flops: float
    guard: dict[str, int]
    floor: Floor | None

    @property
    def peak(self) -> int:
        """Bytes that a worker needs at the most."""
        return sum(self.resident.values()) + max(self.all_stages.values())

    @property
    def all_stages(self) -> dict[str, int]:
        """Bytes of the stages of a step, and of TensorBoard's videos."""
        return {**self.stages, **self.videos}

    @property
    def host_peak(self) -> int:
        """Bytes of the CPU's memory that a worker needs at once beside its process."""
        return sum(self.host.values())

    @property
    def guard_peak(self) -> int:
        """Bytes that the guard's process needs at the most; 0 without a guard."""
        stages = [size for name, size in self.guard.items() if name != "weights"]
        return self.guard["weights"] + max(stages) if self.guard else 0

    @property
    def guard_host(self) -> int:
        """Bytes of main memory for the base's weights, which the guard blends with a checkpoint of all weights."""
        return self.parts.denoiser.weights if self.guard and self.config.guard_blends else 0

    @property
    def flops_per_step(self) -> float:
        """FLOPs of a batch over all workers."""
        return sum(self.flops.values()) * self.config.train.batch_size

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        parts = asdict(self.parts)
        return {
            "run": self.config.name,
            "method": self.config.method.name,
            "parameters": {name: parts[name]["parameters"] for name in NETWORKS},
            "trainable_parameters": self.parts.denoiser.trainable,
            "adapted_layers": self.parts.adapted_layers,
            "latent_shape": list(self.parts.latent_shape),
            "calls_per_sample": {name: _calls(getattr(self.counts, name)) for name in CALLED},
            "optimiser_steps_per_batch": self.counts.optimiser_steps,
            "flops_per_row": {
                name: {"forward": parts[name]["cost"]["flops"], "backward": parts[name]["cost"]["backward_flops"]}
                for name in NETWORKS
            },
            "flops_per_sample": self.flops,
            "flops_per_step": self.flops_per_step,
            "resident_bytes": self.resident,
            "stage_bytes": self.all_stages,
            "peak_bytes": self.peak,
            "peak_bytes_with": self.advice,
            **({"host_bytes": self.host, "host_peak_bytes": self.host_peak} if self.host else {}),
            **({"host_peak_bytes_with": self.advice_host} if self.advice_host else {}),
            "peak_bytes_with_activations": self.checkpointing,
            "disk_bytes": self.disk,
            **({"guard_bytes": self.guard, "guard_peak_bytes": self.guard_peak} if self.guard else {}),
            **({"guard_host_bytes": self.guard_host} if self.guard_host else {}),
            **({"floor": self.floor._asdict()} if self.floor else {}),
            **({"text_embedding": {"bytes": self.text_bytes, "flops": self.text_flops}} if self.parts.causal else {}),
        }


NETWORKS = ("denoiser", "autoencoder", "text_encoder", "reward", "held_out")
CALLED = ("denoiser", "decoder", "reward", "held_out")


def make_plan(config: RunConfig) -> Plan:
    """Counts everything that ``config`` asks for; no weights are needed, and nothing is written.

    Raises:
        ValueError: the model's configuration is missing, or its settings do not fit together.
    """
    frames = resolved_shape(config.model).frames
    if config.reward.segments > frames:
        raise ValueError(
            f"reward.segments = {config.reward.segments} exceeds the {frames} frames of a video; allowed: 1 to {frames}"
        )
    check_chain(config)
    parts, counts = outline_parts(config), count(config, frames)
    lower, lower_host = advice(parts, counts, config)
    either = {
        name: peak(parts, counts, config, recompute=recompute)
        for name, recompute in (("recomputed", True), ("kept", False))
    }
    return Plan(
        config=config,
        parts=parts,
        counts=counts,
        flops=flops_by_stage(parts, counts, config),
        resident=resident(parts, config),
        stages=stages(parts, counts, config),
        videos=shown_videos(parts, config),
        advice=lower,
        advice_host=lower_host,
        host=host(parts, counts, config),
        checkpointing=either,
        disk=disk(parts, counts, config),
        text_bytes=0 if parts.text_resident else parts.text_encoder.weights + parts.text_encoder.cost.plain_peak,
        text_flops=parts.text_encoder.cost.flops,
        guard=guard_memory(parts, config),
        floor=measured_floor(parts, config),
    )


def flops_of_step(config: RunConfig) -> float:
    """Returns the FLOPs of a batch over all workers, which is ``Plan.flops_per_step`` without the rest of a plan."""
    check_chain(config)
    counts = count(config, resolved_shape(config.model).frames)
    return sum(flops_by_stage(outline_parts(config), counts, config).values()) * config.train.batch_size


def flops_by_stage(parts: Parts, counts: Counts, config: RunConfig) -> dict[str, float]:
    """FLOPs of one sample; text is encoded once and for all, and costs a step nothing."""
    judged = replace(counts.reward, again=counts.reward.graph) if parts.reward.recompute else counts.reward
    denoiser = parts.denoiser.cost_recomputed if config.train.checkpoint_activations else parts.denoiser.cost
    vae, first, later = parts.autoencoder, counts.first_chunk, _beside(counts.decoder, counts.first_chunk)
    share = _forward(counts.share, vae.cost) + _backward(counts.share, vae.cost)
    return {
        "chain without gradient": counts.denoiser.plain * parts.denoiser.cost.flops,
        "chain with gradient": counts.denoiser.graph * parts.denoiser.cost.flops,
        "decode": _forward(later, vae.cost) + _forward(first, vae.first_chunk),
        "reward": (counts.reward.plain + counts.reward.graph) * parts.reward.cost.flops,
        "held-out reward": counts.held_out.plain * parts.held_out.cost.flops,
        "backward through the denoiser": counts.denoiser.backward * denoiser.backward_flops,
        **({"gradient share": share} if share else {}),
        "backward through the decoder": _backward(later, vae.cost) + _backward(first, vae.first_chunk),
        "backward through the reward": _backward(judged, parts.reward.cost),
    }


def _forward(calls: Calls, cost: Cost) -> float:
    return (calls.plain + calls.graph) * cost.flops


def _backward(calls: Calls, cost: Cost) -> float:
    return calls.again * cost.flops + calls.backward * cost.backward_flops


def _beside(calls: Calls, others: Calls) -> Calls:
    """Returns the calls without some of them; the most rows at once stay."""
    rest = {name: getattr(calls, name) - getattr(others, name) for name in ("plain", "graph", "again", "backward")}
    return replace(calls, **rest)


def disk(parts: Parts, counts: Counts, config: RunConfig) -> dict[str, int]:
    """Returns bytes of files: float32 numbers, and archived frames as PNG, which are never larger than their pixels."""
    trained = parts.denoiser.trainable
    latents = math.prod(parts.latent_shape)
    frames = counts.archived * config.train.batch_size
    every, train = config.output.archive_every, config.train
    archived = -(-train.steps // every) if every else 0
    checkpoint = 4 * trained + (12 if train.zero_stage == 0 else 16) * trained
    return {
        "adapter": 4 * trained,
        "checkpoint": checkpoint,
        "checkpoints kept": checkpoint
        * min(config.output.keep_checkpoints, -(-train.steps // config.output.checkpoint_every)),
        "archive of a step, at most": int(frames * 3 * parts.pixels) if every else 0,
        "archive, at most": int(archived * frames * 3 * parts.pixels),
        # Zeros behind a prompt are not stored.
        f"an encoded clip{', at most' if parts.causal else ''}": 4 * (2 * latents + math.prod(parts.text_shape)),
    }


def _calls(calls: Any) -> dict[str, float]:
    return {name: getattr(calls, name) for name in ("plain", "graph", "again", "backward")}
