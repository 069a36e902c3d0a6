"""The cost of generating videos: for the guard, for TensorBoard, and for a floor that a run measures."""

from typing import NamedTuple

from rlvid.config import RunConfig
from rlvid.config.train import FLOOR_VIDEOS, SHOWN_VIDEOS
from rlvid.diffusion.generate import videos_at_once
from rlvid.plan.parts import Parts


class Generating(NamedTuple):
    """The peak in bytes of a chain without a graph, and of decoding all frames, their pixels left out."""

    chain: int
    decode: int
    together: int
    """Videos that are made at once."""


def generating(parts: Parts, config: RunConfig, videos: int, decode_chunk: int | None = None) -> Generating:
    """Returns the memory of generating so many videos; ``decode_chunk`` stands in for the run's setting."""
    together = videos_at_once(parts.latent_shape, videos)
    rows = together * (1 if config.sampling.guidance == 1 else 2)
    autoencoder, frames = parts.autoencoder, together * parts.frames
    if autoencoder.decode is None:
        decode = min(frames, decode_chunk or config.model.decode_chunk) * autoencoder.cost.plain_peak
    else:
        decode = int(together * autoencoder.decode.plain_peak)
    return Generating(rows * parts.denoiser.cost.plain_peak, decode, together)


def shown_videos(
    parts: Parts, config: RunConfig, micro_batch: int | None = None, decode_chunk: int | None = None
) -> dict[str, int]:
    """Returns bytes that a worker needs at the peak of each stage of TensorBoard's videos; {} without videos.

    ``micro_batch`` and ``decode_chunk`` stand in for the run's settings.
    """
    if not config.output.videos_every:
        return {}
    share = -(-SHOWN_VIDEOS // config.train.workers)
    made = generating(parts, config, min(share, micro_batch or config.micro_batch), decode_chunk)
    pixels = made.together * parts.frames * 3 * parts.pixels * 4
    return {"videos, chain": made.chain, "videos, decode": made.decode + pixels}


class Floor(NamedTuple):
    """What a run with ``floor: base`` pays before its workers start, in a process of its own."""

    videos: int
    flops: float
    """Of all videos; their prompts' embeddings are left out."""
    peak: int
    """Bytes, with the weights."""


def measured_floor(parts: Parts, config: RunConfig) -> Floor | None:
    """Returns the cost of measuring the base model's motion; None where no floor is ``base``."""
    if not config.reward.floor_is_open:
        return None
    made, rows = generating(parts, config, 1), 1 if config.sampling.guidance == 1 else 2
    chain = config.sampling.steps * rows * parts.denoiser.cost.flops
    autoencoder = parts.autoencoder
    if parts.causal:
        decode = autoencoder.first_chunk.flops + (parts.latent_shape[1] - 1) * autoencoder.cost.flops
    else:
        decode = parts.frames * autoencoder.cost.flops
    pixels = parts.frames * 3 * parts.pixels * 4
    weights = parts.denoiser.weights + autoencoder.weights + (parts.text_encoder.weights if parts.text_resident else 0)
    return Floor(FLOOR_VIDEOS, FLOOR_VIDEOS * (chain + decode), weights + max(made.chain, made.decode + pixels))
