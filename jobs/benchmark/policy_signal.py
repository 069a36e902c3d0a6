"""Measures how much of a policy gradient is signal, at the start of a training on the built-in world.

    python -m jobs.benchmark policy-signal --out signal
    python -m jobs.benchmark policy-signal --prompts 8 --group 8 --steps 3 9 15 --out eta-half sampling.eta=0.5
    python -m jobs.benchmark policy-signal --out one-step method.window=1 method.same_start=true

Videos of each prompt are sampled as GRPO samples them (``toy-grpo``, and settings to change). Of each video and each
step in question the gradient s of the log-probability is taken: the policy gradient of any advantages A, groups and
steps is a sum of A s. Beside it stands h, the reward's own gradient through the whole chain. With g the gradient of a
prompt's videos, p and q two prompts:

    signal^2  = mean <g_p, g_q>           the noise of two prompts is independent
    noise^2   = mean |g_p|^2 - signal^2
    agreement = signal^2 / noise^2        of the videos of one prompt
    alignment = mean <g_p, h_q> / (signal x signal of h)

The gradient of n prompts has a cosine of sqrt(n a / (1 + n a)) to the expected one, with a the agreement. The folder
--out keeps each prompt's gradients, so the same command goes on after an interruption.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.benchmark.options import make_parser
from jobs.benchmark.record import processor
from rlvid.algorithms.advantages import group_advantages
from rlvid.algorithms.base import Batch, Context, Stopwatch
from rlvid.algorithms.rollout import reach_of_steps, replay, roll_out
from rlvid.algorithms.scoring import score
from rlvid.config import RunConfig, load_config
from rlvid.config.methods import GrpoConfig
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.schedule import timesteps
from rlvid.evaluate.tables.table import Grid
from rlvid.files import write_atomic
from rlvid.metric_names import NONE
from rlvid.models.lora import lora_parameters
from rlvid.models.trained import load_trainable
from rlvid.reward.load import trained_reward
from rlvid.terminal import say
from rlvid.world.captions import prompt_set


def measure_prompt(
    context: Context, prompt: str, number: int, steps: Sequence[int], pathwise: int
) -> dict[str, Tensor]:
    """Returns the rewards (G,), the score gradients (G, T, N) of a prompt's videos, and h (N,) of ``pathwise`` ones."""
    group = context.config.train.group_size
    serials = list(range(number * group, (number + 1) * group))
    text_BLD = context.model.encode_prompts([prompt]).expand(group, -1, -1)
    batch = Batch(0, serials, [prompt] * group, text_BLD, None)
    method = context.config.method
    assert isinstance(method, GrpoConfig)
    starts, one = group if method.same_start else 1, method.window == 1
    rewards, gradients = [], []
    for pool in [[step] for step in steps] if one else [list(steps)]:
        rollout = roll_out(context, batch, [pool] * group, only=one, starts=starts)
        with torch.no_grad():
            rewards.append(score(context, batch, rollout.latents_BCFhw).reward_B)
        for part in rollout.split(1):
            for step in pool:
                value = replay(context, part.at(torch.tensor([step]))).log_probability_B.sum()
                gradients.append(flat(torch.autograd.grad(value, lora_parameters(context.model.denoiser))))
    score_GTN = torch.stack(gradients).unflatten(0, (-1, group) if one else (group, -1))
    eta = 0.0 if one else context.config.eta
    return {
        "rewards": torch.stack(rewards, dim=1).expand(-1, len(steps)).contiguous(),
        "scores": (score_GTN.transpose(0, 1) if one else score_GTN).contiguous(),
        "reward_gradient": reward_gradient(context, batch.take(range(pathwise)), eta),
    }


def reward_gradient(context: Context, batch: Batch, eta: float) -> Tensor:
    """Returns the mean gradient of the videos' rewards through their whole chains: (N,)."""
    grid, found = timesteps(context.config.sampling.steps), list[Tensor]()
    for part in batch.split(1):
        latents = denoise(
            context.model,
            context.normal("start", part),
            part.text_BLD,
            grid,
            guidance=context.config.sampling.guidance,
            eta=eta,
            gradient_steps=len(grid),
            noise=partial(context.normal, "ddim", part),
            recompute=False,
        )
        reward = score(context, part, latents).reward_B.sum()
        found.append(flat(torch.autograd.grad(reward, lora_parameters(context.model.denoiser))))
    return torch.stack(found).mean(0)


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """Returns gradients as one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients])


@dataclass(frozen=True)
class Pool:
    """What was measured for P prompts: rewards_PGT, scores_PGTN, and the reward's own gradients h_PN."""

    rewards_PGT: Tensor
    scores_PGTN: Tensor
    h_PN: Tensor
    steps: list[int]
    reach_T: Tensor

    def gradients(self, how: Callable[[Tensor], Tensor], weight_T: Tensor, videos: int) -> Tensor:
        """Returns the policy gradient of each prompt's first ``videos`` videos: (P, N).

        ``how`` makes advantages of rewards (P, G), ``weight_T`` weighs the steps.
        """
        total = torch.zeros_like(self.h_PN)
        for place in range(len(self.steps)):
            if weight_T[place]:
                advantage_PG = how(self.rewards_PGT[:, :videos, place]).to(total)
                score_PGN = self.scores_PGTN[:, :videos, place]
                total += weight_T[place] * torch.einsum("pg,pgn->pn", advantage_PG, score_PGN) / videos
        return total


def judge(g_PN: Tensor, h_PN: Tensor) -> tuple[float, float]:
    """Returns the agreement of the prompts' gradients and their alignment with the reward's own gradient."""

    def across(a_PN: Tensor, b_PN: Tensor) -> float:
        dots_PP = a_PN.double() @ b_PN.double().T
        return float((dots_PP.sum() - dots_PP.trace()) / (len(dots_PP) * (len(dots_PP) - 1)))

    signal, whole = across(g_PN, g_PN), float(g_PN.double().square().sum(1).mean())
    own = across(h_PN, h_PN)
    aligned = across(g_PN, h_PN) / math.sqrt(signal * own) if signal > 0 and own > 0 else math.nan
    return signal / (whole - signal), aligned


def jackknife(g_PN: Tensor, h_PN: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns (value, standard error) of agreement and of alignment, by leaving out one prompt after the other."""
    count, values = len(g_PN), judge(g_PN, h_PN)
    rest = [judge(*(each[torch.arange(count) != p] for each in (g_PN, h_PN))) for p in range(count)]
    errors = [
        math.sqrt((count - 1) / count * sum((value - sum(part) / count) ** 2 for value in part))
        for part in zip(*rest, strict=True)
    ]
    return (values[0], errors[0]), (values[1], errors[1])


def in_group(reward_PG: Tensor, deviation: str = "group") -> Tensor:
    """Returns advantages within each prompt."""
    group = reward_PG.shape[1]
    return group_advantages(reward_PG.flatten().tolist(), group, 5.0, deviation).reshape(reward_PG.shape)


def in_batch(reward_PG: Tensor) -> Tensor:
    """Returns advantages over all videos, as DDPO has them before a prompt has rewards of its own."""
    return group_advantages(reward_PG.flatten().tolist(), reward_PG.numel(), 5.0).reshape(reward_PG.shape)


def compare(pool: Pool) -> list[dict[str, Any]]:
    """Returns a row for each choice of steps, weights, advantages and group size."""
    group, one, none = pool.rewards_PGT.shape[1], torch.eye(len(pool.steps)), torch.ones(len(pool.steps))
    inverse = 1 / pool.reach_T
    choices: list[tuple[str, Callable[[Tensor], Tensor], Tensor, int]] = [
        (f"step {step}", in_group, one[place], group) for place, step in enumerate(pool.steps)
    ]
    choices += [
        ("all steps", in_group, none, group),
        ("all steps, inverse weights", in_group, inverse / inverse.mean(), group),
        ("deviation of the batch", partial(in_group, deviation="batch"), none, group),
        ("mean and deviation of the batch", in_batch, none, group),
    ]
    choices += [(f"groups of {size}", in_group, none, size) for size in (2, 4, 8, 16, 32) if size < group]
    rows = []
    for name, how, weight_T, videos in choices:
        agreement, aligned = jackknife(pool.gradients(how, weight_T, videos), pool.h_PN)
        rows.append({"choice": name, "videos": videos, "agreement": agreement, "alignment": aligned})
    (own, error), _ = jackknife(pool.h_PN, pool.h_PN)
    return [
        *rows,
        {"choice": "the reward's own gradient", "videos": 0, "agreement": (own, error), "alignment": (1.0, 0.0)},
    ]


def table(rows: list[dict[str, Any]]) -> Grid:
    """Returns the rows as a table, values with their standard errors."""
    shown = [
        [row["choice"], str(row["videos"] or NONE)]
        + ["{:.3f} ± {:.3f}".format(*row[key]) for key in ("agreement", "alignment")]
        for row in rows
    ]
    return Grid(["choice", "videos a prompt", "agreement", "alignment"], shown)


def settings(options: argparse.Namespace) -> RunConfig:
    """Returns the run whose videos are measured."""
    fixed = [f"train.group_size={options.group}", f"train.batch_size={options.group}", "train.workers=1"]
    free = ["method.window=null", "method.same_start=false", "method.window_range=[0,1]"]
    config = load_config("toy-grpo", [*free, *options.overrides, *fixed, f"train.rollout_batch={options.group}"])
    last = config.sampling.steps - 2
    if not all(0 <= step <= last for step in options.steps):
        raise ValueError(f"--steps {options.steps}: the random steps of this chain are 0 to {last}")
    return config


def main(arguments: list[str]) -> None:
    """Measures prompt after prompt, then compares."""
    parser = make_parser(__doc__, "policy-signal", overrides=True)
    parser.add_argument("--prompts", type=int, default=16, help="prompts to sample, at least 3")
    parser.add_argument("--group", type=int, default=16, help="videos of each prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 3, 6, 9, 12, 15, 18], help="steps of the chain")
    parser.add_argument("--pathwise", type=int, default=4, help="videos of each prompt for the reward's own gradient")
    parser.add_argument("--out", type=Path, required=True, help="folder for the gradients and the findings")
    options = parser.parse_intermixed_args(arguments)
    config = settings(options)
    options.out.mkdir(parents=True, exist_ok=True)
    model = load_trainable(config.model, config.seed, config.model.path)
    context = Context(config, model, trained_reward(config.reward), None, Stopwatch(torch.device("cpu")))
    began, kept = time.monotonic(), []
    for number, prompt in enumerate(prompt_set("in_domain", options.prompts)):
        path = options.out / f"prompt-{number:03d}.safetensors"
        if not path.is_file():
            found = measure_prompt(context, prompt, number, options.steps, options.pathwise)
            save_file(found, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
            say(f"prompt {number + 1} of {options.prompts}, {time.monotonic() - began:.0f} s")
        kept.append(load_file(path))
    rewards_PGT, scores_PGTN, h_PN = (
        torch.stack([each[key] for each in kept]) for key in ("rewards", "scores", "reward_gradient")
    )
    reach_T = reach_of_steps(context)[options.steps]
    rows = compare(Pool(rewards_PGT, scores_PGTN, h_PN, options.steps, reach_T))
    about = {"card": processor(), "overrides": options.overrides, "reward": float(rewards_PGT.mean())}
    spread = {"std of rewards": float(rewards_PGT.std(1).mean()), "parameters": scores_PGTN.shape[-1]}
    write_atomic(options.out / "signal.json", json.dumps(about | spread | {"rows": rows}, indent=1).encode())
    say(table(rows).markdown())
