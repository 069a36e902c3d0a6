"""Fits a scorer to preference pairs: the loss of a batch, summed over fixed groups, and the optimiser's steps.

A batch is divided into groups of ``group`` pairs, which do not depend on the number of workers. The gradient of each
group is computed by itself, added up in float64, also over the workers, and rounded once: so any number of workers
takes the same steps, up to the order in which float64 numbers are added.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlvid import randomness
from rlvid.reward.fit.folder import Scorer
from rlvid.reward.fit.loss import contrastive_loss, preference_loss
from rlvid.reward.fit.models import LARGEST_SCALE, ImageScorer


@dataclass(frozen=True)
class Pairs:
    """P preference pairs.

    Attributes:
        serials: numbers of their draws in the whole fit: step times batch size, plus place.
        tokens_PL: token ids of the prompts.
        a: uint8 pixels (P, F, C, H, W) at the size of the scorer's input; or, where the image tower is not fitted, what
            it says of them (P, F, M), from ``Backbone.look``.
        b: the same.
        preference_PA: of ``a`` on each axis, in [0, 1]; NaN where nobody was asked.
    """

    serials: Sequence[int]
    tokens_PL: Tensor
    a: Tensor
    b: Tensor
    preference_PA: Tensor

    def take(self, places: Sequence[int]) -> "Pairs":
        """Returns the pairs at these places."""
        rows = list(places)
        tensors = (self.tokens_PL, self.a, self.b, self.preference_PA)
        return Pairs([self.serials[row] for row in rows], *(each[rows] for each in tensors))


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        preferences: weight of Bradley and Terry's loss; 0 fits without votes.
        contrastive: weight of CLIP's loss, with the other prompts of the group as negatives.
        frames: of each pair that an image reward looks at in a step, drawn anew; ``None`` for all.
        seed: of these draws.
    """

    preferences: float = 1.0
    contrastive: float = 0.0
    frames: int | None = 1
    seed: int = 0


def group_loss(scorer: Scorer, pairs: Pairs, objective: Objective) -> Tensor:
    """Returns the sum of the losses of a group's pairs, each the mean over its axes with votes: a scalar."""
    pairs = draw_frames(pairs, objective) if isinstance(scorer, ImageScorer) else pairs
    backbone, count = scorer.backbone, len(pairs.serials)
    both = torch.cat([pairs.a, pairs.b])
    image_QFD, patch_QFN = backbone.divide(both.float()) if both.dim() == 3 else backbone(as_input(scorer, both))
    text_PD = backbone.text(pairs.tokens_PL)
    total = torch.zeros((), device=image_QFD.device)
    if objective.preferences:
        a_PA, b_PA = scorer.score(image_QFD, patch_QFN, text_PD.repeat(2, 1)).split(count)
        asked_P = (~pairs.preference_PA.isnan()).sum(1).clamp(min=1)
        loss_P = preference_loss(a_PA - b_PA, pairs.preference_PA).sum(1) / asked_P
        total = total + objective.preferences * loss_P.sum()
    if objective.contrastive:
        _, prompt_P = pairs.tokens_PL.unique(dim=0, return_inverse=True)
        scale = backbone.scale
        for image_PD in nn.functional.normalize(image_QFD.mean(1), dim=-1).split(count):
            total = total + objective.contrastive / 2 * contrastive_loss(scale * image_PD @ text_PD.T, prompt_P).sum()
    return total


def as_input(scorer: Scorer, pixels: Tensor) -> Tensor:
    """Returns 8-bit pixels in [0, 1], in the precision of the scorer's CLIP."""
    return pixels.to(scorer.backbone.clip.logit_scale.dtype) / 255


def draw_frames(pairs: Pairs, objective: Objective) -> Pairs:
    """Returns the pairs with the frames that are looked at: the same ones of both sides."""
    length = pairs.a.shape[1]
    if objective.frames is None or objective.frames >= length:
        return pairs
    positions = [(serial,) for serial in pairs.serials]
    uniform_PF = randomness.uniform((length,), objective.seed, "fit frames", positions)
    chosen_PS = uniform_PF.argsort(1)[:, : objective.frames].sort(1).values.to(pairs.a.device)
    rows_P1 = torch.arange(len(pairs.serials), device=chosen_PS.device)[:, None]
    return replace(pairs, a=pairs.a[rows_P1, chosen_PS], b=pairs.b[rows_P1, chosen_PS])


def groups(pairs: Pairs, batch_size: int, group: int) -> Iterator[Pairs]:
    """Yields the groups that a worker holds whole.

    Group g of a batch has the places g, g + G, g + 2 G, ... of its G groups. Worker r has every W-th place from r on,
    so it holds whole groups as long as W divides G.
    """
    count = batch_size // group
    number = [serial % batch_size % count for serial in pairs.serials]
    for own in sorted(set(number)):
        yield pairs.take([place for place, each in enumerate(number) if each == own])


@dataclass(frozen=True)
class Schedule:
    """Learning rates: linear up over ``warmup`` steps, then half a cosine down to 2 % of ``lr`` at ``steps``."""

    lr: float
    warmup: int
    steps: int

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, from 0 on."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Fitter:
    """Takes AdamW's steps on a scorer, and keeps an exponential moving average of its weights.

    Args:
        scorer: its parameters that require a gradient are fitted.
        objective: what is minimised.
        schedule: of the learning rate.
        batch_size: pairs of a step, of all workers.
        group: pairs of a group.
        decay: of the moving average; early steps weigh more.
        clip_norm: largest norm of the gradient.
    """

    def __init__(
        self,
        scorer: Scorer,
        objective: Objective,
        schedule: Schedule,
        *,
        batch_size: int,
        group: int,
        decay: float = 0.998,
        clip_norm: float = 1.0,
    ) -> None:
        self.scorer, self.objective, self.schedule = scorer, objective, schedule
        self.batch_size, self.group, self.decay, self.clip_norm = batch_size, group, decay, clip_norm
        self.parameters = {name: each for name, each in scorer.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), betas=(0.9, 0.99), weight_decay=0.0)
        self.average = {name: each.detach().clone() for name, each in self.parameters.items()}

    def gradient(self, pairs: Pairs) -> Tensor:
        """Returns the gradient of the summed losses of a share of a batch, and their sum in the last place: float64."""
        parameters = list(self.parameters.values())
        total = torch.zeros(sum(each.numel() for each in parameters) + 1, dtype=torch.float64, device=pairs.a.device)
        for part in groups(pairs, self.batch_size, self.group):
            loss = group_loss(self.scorer, part, self.objective)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            flat = [
                torch.zeros_like(parameter).flatten() if each is None else each.flatten()
                for parameter, each in zip(parameters, found, strict=True)
            ]
            total += torch.cat([*flat, loss.detach().reshape(1)]).double()
        return total

    def apply(self, step: int, total: Tensor) -> tuple[float, float]:
        """Takes a step, unless the gradient is not finite.

        Args:
            step: from 0 on.
            total: the sum of what ``gradient`` gave all workers; it is overwritten.

        Returns:
            The loss of a pair, the mean over the batch; and the norm of the gradient before clipping.
        """
        parameters = list(self.parameters.values())
        mean = total.div_(self.batch_size)
        for parameter, flat in zip(parameters, mean[:-1].split([each.numel() for each in parameters]), strict=True):
            parameter.grad = flat.reshape(parameter.shape).to(parameter)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.clip_norm))
        if math.isfinite(norm):
            for settings in self.optimizer.param_groups:
                settings["lr"] = self.schedule.rate(step)
            self.optimizer.step()
            scale = self.scorer.backbone.clip.logit_scale
            if scale.requires_grad:
                scale.data.clamp_(max=math.log(LARGEST_SCALE))
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter.detach(), weight)
        return float(mean[-1]), norm

    def state_dict(self) -> dict[str, object]:
        """Returns the fitted weights, their average, and the optimiser's state."""
        weights = {name: each.detach() for name, each in self.parameters.items()}
        return {"weights": weights, "average": self.average, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restores what ``state_dict`` gave."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
                self.average[name].copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def use_average(self) -> None:
        """Puts the average of the weights into the scorer: the result of the fit."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])


def scores(scorer: Scorer, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns raw scores (N, A), float64, of batches of videos (uint8, P F C H W) and their tokens; of all frames."""
    found = []
    with torch.no_grad():
        for frames_PFCHW, tokens_PL in batches:
            found.append(scorer(as_input(scorer, frames_PFCHW), tokens_PL).double().cpu())
    return torch.cat(found)
