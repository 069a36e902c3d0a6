"""The memory that a worker needs in each stage, put together from what a row of each network needs."""

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, Unpack

from rlvid.config import RunConfig
from rlvid.plan.counts import Counts
from rlvid.plan.network import DecodeCost
from rlvid.plan.parts import Parts, outline_parts
from rlvid.plan.videos import shown_videos

_BUCKET = 500_000_000
"""Most float32 gradients in the buffer that DeepSpeed gathers them in, from stage 1 on (``reduce_bucket_size``)."""
_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (``stage3_max_live_parameters``)."""


def resident(parts: Parts, config: RunConfig) -> dict[str, int]:
    """Returns bytes on each worker that stay through a step, by what they are.

    AdamW keeps two float32 numbers for each trained parameter, and under ZeRO a float32 copy beside them. Stage 1
    spreads these over the workers, stage 2 the gradients too, stage 3 the denoiser's own weights.
    """
    trained, stage, workers = parts.denoiser.trainable, config.train.zero_stage, config.train.workers
    denoiser = parts.denoiser.weights
    if stage == 3:
        live = min(1.0, _LIVE / parts.denoiser.parameters)
        denoiser = denoiser // workers + (int(live * denoiser) if workers > 1 else 0)
    videos, states = config.train.batch_size // workers, config.method.kept_states(config.sampling.steps)
    texts = [parts.text_encoder] if parts.text_resident else []
    frozen = (parts.autoencoder, *texts, parts.reward, parts.held_out)
    return {
        "denoiser": denoiser,
        "other weights": sum(part.weights for part in frozen),
        "gradients": 4 * trained // (workers if stage >= 2 else 1),
        "optimiser": 8 * trained if stage == 0 else 12 * trained // workers,
        "DeepSpeed's buffer": 4 * min(trained, _BUCKET) if stage else 0,
        "rollouts": 4 * videos * states * math.prod(parts.latent_shape),
    }


def stages(
    parts: Parts,
    counts: Counts,
    config: RunConfig,
    *,
    micro_batch: int | None = None,
    decode_chunk: int | None = None,
    recompute: bool | None = None,
) -> dict[str, int]:
    """Returns bytes that each stage of a step needs at its peak, beside what is ``resident``.

    The last three arguments stand in for the run's settings of the same meaning, to see what they would change.
    """
    share = (micro_batch or config.micro_batch) / config.micro_batch
    again = config.train.checkpoint_activations if recompute is None else recompute
    unet = parts.denoiser.cost_recomputed if again else parts.denoiser.cost
    judge = parts.reward.cost
    videos, images = counts.denoiser, counts.reward
    decode = _decoding(parts, counts, config, share, decode_chunk or config.model.decode_chunk, again)
    chain_held = share * videos.held_rows * unet.kept
    judged = share * max(images.held_rows, images.plain_rows)
    in_judge = min(judged, parts.reward.chunk)
    judging, judge_held, judge_back = judged * judge.kept, judged * judge.kept, judged * judge.peak
    if parts.reward.recompute:  # a chunk's input stays, and its activations come and go
        judge_held = judged * 3 * parts.pixels * 4
        judging, judge_back = judge_held + in_judge * judge.plain_peak, judge_held + in_judge * judge.peak
    judging_apart = _held_out(parts, counts, share, decode_chunk or config.model.decode_chunk, judged)
    apart = 1 if config.train.rollout_batch else share  # a size of its own does not follow the micro-batch
    found = {"chain without gradient": apart * videos.plain_rows * unet.plain_peak}
    if config.method.needs_gradient:
        held = chain_held + decode.held
        found["chain with gradient"] = share * videos.graph_rows * unet.plain_peak + chain_held
        found["decode"] = chain_held + decode.forward_peak
        found["reward"] = held + judging
        found["held-out reward"] = held + judge_held + judging_apart if judging_apart else 0
        found["backward through the reward"] = held + judge_back
        found["gradient share"] = held + decode.share_peak if decode.share_peak else 0
        found["backward through the decoder"] = chain_held + decode.backward_peak
        found["backward through the denoiser"] = chain_held + share * videos.graph_rows * (unet.peak - unet.kept)
    else:
        pixels = _pixels(parts, counts, config, share)
        found["decode"] = decode.plain_peak
        found["reward"] = in_judge * judge.plain_peak + pixels
        found["held-out reward"] = judging_apart + pixels if judging_apart else 0
        found["backward through the denoiser"] = share * videos.graph_rows * unet.peak
    return {name: int(size) for name, size in found.items() if size}


class Instead(TypedDict, total=False):
    """Values that stand in for the run's settings of the same meaning; those of ``stages``."""

    micro_batch: int
    decode_chunk: int
    recompute: bool


def peak(parts: Parts, counts: Counts, config: RunConfig, **instead: Unpack[Instead]) -> int:
    """Returns the most bytes that a worker needs, TensorBoard's videos included."""
    videos = shown_videos(parts, config, instead.get("micro_batch"), instead.get("decode_chunk"))
    at_once = {**stages(parts, counts, config, **instead), **videos}
    return sum(resident(parts, config).values()) + max(at_once.values())


def host(parts: Parts, counts: Counts, config: RunConfig) -> dict[str, int]:
    """Returns bytes of the CPU's memory that a worker needs at once beside its process, by what they are."""
    if not config.method.needs_gradient:
        return {}
    decode = _decoding(parts, counts, config, 1, config.model.decode_chunk, config.train.checkpoint_activations)
    found = {"the decoder's caches": decode.host, "the measurement of decode/gradient_share": decode.share_host}
    return {name: int(size) for name, size in found.items() if size}


def machine_memory() -> int | None:
    """Returns the bytes of this machine's memory, or of its container's part (cgroup v2); None if neither is known."""
    names, limit = ("SC_PHYS_PAGES", "SC_PAGE_SIZE"), Path("/sys/fs/cgroup/memory.max")
    found = [math.prod(map(os.sysconf, names))] if {*names} <= os.sysconf_names.keys() else []
    if limit.is_file() and (text := limit.read_text("utf-8").strip()).isdigit():
        found.append(int(text))
    return min(found, default=None)


def _decoding(parts: Parts, counts: Counts, config: RunConfig, share: float, chunk: int, again: bool) -> DecodeCost:
    """Returns the memory of a micro-batch's decode; the gradient of the frames counts as held, too."""
    pixels = _pixels(parts, counts, config, share)
    if parts.causal:
        of_a_video = parts.autoencoder.decode if again else parts.autoencoder.decode_kept
        assert of_a_video is not None
        videos = share * max(counts.first_chunk.plain_rows, counts.first_chunk.graph_rows)
        scaled = {name: videos * size for name, size in asdict(of_a_video).items()}
        measured = {"share_peak": of_a_video.share_peak, "share_host": of_a_video.share_host}  # one video at a time
        return DecodeCost(**scaled | measured | {"held": scaled["held"] + pixels})
    vae, frames = parts.autoencoder.cost, _decoded(counts, config, share)
    in_chunk, kept = min(chunk, frames), 0 if again else frames * vae.kept
    held = kept + 2 * pixels
    return DecodeCost(
        plain_peak=in_chunk * vae.plain_peak + pixels,
        forward_peak=kept + in_chunk * vae.plain_peak + pixels,
        held=held,
        backward_peak=held + in_chunk * (vae.peak if again else vae.peak - vae.kept),
    )


def _held_out(parts: Parts, counts: Counts, share: float, chunk: int, judged: float) -> float:
    """Returns the bytes of the held-out reward, beside the frames that the trained one sees; 0 without a network.

    Where it sees others, these are decoded for it without a graph.
    """
    cost, at_once = parts.held_out.cost, parts.held_out.chunk
    if not counts.decoded_again:
        return min(judged, at_once) * cost.plain_peak
    frames = share * counts.held_out.plain_rows
    if parts.causal:
        assert parts.autoencoder.decode is not None
        videos = share * max(counts.first_chunk.plain_rows, counts.first_chunk.graph_rows)
        decoding = videos * parts.autoencoder.decode.plain_peak
    else:
        decoding = min(chunk, frames) * parts.autoencoder.cost.plain_peak
    return frames * 3 * parts.pixels * 4 + max(decoding, min(frames, at_once) * cost.plain_peak)


def _decoded(counts: Counts, config: RunConfig, share: float) -> float:
    """Returns the frames of a micro-batch that are alive at once."""
    return share * (counts.frames_held or config.micro_batch * counts.frames)


def _pixels(parts: Parts, counts: Counts, config: RunConfig, share: float) -> float:
    """Returns the bytes of these frames, float32."""
    return _decoded(counts, config, share) * 3 * parts.pixels * 4


def advice(parts: Parts, counts: Counts, config: RunConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Returns settings that lower the peak by a twentieth or more, each alone, and the peak with each.

    The second table has the bytes of the CPU's memory with those of them that need any, as ``host`` adds them up.
    """
    now, step = peak(parts, counts, config), stages(parts, counts, config)
    tried, on_host = dict[str, int](), dict[str, int]()

    def offer(setting: str, **instead: Unpack[Instead]) -> None:
        tried[setting] = peak(parts, counts, config, **instead)

    if not config.train.checkpoint_activations:
        offer("train.checkpoint_activations=true", recompute=True)
    share = config.train.batch_size // config.train.workers
    for smaller in sorted({config.micro_batch // 2, 1}, reverse=True):
        if 0 < smaller < config.micro_batch and share % smaller == 0:
            offer(f"train.micro_batch={smaller}", micro_batch=smaller)
    for key, value in _of_the_decoder(parts, config) if _decoder_needs_most(step) else ():
        cut = config.model_copy(update={"model": config.model.model_copy(update={key: value})})
        cut_parts, setting = outline_parts(cut), f"model.{key}={str(value).lower()}"
        tried[setting] = peak(cut_parts, counts, cut)
        on_host[setting] = sum(host(cut_parts, counts, cut).values())
    for chunk in sorted(set() if parts.causal else {config.model.decode_chunk // 4, 1}, reverse=True):
        if 0 < chunk < config.model.decode_chunk:
            offer(f"model.decode_chunk={chunk}", decode_chunk=chunk)
    lower = {setting: size for setting, size in tried.items() if size <= 0.95 * now}
    return lower, {setting: size for setting, size in on_host.items() if size and setting in lower}


def _decoder_needs_most(found: dict[str, int]) -> bool:
    return max(found, key=found.__getitem__) in ("decode", "gradient share", "backward through the decoder")


def _of_the_decoder(parts: Parts, config: RunConfig) -> list[tuple[str, bool | int | str]]:
    """Returns settings of a causal decoder that need less memory.

    They are caches on the CPU or in half precision, no measurement, and shorter windows.
    """
    if not (parts.causal and config.method.needs_gradient):
        return []
    model, found = config.model, list[tuple[str, bool | int | str]]()
    now = min(model.decode_window or parts.latent_shape[1], parts.latent_shape[1])
    if config.train.checkpoint_activations or model.decode_window is not None:
        found += [("decode_offload", True)] if not model.decode_offload else []
        found += [("decode_cache_precision", "bfloat16")] if model.decode_cache_precision == "float32" else []
    if model.decode_window is not None and model.decode_share:
        found.append(("decode_share", False))
    return [*found, *(("decode_window", window) for window in (4, 1) if window < now)]
