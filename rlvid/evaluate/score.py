"""Scores videos: rewards, CLIP metrics, motion, and the oracle."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from rlvid.diffusion.generate import generate
from rlvid.evaluate import metrics
from rlvid.evaluate.clip import FrameTextModel
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.evaluate.reward_calls import RewardCaller
from rlvid.models.base import VideoModel
from rlvid.reward.clip import ClipReward
from rlvid.reward.video import ImageReward
from rlvid.world import oracle


@torch.no_grad()
def score_videos(
    frames_BFCHW: Tensor,
    prompts: list[str],
    *,
    reward: ImageReward,
    held_out: ImageReward | None,
    clip: FrameTextModel,
    use_oracle: bool,
    extra: Mapping[str, ImageReward] | None = None,
    call_reward: RewardCaller | None = None,
) -> dict[str, Tensor]:
    """Computes every metric of B videos in [0, 1] on the rewards' device: name -> (B,), float32 on the CPU.

    ``extra`` holds further rewards by the names of their metrics, ``reward_NAME``; ``call_reward`` limits the time of a
    user's own reward, by default without a limit. All metrics of a video with a pixel that is not finite are NaN.

    Raises:
        RuntimeError: see ``RewardCaller``.
    """
    call_reward = call_reward or RewardCaller()
    finite_B = frames_BFCHW.isfinite().flatten(1).all(1).cpu()
    scores = {name: torch.full((len(prompts),), torch.nan) for name in (*METRICS, *(extra or {}))}
    if not finite_B.any():
        return scores
    frames = frames_BFCHW[finite_B.to(frames_BFCHW.device)]
    finite_prompts = [prompt for prompt, finite in zip(prompts, finite_B.tolist(), strict=True) if finite]
    image_BFD = clip.image_features(frames)
    found = {
        "reward": call_reward(reward, frames, finite_prompts),
        "clipsim": metrics.similarity(image_BFD, clip.text_features(finite_prompts)),
        "consistency": metrics.consistency(image_BFD),
        "consistency_all_pairs": metrics.consistency(image_BFD, "all_pairs"),
        "consistency_vbench": metrics.consistency(image_BFD, "vbench"),
        "motion": metrics.motion(frames),
        "flickering": metrics.flickering(frames),
        "diversity": metrics.diversity(image_BFD, finite_prompts),
    }
    if held_out is not None:
        found["held_out"] = call_reward(held_out, frames, finite_prompts)
    found |= {name: call_reward(each, frames, finite_prompts) for name, each in (extra or {}).items()}
    if use_oracle:
        found |= {f"oracle_{name}": value for name, value in oracle.grade(frames, finite_prompts).items()}
    for name, value in found.items():
        scores[name][finite_B] = value.float().cpu()
    return scores


def evaluate_model(
    model: VideoModel,
    prompts_by_set: Mapping[str, list[str]],
    *,
    name: str,
    reward: ImageReward,
    held_out: ImageReward | None = None,
    clip: FrameTextModel | None = None,
    steps_list: Iterable[int] = (20, 50),
    guidance: float = 3.0,
    final: str = "exact",
    seed: int = 0,
    use_oracle: bool = True,
    call_reward: RewardCaller | None = None,
    batch: int = 16,
    first_index: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Generates a video for every prompt and number of steps, and scores it.

    Args:
        model: on the same device as the rewards.
        prompts_by_set: prompts of each set; video ``index`` of every set starts from the same noise.
        name: of the model, as tables show it.
        reward: the image reward that was trained on.
        held_out: one that was not; without it, its scores are NaN.
        clip: measures CLIPSIM and consistency; default: ``held_out`` or else ``reward``, if they are CLIP models.
        steps_list: numbers of DDIM steps.
        guidance: classifier-free guidance g.
        final: see ``generate``.
        seed: of the noise.
        use_oracle: grade videos of the built-in world by the oracle too.
        call_reward: see ``score_videos``.
        batch: most videos that are made and scored at once.
        first_index: index of the first prompt of each set, where a set is evaluated in parts.
        progress: called with (videos done, all videos).

    Raises:
        ValueError: a set without prompts, ``batch`` below 1, or no CLIP model to measure with.
        RuntimeError: see ``RewardCaller``.
    """
    clip = clip or next((each for each in (held_out, reward) if isinstance(each, ClipReward)), None)
    if clip is None:
        raise ValueError("evaluate_model: neither reward is a CLIP model; give clip= for CLIPSIM and consistency")
    if batch < 1 or not all(prompts_by_set.values()):
        sizes = {each: len(prompts) for each, prompts in prompts_by_set.items()}
        raise ValueError(f"evaluate_model: batch = {batch}, prompts = {sizes}; each must be 1 or more, or be left out")
    steps_list = list(steps_list)
    total = len(steps_list) * sum(map(len, prompts_by_set.values()))
    rows: list[Row] = []
    for steps in steps_list:
        for set_name, prompts in prompts_by_set.items():
            for start in range(0, len(prompts), batch):
                part, index = prompts[start : start + batch], first_index + start
                settings = {"seed": seed, "steps": steps, "guidance": guidance, "final": final}
                frames = generate(model, part, batch=batch, first_index=index, **settings)
                scores = score_videos(
                    frames.to(model.device), part, reward=reward, held_out=held_out, clip=clip, use_oracle=use_oracle,
                    call_reward=call_reward,
                )  # fmt: skip
                rows += rows_of(scores, name, set_name, steps, ((index + i, 0, p) for i, p in enumerate(part)))
                if progress is not None:
                    progress(len(rows), total)
    return rows


def rows_of(
    scores: Mapping[str, Tensor], model: str, set_name: str, steps: int, video_keys: Iterable[tuple[int, int, str]]
) -> list[Row]:
    """Returns the rows of a batch from its ``score_videos``; ``video_keys`` are (index, copy, prompt) of each video."""
    rows = []
    for place, (index, copy, prompt) in enumerate(video_keys):
        values = {metric: value[place].item() for metric, value in scores.items()}
        extra = {metric: values.pop(metric) for metric in list(values) if metric not in METRICS}
        rows.append(Row(model, set_name, steps, index, prompt, **values, copy=copy, extra=extra))
    return rows
