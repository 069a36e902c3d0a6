"""The workers of a run as a torch process group."""

from typing import Any

import torch
from torch import distributed

from rlvid.algorithms.base import WorkerGroup


class TorchWorkerGroup(WorkerGroup):
    """Workers joined by a torch process group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, items: list[Any]) -> list[Any]:
        """See ``WorkerGroup.gather``."""
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, items)
        return [item for row in zip(*everyone, strict=True) for item in row]

    def mean_(self, tensors: list[torch.Tensor]) -> None:
        """See ``WorkerGroup.mean_``."""
        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor /= self.size
