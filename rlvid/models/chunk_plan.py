"""The chunks of a causal decoder that a choice of frames needs, for each video of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkPlan:
    """The places of chosen frames: ``chunk_BS``, and ``place_BS`` within the chunk; int64, on the CPU.

    A video's result does not depend on the other videos of its batch: all methods give rows.
    """

    chunk_BS: Tensor
    place_BS: Tensor

    @classmethod
    def of(cls, frames_BS: Tensor, stride: int) -> "ChunkPlan":
        """Makes the plan of frames_BS, where chunk 0 has one frame and each later chunk ``stride``."""
        frames_BS = frames_BS.cpu()
        assert bool((frames_BS >= 0).all()), "frames count from 0"
        return cls((frames_BS + stride - 1) // stride, torch.where(frames_BS > 0, (frames_BS - 1) % stride, 0))

    @property
    def count(self) -> int:
        """Chunks up to the last scored one of all videos."""
        return int(self.chunk_BS.max()) + 1

    @property
    def slots(self) -> int:
        """S, frames of a video."""
        return self.chunk_BS.shape[1]

    def rows(self, first: int, last: int | None = None) -> Tensor:
        """Returns the videos with a scored frame in chunks ``first`` .. ``last`` (None: the end), ascending, (N,)."""
        hit_BS = self.chunk_BS >= first
        if last is not None:
            hit_BS &= self.chunk_BS <= last
        return hit_BS.any(1).nonzero().flatten()

    def scored(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the scored frames of a chunk: their video, their slot among S, and their place in the chunk; (N,)."""
        row_N, slot_N = (self.chunk_BS == chunk).nonzero(as_tuple=True)
        return row_N, slot_N, self.place_BS[row_N, slot_N]

    def recomputed(self, chunk: int, window: int | None) -> Tensor:
        """Returns the videos whose gradient reaches a chunk."""
        return self.rows(chunk, None if window is None else chunk + window - 1)

    def carried(self, chunk: int, window: int | None) -> Tensor:
        """Returns the videos whose gradient goes on from a chunk, through its incoming cache, to the one before."""
        if chunk == 0:
            return torch.empty(0, dtype=torch.int64)
        return self.rows(chunk, None if window is None else chunk + window - 2)


def positions(rows_N: Tensor, among_M: Tensor) -> Tensor:
    """Returns the positions of rows in an ascending list that holds them all, (N,)."""
    return torch.searchsorted(among_M, rows_N)
