"""What a fixed image tower says of the frames of pairs: computed once, kept in files, and read in every step."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlvid.files import atomic_file

PAIRS_IN_FILE = 64
LOOKS = "looks"
"""In the folder of a fit."""


class Looks:
    """The outputs of an image tower for N pairs, in files of ``PAIRS_IN_FILE`` pairs: float16, (P, 2, F, M).

    A file depends on its pairs alone, so that any number of workers makes the same files, and an interrupted fit goes
    on with those that are there.

    Args:
        folder: of the files; all workers see it.
        count: N.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._open = lru_cache(maxsize=None)(self._map)

    @property
    def files(self) -> int:
        """How many files there are when all are made."""
        return math.ceil(self.count / PAIRS_IN_FILE)

    def make(self, number: int, look: Callable[[Sequence[int]], Tensor]) -> None:
        """Makes a file, unless it is there.

        Args:
            number: of the file.
            look: numbers of P pairs -> (P, 2, F, M).

        Raises:
            OSError: it cannot be written.
        """
        if not (place := self._place(number)).is_file():
            self.folder.mkdir(exist_ok=True)
            first = number * PAIRS_IN_FILE
            found = look(range(first, min(first + PAIRS_IN_FILE, self.count)))
            with atomic_file(place) as part, open(part, "wb") as file:
                np.save(file, found.half().cpu().numpy())

    def read(self, pairs: Sequence[int]) -> Tensor:
        """Returns (P, 2, F, M), float16, of pairs by their numbers."""
        found = (self._open(each // PAIRS_IN_FILE)[each % PAIRS_IN_FILE] for each in pairs)
        return torch.from_numpy(np.stack(list(found)))

    def _map(self, number: int) -> np.ndarray:
        return np.load(self._place(number), mmap_mode="r", allow_pickle=False)

    def _place(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.npy"
