"""What a fixed image tower says of the frames of pairs: computed once, kept in files, and read in every step."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlvid.files import atomic_file, damaged

PAIRS_IN_FILE = 64
_OPEN = 256
"""Files that are open at once."""
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
        self._open = lru_cache(maxsize=_OPEN)(self._map)

    @property
    def files(self) -> int:
        """How many files there are when all are made."""
        return math.ceil(self.count / PAIRS_IN_FILE)

    def missing(self) -> list[int]:
        """Returns the numbers of the files that are not there."""
        return [number for number in range(self.files) if not self._place(number).is_file()]

    def make(self, number: int, look: Callable[[Sequence[int]], Tensor]) -> None:
        """Makes a file.

        Args:
            number: of the file.
            look: numbers of P pairs -> (P, 2, F, M), float16.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(exist_ok=True)
        first = number * PAIRS_IN_FILE
        found = look(range(first, min(first + PAIRS_IN_FILE, self.count)))
        with atomic_file(self._place(number)) as part, open(part, "wb") as file:
            np.save(file, found.cpu().numpy())

    def read(self, pairs: Sequence[int]) -> Tensor:
        """Returns (P, 2, F, M), float16, of pairs by their numbers.

        Raises:
            ValueError: a file is damaged.
        """
        found = (self._open(each // PAIRS_IN_FILE)[each % PAIRS_IN_FILE] for each in pairs)
        return torch.from_numpy(np.stack(list(found)))

    def _map(self, number: int) -> np.ndarray:
        place = self._place(number)
        try:
            return np.load(place, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise damaged(place, error, "delete it, and start the same command again") from None

    def _place(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.npy"
