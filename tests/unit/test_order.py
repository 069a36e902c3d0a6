"""The order of mixtures: against a plain walk over all draws."""

import numpy as np
import pytest

from rlvid.data.order import clip_indices, mixed_indices

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
