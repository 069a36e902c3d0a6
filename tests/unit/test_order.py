"""The order of mixtures: against a plain walk over all draws."""

from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch

from rlvid.data.order import clip_indices, mixed_indices
from rlvid.randomness import generator

COUNTS, WEIGHTS = (5, 900, 5), (0.2, 0.5, 0.3)


def test_a_mixture_keeps_its_weights_in_every_stretch_and_each_row_once_an_epoch() -> None:
    found = mixed_indices(range(4000), COUNTS, WEIGHTS, seed=3)
    sources = np.searchsorted(np.cumsum(COUNTS), found, side="right")
    for number, weight in enumerate(WEIGHTS):
        of_source = np.cumsum(sources == number)
        for length in (10, 100, 1000):
            share = of_source[length:] - of_source[:-length]
            assert abs(share - weight * length).max() < 4, "a stretch is far from the weights"
        own = found[sources == number] - sum(COUNTS[:number])
        walked = [int(clip_indices([place], COUNTS[number], 3, number)[0]) for place in range(len(own))]
        assert own.tolist() == walked
        epoch = own[: COUNTS[number]]
        assert len({*epoch.tolist()}) == len(epoch), "a row comes twice in an epoch"
    first, last = (found[sources == number][:5] - start for number, start in ((0, 0), (2, 905)))
    assert first.tolist() != last.tolist(), "sources of one size come in one order"


def test_a_draw_of_a_mixture_depends_on_its_serial_and_the_seed_alone() -> None:
    found = mixed_indices(range(500), COUNTS, WEIGHTS, seed=3)
    later = mixed_indices(range(499, 299, -1), COUNTS, WEIGHTS, seed=3)
    assert later.tolist() == found[:299:-1].tolist()
    assert mixed_indices(range(500), COUNTS, [2, 5, 3], seed=3).tolist() == found.tolist(), "weights need no sum of 1"
    assert mixed_indices(range(500), COUNTS, WEIGHTS, seed=4).tolist() != found.tolist()
    assert mixed_indices([], COUNTS, WEIGHTS, seed=3).tolist() == []
    with pytest.raises(ValueError, match="serials start at 0"):
        mixed_indices([-1], COUNTS, WEIGHTS, seed=3)


def test_a_mixture_is_what_exact_fractions_say_draw_by_draw() -> None:
    counts, weights, seed = (7, 3, 400), (3, Fraction(1, 2), 1), 5
    borders = [border / sum(weights) for border in accumulate(weights)][:-1]
    start = int(torch.randint(2**62, (), generator=generator(seed, "mixture")))
    drawn, expected = [0] * len(counts), []
    for serial in range(1500):
        turn = Fraction((start + serial * 0x9E3779B97F4A7C15) % 2**64, 2**64)  # of the golden ratio, from the start on
        number = bisect_right(borders, turn)
        place = int(clip_indices([drawn[number]], counts[number], seed, number)[0])
        expected.append(sum(counts[:number]) + place)
        drawn[number] += 1
    assert mixed_indices(range(1500), counts, [float(weight) for weight in weights], seed).tolist() == expected


def test_more_sources_than_a_byte_counts_keep_their_numbers() -> None:
    found = mixed_indices(range(3000), [1] * 300, [1.0] * 300, seed=0)
    assert {*found.tolist()} == {*range(300)}
