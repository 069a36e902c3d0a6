"""The common parts of all stages of pre-training: the stream of clips, the optimiser's steps, the average."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlvid.files import atomic_file
from rlvid.reward.fit.optimise import Schedule
from rlvid.world.captions import write_captions
from rlvid.world.render import Clips, degrade, render, sample_clips, sample_degradation

log = logging.getLogger("rlvid.toy.pretrain")

STORED_EVERY = 50
"""Steps from one stored state of a resumable fit to the next."""


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


def draw_footage(
    count: int, generator: torch.Generator, degraded: float | Mapping[str, float] = 0.5, frames: int = 8
) -> Footage:
    """Draws B clips, a share of them ``degraded`` (see ``sample_degradation``); ``clean_BFCHW`` is before that."""
    clips = sample_clips(count, generator)
    clean = render(clips, frames)
    kind_B, strength_B = sample_degradation(count, generator, degraded)
    degraded_BFCHW = degrade(clean, kind_B, strength_B, generator)
    return Footage(clips, write_captions(clips, generator), clean, degraded_BFCHW)


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
    state: Path | None = None,
) -> None:
    """Minimises ``loss_of_step(step)`` with AdamW and leaves the exponential moving average of the weights behind.

    Args:
        modules: their parameters that require a gradient are fitted.
        loss_of_step: returns the loss of a step, a scalar; with a ``state``, its draws depend on the step alone.
        steps: in all.
        peak: learning rate after warm-up.
        name: of the fit, in the log.
        decay: of the moving average; early steps weigh more.
        state: file of the fit's state, written every ``STORED_EVERY`` steps and at the end. A fit that was interrupted
            continues from it, and takes the very steps of one that was not.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    average = [p.detach().clone() for p in parameters]
    schedule = Schedule(peak, warmup=100, steps=steps)
    first, shown = 0, 0.0
    if state is not None and state.is_file():
        first, shown = _restore(state, parameters, average, optimizer)
        log.info("%s: continues after step %d/%d of %s", name, first, steps, state)
    start = time.perf_counter()

    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of_step(step)
        if not loss.isfinite():
            raise FloatingPointError(f"{name}: the loss of step {step + 1} is {loss.item()}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
            raise FloatingPointError(f"{name}: the gradient of step {step} is not finite")
        optimizer.step()
        weight = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - weight)
        shown = loss.item() if step == 0 else 0.98 * shown + 0.02 * loss.item()
        last = step + 1 == steps
        if state is not None and ((step + 1) % STORED_EVERY == 0 or last):
            _store(state, step + 1, shown, parameters, average, optimizer)
        if (step + 1) % 50 == 0 or last:
            rate = (time.perf_counter() - start) / (step + 1 - first)
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


def _store(
    state: Path,
    step: int,
    shown: float,
    parameters: list[nn.Parameter],
    average: list[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    weights = [p.detach() for p in parameters]
    found = {"step": step, "shown": shown, "weights": weights, "average": average, "optimizer": optimizer.state_dict()}
    state.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(state) as part:
        torch.save(found, part)


@torch.no_grad()
def _restore(
    state: Path, parameters: list[nn.Parameter], average: list[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Fills in what ``_store`` wrote; returns the number of steps taken and the loss that the log shows."""
    found = torch.load(state, map_location="cpu", weights_only=True)
    for values, stored in ((parameters, found["weights"]), (average, found["average"])):
        for value, each in zip(values, stored, strict=True):
            value.copy_(each)
    optimizer.load_state_dict(found["optimizer"])
    return found["step"], found["shown"]
