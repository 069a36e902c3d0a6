"""DRaFT and AlignProp, each held to an independent calculation."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import clips, close, flat_gradient, make, one_gradient
from torch import Tensor

from rlvid.algorithms.alignprop import draw_cut
from rlvid.algorithms.scoring import score
from rlvid.config import parse_config
from rlvid.config.methods.reward_gradient import AlignPropConfig


def test_draft_through_the_whole_chain_is_full_backpropagation() -> None:
    method = make({"name": "draft", "gradient_steps": None})
    batch, context = clips(method), method.context
    x = context.normal("start", batch)
    model, grid = context.model, context.model.path.grid(4)
    for place, t in enumerate(grid):
        prediction = model.predict(x, t, batch.text_BLD, 3.0)
        after = model.path.abar[grid[place + 1]] if place < 3 else torch.ones(())
        x = after.sqrt() * prediction.x0 + (1 - after).sqrt() * prediction.eps
    expected = one_gradient(method, (1 - score(context, batch, x).reward_B).mean())
    close(flat_gradient(method, batch)[0], expected)


def test_low_variance_draft_averages_its_repeats() -> None:
    method = make({"name": "draft-lv", "repeats": 3})
    batch, context = clips(method), method.context
    clean = method.sample(batch)
    assert not clean.requires_grad
    gradients = []
    for repeat in range(3):
        noise, abar = context.normal("low-variance", batch, repeat), context.model.path.abar[1]
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        eps = context.model.predict(noisy, 1, batch.text_BLD, 3.0).eps
        x0 = (noisy - (1 - abar).sqrt() * eps) / abar.sqrt()
        gradients.append(one_gradient(method, (1 - score(context, batch, x0).reward_B).mean()))
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()
    got, updates = flat_gradient(method, batch)
    close(got, torch.stack(gradients).mean(0))
    assert [u.step for u in updates] == [False, False, True]


@contextmanager
def saved_elements() -> Iterator[list[int]]:
    """How many elements autograd keeps for the backward pass."""
    kept = [0]

    def pack(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def test_no_graph_is_built_before_the_cut() -> None:
    kept = {}
    for cut in (0, 1, 3):
        method = make(
            {"name": "alignprop", "truncation": "fixed", "cut": cut},
            train={"batch_size": 4, "checkpoint_activations": False},
        )
        batch = clips(method)
        with saved_elements() as count:
            method.sample(batch)
        kept[cut] = count[0]
    step = kept[0] - kept[1]
    assert kept[1] - kept[3] == 2 * step  # elements, not seconds: exact
    assert 0 < kept[3] <= step  # the first step with a graph: nothing is kept for what does not depend on the adapter


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        ({"mean": 0.01, "spread": 0.001}, 20, ["method.mean = 0.01", "method.spread = 0.001", "to 0.05 or more"]),
        ({"mean": 0.3, "spread": 0.01}, 2, ["method.mean = 0.3", "method.mean to 0.5 or more"]),
        ({"spread": 100.0}, 20, ["method.spread = 100.0", "method.spread to 1 or less"]),
        ({"truncation": "uniform", "mean": 0.5}, 20, ["method.mean = 0.5", "'uniform'", "leave it out"]),
        ({"truncation": "fixed", "cut": 1, "spread": 0.2}, 20, ["method.spread = 0.2", "'fixed'", "leave it out"]),
    ],
)
def test_cuts_that_are_never_drawn_are_refused(settings: dict[str, Any], steps: int, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        parse_config({"method": {"name": "alignprop", **settings}, "sampling": {"steps": steps}})
    assert all(word in str(refused.value) for word in words)


def test_the_cuts_that_an_error_allows_are_drawn() -> None:
    for steps in (2, 3, 20, 500):
        for mean in (1 / steps, 0.999):
            for spread in (1e-6, 0.1, 1.0):
                method = {"name": "alignprop", "mean": mean, "spread": spread}
                config = parse_config({"method": method, "sampling": {"steps": steps}}).method
                assert isinstance(config, AlignPropConfig)
                drawn = [draw_cut(config, steps, 0, step) for step in range(50)]
                assert 1 <= min(drawn) <= max(drawn) < steps


def test_the_cut_has_its_distribution_and_is_drawn_once_a_batch() -> None:
    gaussian = AlignPropConfig()
    cuts = torch.tensor([float(draw_cut(gaussian, 50, 0, step)) for step in range(4000)])
    draws = (42 + 5 * torch.randn(400_000, generator=torch.Generator().manual_seed(1))).to(torch.int64)
    allowed = draws[(draws >= 1) & (draws < 50)].double()
    assert 1 <= cuts.min() <= cuts.max() <= 49
    assert float(cuts.mean()) == pytest.approx(float(allowed.mean()), abs=0.25)
    assert float(cuts.std()) == pytest.approx(float(allowed.std()), abs=0.2)
    assert draw_cut(gaussian, 50, 0, 7) == draw_cut(gaussian, 50, 0, 7), "all workers draw the same"
    for mean, end in ((0.1, 1), (0.9, 9)):  # the ends of [1, D) are drawn, and nothing beyond them
        drawn = {draw_cut(AlignPropConfig(mean=mean, spread=0.15), 10, 0, step) for step in range(500)}
        assert end in drawn
        assert drawn <= set(range(1, 10))
    uniform = AlignPropConfig(truncation="uniform")
    counts = torch.bincount(torch.tensor([draw_cut(uniform, 10, 0, step) for step in range(5000)]), minlength=10)
    assert (counts - 500).abs().max() < 5 * math.sqrt(450)
    method = make({"name": "alignprop", "truncation": "uniform"}, train={"batch_size": 4, "micro_batch": 1})
    chosen = []
    chain = method.chain
    method.chain = lambda batch, x, grid, carried: (chosen.append(carried), chain(batch, x, grid, carried))[1]
    list(method.updates(clips(method)))
    assert len(chosen) == 4
    assert len(set(chosen)) == 1
