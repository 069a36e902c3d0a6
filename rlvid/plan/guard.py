"""The memory of the guard, which generates and scores videos in a process of its own."""

from rlvid.config import RunConfig
from rlvid.config.guard import AT_ONCE
from rlvid.diffusion.generate import videos_at_once
from rlvid.plan.network import Network
from rlvid.plan.parts import Parts

_COPIES = 3
"""Copies of a video's pixels that its motion and flickering need at once."""


def guard_memory(parts: Parts, config: RunConfig) -> dict[str, int]:
    """Returns bytes on the guard's device: ``weights``, and the peak of each stage beside them; {} without a guard."""
    guard = config.guard
    if not guard.every:
        return {}
    videos = guard.videos_per_prompt * min(guard.count, max(1, AT_ONCE // guard.videos_per_prompt))
    together = videos_at_once(parts.latent_shape, videos)
    rows = together * (1 if config.sampling.guidance == 1 else 2)
    frames = videos * parts.frames
    video = parts.frames * 3 * parts.pixels * 4
    pixels = videos * video
    texts = [parts.text_encoder] if parts.text_resident else []
    rewards = (parts.reward, parts.held_out, *parts.judges)

    def scoring(reward: Network) -> int:
        return min(frames, reward.chunk) * reward.cost.plain_peak

    autoencoder = parts.autoencoder
    if autoencoder.decode is None:
        decoding = min(together * parts.frames, config.model.decode_chunk) * autoencoder.cost.plain_peak
    else:
        decoding = int(together * autoencoder.decode.plain_peak)
    return {
        "weights": sum(part.weights for part in (parts.denoiser, autoencoder, *texts, *rewards)),
        "chain": rows * parts.denoiser.cost.plain_peak,
        "decode": decoding + pixels,
        "rewards": pixels + max(pixels + max(map(scoring, rewards)), _COPIES * video),  # a reward clamps all pixels
    }
