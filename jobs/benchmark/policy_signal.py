"""Measures how much of a policy gradient is signal, at the start of a training on the built-in world.

    python -m jobs.benchmark policy-signal --out signal.json
    python -m jobs.benchmark policy-signal --prompts 4 --group 8 --steps 4 8 --out signal.json sampling.eta=0.5

For each prompt one chain runs to a step; there ``--group`` videos take noise z of their own and go on. The policy
gradient of that step is g = J^T mean(A z), with A the advantages and J the derivative of the step's mean with respect
to the trained weights. The reward's own gradient of the same step is h = J^T mean(dr / dx'), through the rest of the
chain, over ``--pathwise`` videos.

    cosine            of g and h of one prompt: 1 is a policy gradient without noise
    cosine, together  of the mean g and the mean h over all prompts
    agreement         of h between prompts, mean <h_p, h_q> / mean |h_p|^2: what a step on one prompt does for another
    signal            the same of g. P times this, where it is small, is the squared signal-to-noise ratio of P prompts

With ``--out`` a picture is written beside the numbers.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.benchmark.options import check_out, make_parser, refuse
from jobs.benchmark.record import processor
from rlvid.algorithms.advantages import standardised
from rlvid.algorithms.base import Batch, Context, Stopwatch
from rlvid.algorithms.scoring import score
from rlvid.config import RunConfig, load_config
from rlvid.diffusion.chain import Step, denoise
from rlvid.diffusion.step import reach, step_mean
from rlvid.evaluate.tables.table import Grid
from rlvid.files import write_atomic
from rlvid.models.lora import lora_parameters
from rlvid.models.trained import load_trainable
from rlvid.plots.curves import Line, Panel, png_of_panels
from rlvid.plots.style import styles_of
from rlvid.reward.load import trained_reward
from rlvid.terminal import say
from rlvid.world.captions import prompt_set

Found = dict[str, Tensor]
"""Of one prompt and step: vectors in the space of the trained weights by name, and the rewards."""


def measure_step(context: Context, batch: Batch, before: Tensor, step: int, pathwise: int) -> Found:
    """Returns the gradients of a step of a prompt, whose videos are the batch's.

    Args:
        context: the model, the reward, the settings.
        batch: G videos of one prompt.
        before: (1, C, F, h, w), the latents before the step.
        step: of the chain.
        pathwise: videos that the reward's own gradient is averaged over.
    """
    model, grid, config = context.model, context.grid, context.config
    weights, group = lora_parameters(model.denoiser), len(batch)
    prediction = model.predict(before, grid[step], batch.text_BLD[:1], context.guidance)
    now, then = model.path.level(grid[step], before), model.path.level(grid[step + 1], before)
    kernel = context.kernel(now, then, config.eta)
    mean = step_mean(prediction, then, kernel)
    noise_G = context.normal("ddim", batch, step)
    after_G = (mean.detach() + kernel.spread * noise_G).requires_grad_()

    def rewards(rows: range, eta: float, gradient: bool) -> Tensor:
        part = batch.take(rows)
        latents = denoise(
            model, after_G[list(rows)], part.text_BLD, grid[step + 1 :], guidance=context.guidance, eta=eta,
            kernel=context.kernel,
            gradient_steps=len(grid) - step - 1 if gradient else 0, recompute=False, final=config.sampling.final_level,
            noise=lambda index: context.normal("ddim", part, step + 1 + index),
        )  # fmt: skip
        return score(context, part, latents).reward_B

    def backward(cotangent: Tensor) -> Tensor:
        found = torch.autograd.grad(mean, weights, cotangent, retain_graph=True)
        return torch.cat([each.flatten() for each in found])

    slopes = [torch.autograd.grad(rewards(range(row, row + 1), 0.0, True).sum(), after_G)[0] for row in range(pathwise)]
    with torch.no_grad():
        alone_G, random_G = (rewards(range(group), eta, False) for eta in (0.0, config.eta))
    found = {
        "h": backward(torch.stack(slopes).sum((0, 1))[None] / pathwise),
        "mean noise": backward(noise_G.mean(0)[None]),
    }
    sizes = [size for size in (4, 8, 16, 32) if size < group]
    for name, reward_G, size in [("this step", alone_G, n) for n in (*sizes, group)] + [("all steps", random_G, group)]:
        advantage_G = standardised(reward_G[:size], reward_G[:size]).float().to(noise_G)
        found[f"{name}, {size} videos"] = backward(
            torch.einsum("g,gcfhw->cfhw", advantage_G, noise_G[:size])[None] / size
        )
    return found | {"reward": alone_G, "reach": reach(model.path, now, then, kernel).flatten()}


def measure(
    context: Context, prompts: Sequence[str], steps: Sequence[int], pathwise: int
) -> Iterator[dict[int, Found]]:
    """Yields what was found at each step, prompt after prompt."""
    group, grid = context.config.train.group_size, context.grid
    for number, prompt in enumerate(prompts):
        text_BLD = context.model.encode_prompts([prompt])
        serials = list(range(number * group, (number + 1) * group))
        batch = Batch(0, serials, [prompt] * group, text_BLD.expand(group, -1, -1), None)
        taken = list[Step]()
        with torch.no_grad():
            start = context.normal("start", batch.take([0]))
            denoise(context.model, start, text_BLD, grid, guidance=context.guidance, observe=taken.append)
        yield {step: measure_step(context, batch, taken[step].before, step, pathwise) for step in steps}


def cosine(a: Tensor, b: Tensor) -> float:
    """Returns the cosine of two vectors."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def agreement(h_PN: Tensor) -> float:
    """Returns the mean <h_p, h_q> of two prompts over the mean |h_p|^2."""
    dots_PP = h_PN.double() @ h_PN.double().T
    count, diagonal = len(dots_PP), dots_PP.trace()
    return float((dots_PP.sum() - diagonal) / (count - 1) / diagonal)


def compare(found: list[dict[int, Found]]) -> list[dict[str, Any]]:
    """Returns a row for each step and way of advantages: its cosines, and what all ways of the step have in common."""
    rows = []
    for step in found[0]:
        here = [prompt[step] for prompt in found]
        h_PN = torch.stack([each["h"] for each in here])
        common = {
            "step": step, "agreement": agreement(h_PN), "reach": float(here[0]["reach"]),
            "std": float(torch.stack([each["reward"] for each in here]).std(1).mean()),
        }  # fmt: skip
        ways = {name: torch.stack([each[name] for each in here]) for name in here[0] if name.endswith(" videos")}
        ways["this step, mean of the batch"] = of_the_batch(here)
        for name, g_PN in ways.items():
            each = torch.tensor([cosine(g, h) for g, h in zip(g_PN, h_PN, strict=True)])
            error = float(each.std() / math.sqrt(len(each)))
            own = {"cosine": float(each.mean()), "error": error, "together": cosine(g_PN.mean(0), h_PN.mean(0))}
            rows.append({"way": name, **own, "signal": agreement(g_PN), **common})
    return rows


def picture(rows: list[dict[str, Any]]) -> bytes:
    """Draws cosines, signal and the spread of rewards against the step, as PNG."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        ways.setdefault(row["way"], []).append(row)
    first, own = next(iter(ways.values())), "the reward's own gradient"
    looks = styles_of([*ways, own], reference=own)

    def line(name: str, found: list[dict[str, Any]], key: str) -> Line:
        x, y = (np.array([row[axis] for row in found]) for axis in ("step", key))
        return Line(name, looks[name], [(x, y)])

    cosines, signals = ([line(name, found, key) for name, found in ways.items()] for key in ("cosine", "signal"))
    signals.append(line(own, first, "agreement"))
    spread = replace(line(own, first, "std"), label="rewards of a prompt's videos")
    panels = [
        Panel("step of the chain", "cosine with the reward's own gradient", "One prompt", cosines),
        Panel("step of the chain", "agreement between prompts", "Many prompts", signals),
        Panel("step of the chain", "standard deviation", "What the noise of the step changes", [spread]),
    ]
    return png_of_panels([panels], 13.5, 4.8)


def of_the_batch(here: list[Found]) -> Tensor:
    """Returns gradients (P, N) whose advantages are rewards less the mean of all prompts' videos."""
    rewards_PG = torch.stack([each["reward"] for each in here])
    whole = max((each for each in here[0] if each.startswith("this step")), key=lambda name: int(name.split()[2]))
    away_P, spread_P = rewards_PG.mean(1) - rewards_PG.mean(), rewards_PG.std(1, correction=0)
    own_PN, noise_PN = (torch.stack([each[name] for each in here]) for name in (whole, "mean noise"))
    return spread_P[:, None] * own_PN + away_P[:, None] * noise_PN


def settings(options: argparse.Namespace) -> RunConfig:
    """Returns the run whose steps are measured."""
    fixed = [f"train.group_size={options.group}", f"train.batch_size={options.group}", "train.workers=1"]
    refuse(options.overrides, fixed)
    if options.prompts < 2 or options.group < 2 or not 0 < options.pathwise <= options.group:
        raise ValueError("--prompts and --group must be 2 or more, and --pathwise from 1 to --group")
    config = load_config("toy-grpo", ["sampling.steps=10", *options.overrides, *fixed])
    if config.reward.without_gradient:
        raise ValueError(f"reward.name = {config.reward.without_gradient!r} gives no gradient to compare with")
    if config.model.finetune != "lora":
        raise ValueError(
            f"model.finetune = {config.model.finetune!r}: the gradients of an adapter are measured; leave it"
        )
    last = config.sampling.steps - 2
    if not all(0 <= step <= last for step in options.steps):
        raise ValueError(f"--steps {options.steps}: the random steps of this chain are 0 to {last}")
    return config


def main(arguments: list[str]) -> None:
    """Measures prompt after prompt, prints a table, and keeps the numbers."""
    parser = make_parser(__doc__, "policy-signal", overrides=True)
    parser.add_argument("--prompts", type=int, default=16, help="prompts to sample")
    parser.add_argument("--group", type=int, default=16, help="videos of each prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="steps of the chain; 0 is noise")
    parser.add_argument("--pathwise", type=int, default=4, help="videos of each prompt for the reward's own gradient")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    options = parser.parse_intermixed_args(arguments)
    config = settings(options)
    if options.out:
        check_out(options.out, picture=True)
    model = load_trainable(config.model, config.seed, config.model.path)
    context = Context(config, model, trained_reward(config.reward), None, Stopwatch(torch.device("cpu")))
    began, found, rows = time.monotonic(), list[dict[int, Found]](), list[dict[str, Any]]()
    for each in measure(context, prompt_set("in_domain", options.prompts), options.steps, options.pathwise):
        found.append(each)
        left = (time.monotonic() - began) / len(found) * (options.prompts - len(found))
        say(f"prompt {len(found)} of {options.prompts}, {left:.0f} s to go")
        if len(found) > 1:
            rows = compare(found)
            about = {"card": processor(), "overrides": options.overrides, "prompts": len(found), "group": options.group}
            if options.out:
                write_atomic(options.out, json.dumps(about | {"rows": rows}, indent=1).encode())
                write_atomic(options.out.with_suffix(".png"), picture(rows))
    say(table(rows).markdown())


def table(rows: list[dict[str, Any]]) -> Grid:
    """Returns the rows as a table, cosines with their standard errors over prompts."""
    heads = ["step", "advantages of", "cosine", "cosine, together", "signal", "agreement", "std of rewards", "reach"]
    return Grid(
        heads,
        [
            [str(row["step"]), row["way"], f"{row['cosine']:.2f} ± {row['error']:.2f}", f"{row['together']:.2f}"]
            + [f"{row[key]:.3f}" for key in ("signal", "agreement", "std", "reach")]
            for row in rows
        ],
        words=2,
    )
