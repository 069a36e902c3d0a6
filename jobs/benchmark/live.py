"""Counts the bytes of the tensors that a computation makes and still holds."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts bytes of tensors that operations make in the block, each storage once, in both passes and recomputation.

    Tensors from before the block (weights) do not count; nor does memory that an operation takes and gives back itself.

    Attributes:
        now: bytes that are held at the moment.
        peak: the most that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts the storages of its results, without those of its inputs."""
        results = func(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(results):
            if isinstance(each, Tensor) and id(storage := each.untyped_storage()) not in given | self._held.keys():
                self._add(storage)
        return results

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def free(_: Any) -> None:
            self.now -= size
            del self._held[key]

        self._held[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)
