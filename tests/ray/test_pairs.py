"""Preference pairs are read by Ray Data side by side, in their order, to the same bits as alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rlvid.data.clips import EncodedClips
from rlvid.fitting.pairs import Media, Pair, Vote
from rlvid.fitting.prepare import items, read_batch, read_on_ray, write_pairs
from rlvid.reward.preprocess import Preprocess


@pytest.mark.parametrize("readers", [1, 3])
def test_readers_give_the_rows_of_one_process(tmp_path: Path, ray_cluster: Any, readers: int) -> None:
    random = np.random.default_rng(0)
    for place in range(12):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{place}.png")
    (tmp_path / "5.png").write_bytes(b"broken")
    media = [Media(tmp_path / f"{place}.png") for place in range(12)]
    pairs = [
        Pair(f"a dog {place}", media[place], media[place + 1], "", (Vote("quality", place / 11, None, "here"),))
        for place in range(11)
    ]
    made = items(pairs, ["quality", "motion"], {"a dog 3"})
    skipped = [
        write_pairs(read, tmp_path / name, ["quality", "motion"], 8, 16)
        for name, read in (
            ("alone", [read_batch(pa.Table.from_pylist(made), 8, Preprocess(16))]),
            ("ray", read_on_ray(made, 8, Preprocess(16), readers)),
        )
    ]
    alone, found = (EncodedClips.open(tmp_path / name) for name in ("alone", "ray"))
    assert len(found) == 9
    assert found.meta["fingerprint"] == alone.meta["fingerprint"]
    assert list(map(str, skipped[0])) == list(map(str, skipped[1]))
    assert len(skipped[0]) == 2
