"""Archives for tests, written without Ray."""

from pathlib import Path

import torch

from rlvid.algorithms.base import Samples
from rlvid.data.archive import piece_of
from rlvid.data.chunks import ArchiveFolder, table_of

COMMON = {
    "run": "run", "algorithm": "instructvideo", "config_hash": "c0ffee", "seed": 7, "fps": 8.0, "model": "builtin"
}  # fmt: skip


def make_samples(first: int, count: int = 2, size: int = 16) -> Samples:
    """``count`` videos of three frames, with serials from ``first`` on."""
    return Samples(
        serials=list(range(first, first + count)),
        prompts=[f"prompt {i}" for i in range(count)],
        frames_BSCHW=torch.rand(count, 3, 3, size, size) * 1.2 - 0.1,
        frames_BS=torch.tensor([[0, 3, 6]] * count),
        scores_BS=torch.rand(count, 3),
        reward_B=torch.tensor([0.5] * count),
    )


def add_chunk(run: Path, samples: dict[tuple[int, int], Samples], files: int = 1) -> list[str]:
    """Archives samples by step and rank, as one chunk of ``files`` parts; returns the names of the parts."""
    folder = ArchiveFolder(str(run.parent), run.name)
    (run / "archive" / ".staging" / "test").mkdir(parents=True, exist_ok=True)
    keys = sorted(samples)
    each = -(-len(keys) // files)
    groups = [keys[at : at + each] for at in range(0, len(keys), each)]
    staged = [
        folder.stage("test", table_of(COMMON, [piece_of(step, rank, samples[step, rank]) for step, rank in group]))
        for group in groups
    ]
    return [part.name for part in folder.commit("test", staged)]
