"""The common parts of all stages of pre-training: the stream of clips, the optimiser's steps, the average."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlvid.reward.fit.optimise import Schedule
from rlvid.world.captions import write_captions
from rlvid.world.render import Clips, degrade, render, sample_clips, sample_degradation

log = logging.getLogger("rlvid.toy.pretrain")


@dataclass(frozen=True)
class Footage:
    """A batch of clips with what they show: ``frames_BFCHW`` in [0, 1] and one caption each."""

    clips: Clips
    captions: list[str]
    clean_BFCHW: Tensor
    frames_BFCHW: Tensor


def scaled(count: int, scale: float, least: int = 2) -> int:
    """Returns a share of a number of steps or of anything else, and at least ``least``."""
    return max(least, round(count * scale))


def draw_footage(count: int, generator: torch.Generator, degraded: float | Mapping[str, float] = 0.5) -> Footage:
    """Draws B clips, a share of them ``degraded`` (see ``sample_degradation``); ``clean_BFCHW`` is before that."""
    clips = sample_clips(count, generator)
    clean = render(clips)
    kind_B, strength_B = sample_degradation(count, generator, degraded)
    frames = degrade(clean, kind_B, strength_B, generator)
    return Footage(clips, write_captions(clips, generator), clean, frames)


def half(device: torch.device) -> torch.autocast:
    """Bfloat16 where the device computes in it; a CPU without AVX-512 takes nine times as long as with float32."""
    able = device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("NO AVX", "DEFAULT", "AVX2")
    return torch.autocast(device.type, torch.bfloat16, enabled=able)


def fit(
    modules: list[nn.Module],
    loss_of_step: Callable[[int], Tensor],
    *,
    steps: int,
    peak: float,
    name: str,
    decay: float = 0.998,
) -> None:
    """Minimises ``loss_of_step(step)`` with AdamW and leaves the exponential moving average of the weights behind."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    average = [p.detach().clone() for p in parameters]
    schedule = Schedule(peak, warmup=100, steps=steps)
    start, shown = time.perf_counter(), 0.0

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        weight = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - weight)
        shown = loss.item() if step == 0 else 0.98 * shown + 0.02 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            rate = (time.perf_counter() - start) / (step + 1)
            log.info(
                "%s %d/%d loss %.4f, %.2f s a step, %.0f s to go",
                name,
                step + 1,
                steps,
                shown,
                rate,
                rate * (steps - step - 1),
            )
    for p, a in zip(parameters, average, strict=True):
        p.data = a
