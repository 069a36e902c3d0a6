"""Scores generated latents, for all methods: chooses frames, decodes those, and rewards them."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlvid import randomness
from rlvid.algorithms.advantages import rounding_of
from rlvid.algorithms.base import Batch, Context, Observer, Samples, Update, WorkerGroup, summed, totals
from rlvid.config.methods import VALUE_METHODS
from rlvid.faults import describe
from rlvid.reward.mixture import MixtureReward
from rlvid.reward.preprocess import saturated_share
from rlvid.reward.remote import failure_of, remote_parts
from rlvid.reward.video import FramePlan, ImageReward, check_shape, label_of, plan_frames, whole_video

log = logging.getLogger("rlvid.algorithms")


@dataclass(frozen=True)
class BatchRewards:
    """The rewards of a batch: ``reward_B`` with its graph, if there is one, and at most ``reward.ceiling``.

    Where ``valid_B`` is False the reward failed on sound frames, or the clip was lost: ``reward_B`` is 0 there, without
    gradient (or the ceiling, if that is lower).
    ``rounding`` is the relative difference up to which rewards are equal.
    """

    reward_B: Tensor
    valid_B: Tensor
    metrics: dict[str, tuple[float, float]]
    samples: Samples
    rounding: float


def plan(context: Context, batch: Batch) -> FramePlan:
    """Returns SegVR's frames and TAR's weights, chosen before decoding; all frames for a reward of whole videos.

    Videos from one start get the same frames. Else the choice of frames would be noise in the comparison of the videos.
    """
    settings, starts = context.config.reward, context.config.videos_per_start
    if whole_video(context.reward):
        return every_frame(context, batch)
    positions = [(serial - serial % starts,) for serial in batch.serials]
    uniform_BS = randomness.uniform((settings.segments,), context.config.seed, "segments", positions)
    return plan_frames(
        uniform_BS.to(batch.text_BLD.device),
        context.model.frames,
        settings.attenuation,
        context.config.frame_weights,
        settings.skip_below,
    )


def every_frame(context: Context, batch: Batch) -> FramePlan:
    """Returns all frames, weighed alike."""
    every_BF = torch.arange(context.model.frames).expand(len(batch), -1).to(batch.text_BLD.device)
    alike_BF = torch.full(every_BF.shape, 1 / context.model.frames, device=every_BF.device)
    return FramePlan(every_BF, alike_BF, normalised=True)


def score(context: Context, batch: Batch, latents_BCFhw: Tensor) -> BatchRewards:
    """Decodes the planned frames of clean latents and rewards them; gradient flows if it may."""
    chosen = plan(context, batch)
    with context.stopwatch.stage("decode"):
        recompute = context.config.train.checkpoint_activations
        frames_BSCHW = context.model.decode_frames(latents_BCFhw, chosen.frames_BS, recompute=recompute)
    return score_frames(context, batch, latents_BCFhw, chosen, frames_BSCHW)


def score_frames(
    context: Context, batch: Batch, latents_BCFhw: Tensor, chosen: FramePlan, frames_BSCHW: Tensor
) -> BatchRewards:
    """Rewards the planned frames, decoded from clean latents."""
    with context.stopwatch.stage("reward"):
        scores_BS, valid_B = _scores(context.reward, frames_BSCHW, batch, context.observer)
        reward_B = chosen.reward(scores_BS)
    metrics = totals(
        **{
            "reward/weighted": reward_B[valid_B],
            "reward/trained": scores_BS[valid_B],
            "frames/saturated_share": saturated_share(frames_BSCHW),
        }
    )
    metrics["reward/excluded"] = (float((~valid_B).sum()), 1.0)
    metrics |= _parts(context.reward, valid_B)
    if (ceiling := context.ceiling) is not None:
        metrics |= totals(**{"reward/at_ceiling": (reward_B >= ceiling)[valid_B]})
    held_out_B = None
    if context.held_out is not None:
        with context.stopwatch.stage("held-out"), torch.no_grad():
            held_out_B, held_out_metrics = _held_out(context, batch, latents_BCFhw, chosen, frames_BSCHW.detach())
        metrics |= held_out_metrics
    for place in range(chosen.frames_BS.shape[1]):
        metrics |= totals(**{f"frames/weight_{place}": chosen.weights_BS[:, place]})
    samples = Samples(
        batch.serials,
        batch.prompts,
        frames_BSCHW.detach().clamp(0, 1).cpu(),
        chosen.frames_BS.cpu(),
        torch.where(valid_B[:, None], scores_BS.detach(), torch.nan).float().cpu(),
        torch.where(valid_B, reward_B.detach(), torch.nan).float().cpu(),
        held_out_B,
    )
    rounding = rounding_of(scores_BS.dtype, getattr(torch, context.config.reward.precision))
    return BatchRewards(below(reward_B, ceiling), valid_B, metrics, samples, rounding)


def below(reward_B: Tensor, ceiling: float | None) -> Tensor:
    """Returns min(reward, ceiling), without gradient where the reward is at the ceiling or above; NaN stays."""
    return reward_B if ceiling is None else torch.where(reward_B >= ceiling, ceiling, reward_B)


def all_rewards(workers: WorkerGroup, batch: Batch, scores: list[BatchRewards]) -> tuple[list[str], list[float], float]:
    """Returns prompts and rewards of all workers' videos in the global order, NaN without a reward; their rounding."""
    sound = [torch.where(s.valid_B & s.reward_B.isfinite(), s.reward_B, torch.nan) for s in scores]
    reward_B = torch.cat(sound).tolist()
    rounding_B = [each.rounding for each in scores for _ in each.reward_B]
    prompts, rewards, roundings = zip(
        *workers.gather(list(zip(batch.prompts, reward_B, rounding_B, strict=True))), strict=True
    )
    return list(prompts), list(rewards), max(roundings)


def attach(updates: Iterator[Update], scores: list[BatchRewards]) -> Iterator[Update]:
    """Yields the updates of a batch; the first one carries the metrics of its videos, and the videos."""
    for index, update in enumerate(updates):
        if index == 0:
            metrics = summed([update.metrics, *(each.metrics for each in scores)])
            update = replace(update, metrics=metrics, samples=Samples.join([each.samples for each in scores]))
        yield update


def _held_out(
    context: Context, batch: Batch, latents_BCFhw: Tensor, chosen: FramePlan, frames_BSCHW: Tensor
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """Returns each video's held-out reward, NaN where it failed, and its metric; from all frames if it needs them."""
    assert context.held_out is not None
    if whole_video(context.held_out) and not whole_video(context.reward):
        chosen = every_frame(context, batch)
        frames_BSCHW = context.model.decode_frames(latents_BCFhw, chosen.frames_BS)
    scores_BS, valid_B = _scores(context.held_out, frames_BSCHW, batch, context.observer)
    reward_B = torch.where(valid_B, chosen.reward(scores_BS), torch.nan)
    return reward_B.float().cpu(), totals(**{"reward/held_out": scores_BS[valid_B]})


def _parts(reward: ImageReward, valid_B: Tensor) -> dict[str, tuple[float, float]]:
    """``reward/part_NAME`` of every part of a mixture, also where it failed: all workers have the same names."""
    if not isinstance(reward, MixtureReward):
        return {}
    nothing = torch.zeros_like(valid_B, dtype=torch.float32)
    scores = {label: reward.latest.get(label, nothing)[valid_B] for label in reward.labels}
    return totals(**{f"reward/part_{label}": values for label, values in scores.items()})


def _scores(reward: ImageReward, frames_BSCHW: Tensor, batch: Batch, observer: Observer) -> tuple[Tensor, Tensor]:
    """Returns scores (B, S), and which videos have valid ones; one that is lost, or makes the reward fail, is left out.

    Frames that are not finite are not the reward's fault: their scores pass, and the optimiser step is skipped.

    Raises:
        ValueError: the reward gives another shape, or no gradient where the frames carry one.
    """
    shape, label = frames_BSCHW.shape[:2], label_of(reward)
    sound_B = frames_BSCHW.detach().flatten(1).isfinite().all(1)
    readable_B = batch.readable_B.to(sound_B.device)
    accepted_B = readable_B.clone()
    if frames_BSCHW.requires_grad:
        # A NaN inside the reward must not reach the denoiser through a score that is left out.
        frames_BSCHW.register_hook(lambda g: torch.where(accepted_B[:, None, None, None, None], g, 0.0))
    try:
        # What is computed elsewhere keeps its own time, and a request that is late is no reason to end the worker.
        with nullcontext() if remote_parts(reward) else observer.calling(label):
            scores_BS = reward(frames_BSCHW, batch.prompts)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        log.exception("the reward %s raised on %d videos, which are left out", label, len(batch))
        observer.report(f"the reward {label} raised {describe(error)}; {len(batch)} videos are left out")
        accepted_B[:] = False
        return frames_BSCHW.float().flatten(2).mean(2).nan_to_num() * 0, accepted_B
    if check_shape(scores_BS, shape, label).shape == shape[:1]:
        scores_BS = scores_BS[:, None].expand(shape)
    if frames_BSCHW.requires_grad and torch.is_grad_enabled() and not scores_BS.requires_grad:
        raise ValueError(
            f"the reward {label} gave scores without a gradient, which this method back-propagates; compute them from "
            f"the frames in torch, or choose one of {VALUE_METHODS}"
        )
    accepted_B &= scores_BS.detach().isfinite().all(1) | ~sound_B
    if failed := int((readable_B & ~accepted_B).sum()):
        why = failure_of(reward)
        what = f"gave no score ({why})" if why else "gave NaN or infinity"
        observer.report(f"the reward {label} {what} for {failed} of {shape[0]} videos, which are left out")
    return torch.where(accepted_B[:, None], scores_BS, 0.0), accepted_B
