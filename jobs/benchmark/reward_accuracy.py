"""Measures how often rewards prefer the better video of a pair, by what is wrong with the other one.

    python -m rlvid.fitting.votes unseen.parquet --rendered 500 --noise 0 --seed 77
    python -m jobs.benchmark reward-accuracy unseen.parquet --rewards builtin builtin-heldout fitted=runs/liked

The oracle stands beside them. A pair that a reward does not tell apart counts half.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from jobs.benchmark.options import check_out, make_parser
from rlvid.data.images import decode_image
from rlvid.data.parquet import open_parquet
from rlvid.evaluate.tables.table import Grid, json_text
from rlvid.files import write_atomic
from rlvid.fitting.judge import Judged, Share, accuracy
from rlvid.reward.load import NAMES, load_reward
from rlvid.reward.video import mean_of_frames
from rlvid.terminal import counter, say

_AT_ONCE = 32
Scorer = Callable[[Tensor, list[str]], Tensor]


def batches(path: Path) -> Iterator[tuple[list[dict[str, str]], Tensor, Tensor, list[float]]]:
    """Yields the pairs that have a better video: names, the videos a and b (B, F, 3, H, W), preferences."""
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            rows = [row for row in batch.to_pylist() if row["preference"] != 0.5]
            if rows:
                a, b = (torch.stack([_video(row[side]) for row in rows]) for side in ("a", "b"))
                yield rows, a, b, [row["preference"] for row in rows]


def _video(frames: list[bytes]) -> Tensor:
    pixels = np.stack([decode_image(frame, "a frame") for frame in frames])
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(0, 3, 1, 2)


@torch.no_grad()
def measure(path: Path, rewards: dict[str, Scorer]) -> dict[str, dict[str, Share]]:
    """Returns the accuracy of each reward by kind of pair; ``all`` is the mean over kinds' pairs."""
    judged: dict[str, list[Judged]] = {name: [] for name in rewards}
    with parquet.ParquetFile(path) as file:
        total = file.metadata.num_rows
    show, done = counter("pairs"), 0
    for rows, a_BFCHW, b_BFCHW, preferences in batches(path):
        prompts = [row["prompt"] for row in rows]
        for name, reward in rewards.items():
            gap_B = mean_of_frames(reward(a_BFCHW, prompts)) - mean_of_frames(reward(b_BFCHW, prompts))
            judged[name] += [
                Judged(row["prompt"], row["kind"], "quality", gap, (preference,))
                for row, gap, preference in zip(rows, gap_B.tolist(), preferences, strict=True)
            ]
        show(done := done + len(rows), total)
    kinds = list(dict.fromkeys(each.kind for each in next(iter(judged.values()))))
    return {
        name: {kind: accuracy([each for each in found if each.kind == kind]) for kind in kinds}
        | {"all": accuracy(found)}
        for name, found in judged.items()
    }


def grid_of(found: dict[str, dict[str, Share]]) -> Grid:
    """Returns the table: a row a kind, a column a reward."""
    kinds = list(next(iter(found.values())))
    rows = [
        [kind, str(next(iter(found.values()))[kind].pairs)]
        + [f"{each[kind].share:.1%} [{each[kind].low:.1%}, {each[kind].high:.1%}]" for each in found.values()]
        for kind in kinds
    ]
    return Grid(["what is wrong", "pairs", *found], rows)


def _check_pairs(path: Path) -> None:
    """Raises ValueError for a file that is none of the maker of votes."""
    way = "python -m rlvid.fitting.votes writes one"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {way}")
    try:
        with open_parquet(path) as file:
            names = file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: is no whole Parquet file of pairs ({str(error).splitlines()[0][:120]}); {way}"
        ) from None
    if missing := [name for name in ("prompt", "a", "b", "preference", "kind") if name not in names]:
        raise ValueError(f"{path}: lacks {' and '.join(missing)}; {way}")


def _rewards(named: list[str]) -> dict[str, Scorer]:
    found: dict[str, Scorer] = {}
    for each in named:
        name, _, path = each.partition("=")
        if name not in NAMES:
            raise ValueError(
                f"--rewards {each}: no such reward; allowed: NAME or NAME=PATH, NAME of {', '.join(NAMES)}"
            )
        label = Path(path).name if path else name
        if label in found:
            raise ValueError(f"--rewards {each}: {label!r} is there twice; copy the folder under another name")
        found[label] = load_reward(name, path=path or None, key=f"--rewards {name}")
    return found


def main(arguments: list[str]) -> None:
    """Reads the options, measures, and shows the table."""
    parser = make_parser(__doc__, "reward-accuracy")
    parser.add_argument("pairs", type=Path, help="what python -m rlvid.fitting.votes wrote, with --noise 0")
    parser.add_argument("--rewards", nargs="+", default=["builtin", "builtin-heldout"], help="NAME or NAME=PATH each")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given: argparse.Namespace = parser.parse_args(arguments)
    if given.out:
        check_out(given.out)
    _check_pairs(given.pairs)
    found = measure(given.pairs, _rewards([*given.rewards, "oracle"]))
    say(grid_of(found).markdown())
    if given.out:
        figures = {name: {kind: asdict(share) for kind, share in each.items()} for name, each in found.items()}
        write_atomic(given.out, json_text(figures).encode())
