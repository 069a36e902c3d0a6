"""The memory of the guard, which generates and scores videos in a process of its own."""

from rlvid.config import RunConfig
from rlvid.config.guard import AT_ONCE, PIXELS_AT_ONCE
from rlvid.plan.network import Network
from rlvid.plan.parts import Parts
from rlvid.plan.videos import generating

_COPIES = 3
"""Copies of a video's pixels that its motion and flickering need at once."""


def guard_memory(parts: Parts, config: RunConfig) -> dict[str, int]:
    """Returns bytes on the guard's device: ``weights``, and the peak of each stage beside them; {} without a guard."""
    guard = config.guard
    if not guard.every:
        return {}
    videos = guard.videos_per_prompt * min(guard.count, max(1, AT_ONCE // guard.videos_per_prompt))
    made, pixels_of_a_video = generating(parts, config, videos), parts.frames * parts.pixels
    scored = min(videos, max(1, PIXELS_AT_ONCE // pixels_of_a_video))
    video = 3 * pixels_of_a_video * 4
    pixels = scored * video
    texts = [parts.text_encoder] if parts.text_resident else []
    rewards = (parts.reward, parts.held_out, *parts.judges)

    def scoring(reward: Network) -> int:
        return min(scored * parts.frames, reward.chunk) * reward.cost.plain_peak

    return {
        "weights": sum(part.weights for part in (parts.denoiser, parts.autoencoder, *texts, *rewards)),
        "chain": made.chain,
        "decode": made.decode + made.together * video,
        "rewards": pixels + max(pixels + max(map(scoring, rewards)), _COPIES * video),  # a reward clamps all pixels
    }
